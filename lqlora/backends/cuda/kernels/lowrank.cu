// The low-rank part of a few rows of inputs: inner = x @ A^T, then out = y + scaling * (inner @ B^T). The inner product
// has one float32 for each input and rank. As for products with packed weights, the operation defines no order of
// additions, so multiplications may be fused with additions.

// Loads eight numbers; those beyond `count` become zero.
template <class Value>
__device__ __forceinline__ void load_some(const Value* from, bool aligned, int count, float (&to)[GROUP]) {
  if (count >= GROUP) return load_eight(from, aligned, to);
#pragma unroll
  for (int i = 0; i < GROUP; ++i) to[i] = i < count ? widen(from[i]) : 0;
}

__device__ __forceinline__ float added_up(const float (&a)[GROUP], const float (&b)[GROUP], float sum) {
#pragma unroll
  for (int i = 0; i < GROUP; ++i) sum = __fmaf_rn(a[i], b[i], sum);
  return sum;
}

// A block of threads computes one rank at a time, for up to `most` inputs, because rows of A are long and ranks are
// few.
template <class Value, class Factor, int most>
__global__ void __launch_bounds__(256)
    low_rank_inner(const Value* __restrict__ x, const Factor* __restrict__ lora_A, float* __restrict__ inner, int inputs,
                   int rank, int columns) {
  constexpr int warps = 8;
  __shared__ float met[most][warps];
  const bool aligned = is_aligned(x, 16) && is_aligned(lora_A, 16) && columns % GROUP == 0;
  const int parts = (inputs + most - 1) / most, warp = threadIdx.x / 32;
  for (int part = blockIdx.x; part < parts * rank; part += gridDim.x) {
    const int k = part / parts, first = part % parts * most;
    float sums[most] = {};
    for (int column = threadIdx.x * GROUP; column < columns; column += blockDim.x * GROUP) {
      float factors[GROUP], input[GROUP];
      load_some(lora_A + (long long)k * columns + column, aligned, columns - column, factors);
#pragma unroll
      for (int m = 0; m < most; ++m) {  // beyond the last input it is read again, and not written
        const int own = first + m < inputs ? first + m : first;
        load_some(x + (long long)own * columns + column, aligned, columns - column, input);
        sums[m] = added_up(factors, input, sums[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < most; ++m) {
      for (int distance = 16; distance > 0; distance /= 2) sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], distance);
      if (threadIdx.x % 32 == 0) met[m][warp] = sums[m];
    }
    __syncthreads();
    if (threadIdx.x < most && first + (int)threadIdx.x < inputs) {
      float sum = 0;
      for (int i = 0; i < warps; ++i) sum += met[threadIdx.x][i];
      inner[(long long)(first + threadIdx.x) * rank + k] = sum;
    }
    __syncthreads();
  }
}

// A team of lanes computes one row of B at a time, for up to `most` inputs: rows of B are short and many. Two blocks of
// 256 threads on a multiprocessor leave 128 registers to each thread.
template <class Value, class Factor, int most>
__global__ void __launch_bounds__(256, 2)
    low_rank_outer(const Value* __restrict__ y, const float* __restrict__ inner, const Factor* __restrict__ lora_B,
                   float scaling, Value* __restrict__ out, int inputs, int rank, long long rows, int lanes) {
  const bool aligned = is_aligned(lora_B, 16) && rank % GROUP == 0;
  const bool inner_aligned = is_aligned(inner, 16) && rank % 4 == 0;
  const int lane = threadIdx.x % lanes;
  const long long parts = (inputs + most - 1) / most, teams = thread_count() / lanes;
  // All teams of a warp go on as long as one of them has a row, because a shuffle waits for every lane.
  for (long long begin = first_thread() / 32 * (32 / lanes); begin < parts * rows; begin += teams) {
    const long long turn = begin + threadIdx.x % 32 / lanes, own = turn < parts * rows ? turn : 0;
    const long long row = parts > 1 ? own % rows : own;
    const int first = parts > 1 ? (int)(own / rows) * most : 0;
    float sums[most] = {}, before[most];
#pragma unroll
    for (int m = 0; m < most; ++m) before[m] = first + m < inputs ? widen(y[(first + m) * rows + row]) : 0;
    for (int k = lane * GROUP; k < rank; k += lanes * GROUP) {
      float factors[GROUP], input[GROUP];
      load_some(lora_B + row * rank + k, aligned, rank - k, factors);
#pragma unroll
      for (int m = 0; m < most; ++m) {
        const int at = first + m < inputs ? first + m : first;
        load_some(inner + (long long)at * rank + k, inner_aligned, rank - k, input);
        sums[m] = added_up(factors, input, sums[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < most; ++m) {
      for (int distance = lanes / 2; distance > 0; distance /= 2)
        sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], distance);
      if (m % lanes == lane && turn < parts * rows && first + m < inputs)
        narrow(__fmaf_rn(scaling, sums[m], before[m]), out[(first + m) * rows + row]);
    }
  }
}
