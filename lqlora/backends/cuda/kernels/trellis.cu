// Decoding of trellis codes to weights. A thread decodes eight weights at a time.

template <class Out>
__global__ void __launch_bounds__(256)
    decode_trellis(const unsigned char* __restrict__ packed, const float* __restrict__ scales,
                   const float* __restrict__ levels, Out* __restrict__ out, long long count, long long length,
                   double inverse_length, long long block_size, double inverse, long long blocks_per_line, int bits,
                   int state_bits) {
  const Trellis trellis{{length, inverse_length}, {block_size, inverse}, blocks_per_line, bits, state_bits};
  const bool wide_stores = is_aligned(out, 16);
  for (long long first = first_thread() * GROUP; first < count; first += thread_count() * GROUP) {
    const int here = group_length(first, count);
    InSequence place = sequence_of(first, trellis);
    if (here == GROUP && place.at + GROUP <= place.size) {
      const float scale = scales[place.block];
      float weights[GROUP];
#pragma unroll
      for (int i = 0; i < GROUP; ++i, ++place.at) weights[i] = levels[state_of(packed, place, trellis)] * scale;
      store_eight(out + first, wide_stores, GROUP, weights);
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < here; ++i) {
      if (place.at == place.size) place = sequence_of(first + i, trellis);
      narrow(levels[state_of(packed, place, trellis)] * scales[place.block], out[first + i]);
      ++place.at;
    }
  }
}
