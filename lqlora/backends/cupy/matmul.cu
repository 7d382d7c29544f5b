// A few rows of inputs times a packed weight: each weight is decoded once, in registers, for all inputs.
//
// A warp has one or two rows of the weight; its lanes go along them in groups of eight weights, of which each lane loads a
// few before it decodes the first: loads that do not wait for each other. Sums of the lanes meet at the end. Rows are whole
// groups long. This is the one kernel that fuses multiplications with additions: the order of its sums is no part of the
// definition.

// Where groups are among the blocks of one row. Rows and blocks are shorter than 2**31.
struct RowOfBlocks {
  long long block;      // that the row begins in
  unsigned within;      // of it
  unsigned size;
  int shift;            // of sizes that are powers of two

  __device__ __forceinline__ Position at(long long column) const {
    const unsigned ahead = within + (unsigned)column;
    const unsigned blocks = shift >= 0 ? ahead >> shift : ahead / size;
    return {block + blocks, ahead - blocks * size};
  }
};

__device__ __forceinline__ RowOfBlocks row_of_blocks(long long start, Blocks blocks) {
  const Position position = position_of(start, blocks);
  const unsigned size = (unsigned)blocks.size;
  return {position.block, (unsigned)position.within, size, size & (size - 1) ? -1 : 31 - __clz((int)size)};
}

template <int most_inputs> struct Shares {
  static constexpr int rows_per_warp = most_inputs > 1 ? 2 : 1, groups = most_inputs > 4 ? 1 : most_inputs > 1 ? 2 : 4;
};

template <int bits, class Value, int most_inputs>
__global__ void __launch_bounds__(128, most_inputs > 4 ? 3 : 4)
    matmul_packed(const Value* __restrict__ x, const unsigned char* __restrict__ packed,
                  const float* __restrict__ scales, const unsigned char* __restrict__ zero_points, int affine,
                  const float* __restrict__ levels, Value* __restrict__ out, int inputs, long long rows,
                  long long columns, long long block_size, double inverse) {
  constexpr int warps = 4, rows_per_warp = Shares<most_inputs>::rows_per_warp, groups = Shares<most_inputs>::groups;
  constexpr int stride = 32 * GROUP;
  __shared__ float table[1 << bits];
  share(levels, table);
  const bool wide_inputs = is_aligned(x, 16), wide_codes = is_aligned(packed, word_bytes<bits>);
  const bool whole = block_size % GROUP == 0;  // no group has weights of two blocks
  const int lane = threadIdx.x % 32;
  const long long step = gridDim.x * (long long)(warps * rows_per_warp);
  for (long long row = (blockIdx.x * (long long)warps + threadIdx.x / 32) * rows_per_warp; row < rows; row += step) {
    long long start[rows_per_warp];
    RowOfBlocks begin[rows_per_warp];
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      start[r] = (row + r < rows ? row + r : row) * columns;
      begin[r] = row_of_blocks(start[r], {block_size, inverse});
    }
    float sums[rows_per_warp][most_inputs] = {};
    for (long long first = lane * GROUP; first < columns; first += groups * stride) {
      unsigned long long codes[groups][rows_per_warp];
      float scale[groups][rows_per_warp];
#pragma unroll
      for (int g = 0; g < groups; ++g)
#pragma unroll
        for (int r = 0; r < rows_per_warp; ++r) {
          const long long column = first + g * stride < columns ? first + g * stride : first;
          codes[g][r] = load_group<bits>(packed + (start[r] + column) / GROUP * bits, wide_codes, GROUP);
          scale[g][r] = scales[begin[r].at(column).block];
        }
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const long long column = first + g * stride;
        if (column >= columns) break;
        float weights[rows_per_warp][GROUP];
#pragma unroll
        for (int r = 0; r < rows_per_warp; ++r) {
          if (whole && !affine) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) weights[r][i] = table[code_in<bits>(codes[g][r], i)] * scale[g][r];
          } else {
            decode_group<bits>(codes[g][r], begin[r].at(column), GROUP, scales, zero_points, affine, table, block_size,
                               weights[r]);
          }
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
