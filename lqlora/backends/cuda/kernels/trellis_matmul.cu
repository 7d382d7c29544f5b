// Products of a few rows of inputs and a weight in trellis codes, which is decoded once, in registers, for all inputs.
//
// A warp multiplies one row of the weight, and its lanes go through the row in groups of eight weights. Rows are whole
// groups long, and inputs begin at multiples of sixteen bytes. The operation defines no order of additions, so
// multiplications are fused with additions.

template <class Value, int most_inputs>
__global__ void __launch_bounds__(128, 8)
    matmul_trellis(const Value* __restrict__ x, const unsigned char* __restrict__ packed,
                   const float* __restrict__ scales, const float* __restrict__ levels, Value* __restrict__ out,
                   int inputs, long long rows, int columns, long long length, double inverse_length,
                   long long block_size, double inverse, long long blocks_per_line, int bits, int state_bits) {
  const Trellis trellis{{length, inverse_length}, {block_size, inverse}, blocks_per_line, bits, state_bits};
  constexpr int warps = 4;
  for (long long row = blockIdx.x * (long long)warps + threadIdx.x / 32; row < rows; row += gridDim.x * (long long)warps) {
    float sums[most_inputs] = {};
    for (int column = threadIdx.x % 32 * GROUP; column < columns; column += 32 * GROUP) {
      const Value* __restrict__ own = x + column;
      InSequence place = sequence_of(row * columns + column, trellis);
      if (place.at + GROUP <= place.size) {
        const float scale = scales[place.block];
        float weights[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; ++i, ++place.at) weights[i] = levels[state_of(packed, place, trellis)] * scale;
#pragma unroll
        for (int m = 0; m < most_inputs; ++m) {
          if (m >= inputs) break;
          float input[GROUP];
          load_eight(own + (long long)m * columns, true, input);
#pragma unroll
          for (int i = 0; i < GROUP; ++i) sums[m] = __fmaf_rn(input[i], weights[i], sums[m]);
        }
        continue;
      }
#pragma unroll 1
      for (int i = 0; i < GROUP; ++i) {
        if (place.at == place.size) place = sequence_of(row * columns + column + i, trellis);
        const float weight = levels[state_of(packed, place, trellis)] * scales[place.block];
        ++place.at;
#pragma unroll
        for (int m = 0; m < most_inputs; ++m) {
          if (m >= inputs) break;
          sums[m] = __fmaf_rn(widen(own[(long long)m * columns + i]), weight, sums[m]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < most_inputs; ++m) {
      if (m >= inputs) break;
      for (int distance = 16; distance > 0; distance /= 2) sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], distance);
      if (threadIdx.x % 32 == 0) narrow(sums[m], out[m * rows + row]);
    }
  }
}
