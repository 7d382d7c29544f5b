// A few rows of inputs times a packed weight: each weight is decoded once, in registers, for all inputs.
//
// A warp has two rows of the weight; its lanes go along them in groups of eight weights, and their sums meet at the end.
// Rows are whole groups long. This is the one kernel that fuses multiplications with additions: the order of its sums is
// no part of the definition.

template <int bits, class Value, int most_inputs>
__global__ void __launch_bounds__(128, most_inputs > 4 ? 3 : 4)
    matmul_packed(const Value* __restrict__ x, const unsigned char* __restrict__ packed,
                  const float* __restrict__ scales, const unsigned char* __restrict__ zero_points, int affine,
                  const float* __restrict__ levels, Value* __restrict__ out, int inputs, long long rows,
                  long long columns, long long block_size, double inverse) {
  constexpr int warps = 4, rows_per_warp = 2;
  __shared__ float table[1 << bits];
  share(levels, table);
  const bool wide_inputs = is_aligned(x, 16), wide_codes = is_aligned(packed, word_bytes<bits>);
  const int lane = threadIdx.x % 32;
  const long long step = gridDim.x * (long long)(warps * rows_per_warp);
  for (long long row = (blockIdx.x * (long long)warps + threadIdx.x / 32) * rows_per_warp; row < rows; row += step) {
    long long start[rows_per_warp];
    Position begin[rows_per_warp];
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      start[r] = (row + r < rows ? row + r : row) * columns;
      begin[r] = position_of(start[r], {block_size, inverse});
    }
    float sums[rows_per_warp][most_inputs] = {};
    for (long long column = lane * GROUP; column < columns; column += 32 * GROUP) {
      float weights[rows_per_warp][GROUP];
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        const unsigned char* codes = packed + (start[r] + column) / GROUP * bits;
        const unsigned long long group = load_group<bits>(codes, wide_codes, GROUP);
        // Rows and blocks are shorter than 2**31.
        const unsigned ahead = (unsigned)begin[r].within + (unsigned)column, size = (unsigned)block_size;
        const Position position{begin[r].block + ahead / size, ahead % size};
        decode_group<bits>(group, position, GROUP, scales, zero_points, affine, table, block_size, weights[r]);
      }
#pragma unroll
      for (int m = 0; m < most_inputs; ++m) {
        if (m >= inputs) break;
        float input[GROUP];
        load_eight(x + m * columns + column, wide_inputs, input);
#pragma unroll
        for (int r = 0; r < rows_per_warp; ++r)
#pragma unroll
          for (int i = 0; i < GROUP; ++i) sums[r][m] = __fmaf_rn(input[i], weights[r][i], sums[r][m]);
      }
    }
#pragma unroll
    for (int m = 0; m < most_inputs; ++m) {
      if (m >= inputs) break;
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        float sum = sums[r][m];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0 && row + r < rows) narrow(sum, out[m * rows + row + r]);
      }
    }
  }
}
