// Products of a few rows of inputs and a packed weight: each weight is decoded once, in registers, for all inputs.
//
// A warp multiplies one or two rows of the weight, and its lanes go through them in groups of eight weights. Each lane
// loads the codes of a few groups before it decodes the first, so that the loads do not wait for each other. The sums
// of the lanes are added at the end. Rows are whole groups long, and inputs and codes begin at multiples of sixteen
// bytes. The operation defines no order of additions, so multiplications may be fused with additions.

// Rows of a warp and groups of a lane, by the number of inputs. A thread holds rows * most_inputs sums, 8 * rows
// weights and 8 * inputs_at_once inputs in registers: more inputs leave room for fewer groups of codes.
template <int most_inputs> struct Shares {
  static constexpr int rows = most_inputs > 1 ? 2 : 1, groups = most_inputs > 4 ? 1 : most_inputs > 1 ? 2 : 4;
  static constexpr int inputs_at_once = most_inputs > 4 ? 4 : most_inputs > 1 ? 2 : 1;
};

// Adds the products of one group of each row. In plain rows a group lies within one block and has no zero point, so the
// sum of its products is multiplied by the scale once.
template <bool plain, int bits, class Value, int most_inputs>
__device__ __forceinline__ void add_group(const RowOfWeights* rows, const unsigned long long* codes, unsigned column,
                                          const float* table, const Value* __restrict__ x, int inputs, int columns,
                                          float (*sums)[most_inputs]) {
  using S = Shares<most_inputs>;
  float weights[S::rows][GROUP], scale[S::rows];
#pragma unroll
  for (int r = 0; r < S::rows; ++r) {
    const Position position = rows[r].at(column);
    if constexpr (plain) {
      scale[r] = rows[r].scales[position.block];
#pragma unroll
      for (int i = 0; i < GROUP; ++i) weights[r][i] = table[code_in<bits>(codes[r], i)];
    } else {
      decode_group<bits>(codes[r], position, GROUP, rows[r].scales, rows[r].zero_points, rows[r].zero_points != nullptr,
                         table, rows[r].size, weights[r]);
    }
  }
#pragma unroll
  for (int first = 0; first < most_inputs; first += S::inputs_at_once) {
    if (first >= inputs) break;
    float input[S::inputs_at_once][GROUP];
#pragma unroll
    for (int m = 0; m < S::inputs_at_once; ++m)  // beyond the last row of inputs it is read again, and not written
      load_eight(x + (long long)(first + m < inputs ? first + m : 0) * columns + column, true, input[m]);
#pragma unroll
    for (int m = 0; m < S::inputs_at_once; ++m)
#pragma unroll
      for (int r = 0; r < S::rows; ++r) {
        float sum = plain ? 0 : sums[r][first + m];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) sum = __fmaf_rn(input[m][i], weights[r][i], sum);
        sums[r][first + m] = plain ? __fmaf_rn(scale[r], sum, sums[r][first + m]) : sum;
      }
  }
}

// Adds the products of all groups of a lane.
template <bool plain, int bits, class Value, int most_inputs>
__device__ __forceinline__ void add_rows(const RowOfWeights* rows, const float* table, const Value* __restrict__ x,
                                         int inputs, int columns, float (*sums)[most_inputs]) {
  using S = Shares<most_inputs>;
  constexpr int stride = 32 * GROUP;
  int column = threadIdx.x % 32 * GROUP;
  for (; column < columns - (S::groups - 1) * stride; column += S::groups * stride) {
    unsigned long long codes[S::groups][S::rows];
#pragma unroll
    for (int g = 0; g < S::groups; ++g)
#pragma unroll
      for (int r = 0; r < S::rows; ++r)
        codes[g][r] = load_group<bits>(rows[r].codes + (long long)(column / GROUP + 32 * g) * bits, true, GROUP);
#pragma unroll
    for (int g = 0; g < S::groups; ++g)
      add_group<plain, bits, Value, most_inputs>(rows, codes[g], column + g * stride, table, x, inputs, columns, sums);
  }
  for (; column < columns; column += stride) {
    unsigned long long codes[S::rows];
#pragma unroll
    for (int r = 0; r < S::rows; ++r)
      codes[r] = load_group<bits>(rows[r].codes + (long long)(column / GROUP) * bits, true, GROUP);
    add_group<plain, bits, Value, most_inputs>(rows, codes, column, table, x, inputs, columns, sums);
  }
}

// A multiprocessor has 65,536 registers. Four blocks of 128 threads leave 128 of them to each thread, three leave 168:
// the sums of several inputs need the larger number. tests/backends/test_nvrtc.py checks that nothing is spilled.
template <int bits, class Value, int most_inputs>
__global__ void __launch_bounds__(128, most_inputs > 1 ? 3 : 4)
    matmul_packed(const Value* __restrict__ x, const unsigned char* __restrict__ packed,
                  const float* __restrict__ scales, const unsigned char* __restrict__ zero_points, int affine,
                  const float* __restrict__ levels, Value* __restrict__ out, int inputs, long long rows, int columns,
                  long long block_size, double inverse, int shift) {
  constexpr int warps = 4, rows_per_warp = Shares<most_inputs>::rows;
  __shared__ float table[1 << bits];
  share(levels, table);
  const long long step = gridDim.x * (long long)(warps * rows_per_warp);
  for (long long row = (blockIdx.x * (long long)warps + threadIdx.x / 32) * rows_per_warp; row < rows; row += step) {
    RowOfWeights own[rows_per_warp];
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      const long long start = (row + r < rows ? row + r : row) * columns;
      const Position begin = position_of(start, {block_size, inverse});
      own[r] = {packed + start / GROUP * bits, scales + begin.block, affine ? zero_points + begin.block : nullptr,
                (unsigned)begin.within, (unsigned)block_size, shift};
    }
    float sums[rows_per_warp][most_inputs] = {};
    if (!affine && block_size % GROUP == 0) add_rows<true, bits, Value, most_inputs>(own, table, x, inputs, columns, sums);
    else add_rows<false, bits, Value, most_inputs>(own, table, x, inputs, columns, sums);
#pragma unroll
    for (int m = 0; m < most_inputs; ++m) {
      if (m >= inputs) break;
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        float sum = sums[r][m];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (threadIdx.x % 32 == 0 && row + r < rows) narrow(sum, out[m * rows + row + r]);
      }
    }
  }
}
