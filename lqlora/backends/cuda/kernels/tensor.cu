// Products of up to sixteen rows of 16-bit inputs and a packed weight, by tensor cores (sm_80 and later).
//
// A block of threads multiplies sixteen rows of the weight, and each of its warps a part of their columns. A tensor
// core adds over all columns that it is given, so any order of the columns is right as long as weights and inputs
// agree. Each lane takes groups of eight adjacent columns, so that it reads whole words. Weights are rounded to the
// dtype of the inputs, as for products of many rows on a device. Sums are float32, and the warps add theirs through
// shared memory at the end.

// Packs two 16-bit numbers in a word, the first one in the lower half.
template <class Half> __device__ __forceinline__ unsigned paired(float first, float second) {
  Half low, high;
  narrow(first, low);
  narrow(second, high);
  return low.bits | (unsigned)high.bits << 16;
}

#ifdef __CUDA_ARCH__

#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ unsigned paired<BFloat16>(float first, float second) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

template <> __device__ __forceinline__ unsigned paired<Float16>(float first, float second) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
#endif

// Adds the product of a 16 x 16 matrix `a` and a 16 x 8 matrix `b` to the 16 x 8 matrix `sums`. Lane 4 * i + j holds
// rows i and i + 8 of `a`, and column i of `b`; of each it holds the entries 2 * j, 2 * j + 1, 2 * j + 8 and 2 * j + 9
// along the common side. Of `sums` it holds columns 2 * j and 2 * j + 1 of rows i and i + 8.
__device__ __forceinline__ void add_product(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void add_product(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

// The same by shuffles, for the emulator: lane 4 * i + j gets from other lanes of its warp the rows and columns that it
// needs.
template <class Half>
__device__ __forceinline__ void add_product(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Half) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int j = 0; j < 4; ++j)
    for (int part = 0; part < 2; ++part) {
      unsigned rows[2], columns[2];
      for (int i = 0; i < 2; ++i) {
        rows[i] = __shfl_sync(0xffffffffu, a[2 * part + i], 4 * row + j);
        columns[i] = __shfl_sync(0xffffffffu, b[part], 4 * (column + i) + j);
      }
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 32; k += 16)
          sums[i] += widen(Half{(unsigned short)(rows[i / 2] >> k)}) * widen(Half{(unsigned short)(columns[i % 2] >> k)});
    }
}

#endif

// Rows of the weight of a block of threads, columns of a warp at a time, warps of a block, and inputs of one product.
constexpr int TILE = 16, STRETCH = 64, WARPS = 8, EIGHT = 8;

// Decodes a group. In plain rows a group lies within one block and has no zero point.
template <bool plain, int bits>
__device__ __forceinline__ void decode_part(const RowOfWeights& row, unsigned long long codes, unsigned column,
                                            const float* table, float (&weights)[GROUP]) {
  const Position position = row.at(column);
  if constexpr (plain) {
    const float scale = row.scales[position.block];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) weights[i] = table[code_in<bits>(codes, i)] * scale;
  } else {
    decode_group<bits>(codes, position, GROUP, row.scales, row.zero_points, row.zero_points != nullptr, table, row.size,
                       weights);
  }
}

// Adds the products of a stretch of columns; each of four lanes has a quarter of it. Beyond the end of the row the
// lanes read its first columns instead, and multiply zeros: all lanes of a warp must take part in a product.
template <bool plain, int bits, class Half>
__device__ __forceinline__ void add_stretch(const RowOfWeights (&rows)[2], const Half* __restrict__ x, int inputs,
                                            int columns, int begin, const float* table, float (&sums)[2][4]) {
  constexpr int groups = STRETCH / 4 / GROUP;
  const int lane = threadIdx.x % 32, own = begin + lane % 4 * (STRETCH / 4);
  unsigned long long codes[groups][2];
#pragma unroll
  for (int q = 0; q < groups; ++q)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int column = own + q * GROUP < columns ? own + q * GROUP : 0;
      codes[q][r] = load_group<bits>(rows[r].codes + (long long)(column / GROUP) * bits, true, GROUP);
    }
#pragma unroll
  for (int q = 0; q < groups; ++q) {
    const bool present = own + q * GROUP < columns;
    const int column = present ? own + q * GROUP : 0;
    float weights[2][GROUP];
#pragma unroll
    for (int r = 0; r < 2; ++r) decode_part<plain, bits>(rows[r], codes[q][r], column, table, weights[r]);
    uint4 input[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int at = lane / 4 + EIGHT * part;
      input[part] = uint4{0, 0, 0, 0};
      if (present && at < inputs) input[part] = *reinterpret_cast<const uint4*>(x + (long long)at * columns + column);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned a[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        a[k] = present ? paired<Half>(weights[k % 2][4 * i + k / 2 * 2], weights[k % 2][4 * i + k / 2 * 2 + 1]) : 0;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (EIGHT * part >= inputs) break;
        const unsigned b[2] = {i ? input[part].z : input[part].x, i ? input[part].w : input[part].y};
        add_product(sums[part], a, b, Half{});
      }
    }
  }
}

// Adds the products of all stretches of a warp.
template <bool plain, int bits, class Half>
__device__ __forceinline__ void add_stretches(const RowOfWeights (&rows)[2], const Half* __restrict__ x, int inputs,
                                              int columns, const float* table, float (&sums)[2][4]) {
  for (int begin = threadIdx.x / 32 * STRETCH; begin < columns; begin += WARPS * STRETCH)
    add_stretch<plain, bits>(rows, x, inputs, columns, begin, table, sums);
}

template <int bits, class Half>
__global__ void __launch_bounds__(256, 2)
    matmul_tensor(const Half* __restrict__ x, const unsigned char* __restrict__ packed, const float* __restrict__ scales,
                  const unsigned char* __restrict__ zero_points, int affine, const float* __restrict__ levels,
                  Half* __restrict__ out, int inputs, long long rows, int columns, long long block_size, double inverse,
                  int shift) {
  __shared__ float table[1 << bits], met[WARPS][2 * EIGHT][TILE + 1];
  share(levels, table);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (long long first = blockIdx.x * (long long)TILE; first < rows; first += gridDim.x * (long long)TILE) {
    RowOfWeights own[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const long long row = first + lane / 4 + EIGHT * r, start = (row < rows ? row : rows - 1) * columns;
      const Position begin = position_of(start, {block_size, inverse});
      own[r] = {packed + start / GROUP * bits, scales + begin.block, affine ? zero_points + begin.block : nullptr,
                (unsigned)begin.within, (unsigned)block_size, shift};
    }
    float sums[2][4] = {};
    if (!affine && block_size % GROUP == 0) add_stretches<true, bits>(own, x, inputs, columns, table, sums);
    else add_stretches<false, bits>(own, x, inputs, columns, table, sums);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      met[warp][i / 4 * EIGHT + lane % 4 * 2 + i % 2][lane / 4 + i % 4 / 2 * EIGHT] = sums[i / 4][i % 4];
    __syncthreads();
    const int input = threadIdx.x / TILE, row = threadIdx.x % TILE;
    if (input < inputs && first + row < rows) {
      float sum = 0;
      for (int i = 0; i < WARPS; ++i) sum += met[i][input][row];
      narrow(sum, out[input * rows + first + row]);
    }
    __syncthreads();
  }
}
