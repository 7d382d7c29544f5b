// Decoding of packed codes to weights. A thread decodes eight weights at a time, whose codes are whole bytes.

template <int bits, class Out>
__global__ void __launch_bounds__(256)
    decode(const unsigned char* __restrict__ packed, const float* __restrict__ scales,
           const unsigned char* __restrict__ zero_points, int affine, const float* __restrict__ levels,
           Out* __restrict__ out, long long count, long long block_size, double inverse) {
  __shared__ float table[1 << bits];
  share(levels, table);
  const bool wide_loads = is_aligned(packed, word_bytes<bits>), wide_stores = is_aligned(out, 16);
  for (long long first = first_thread() * GROUP; first < count; first += thread_count() * GROUP) {
    const int length = group_length(first, count);
    const unsigned long long group = load_group<bits>(packed + first / GROUP * bits, wide_loads, length);
    float weights[GROUP];
    const Position position = position_of(first, {block_size, inverse});
    decode_group<bits>(group, position, length, scales, zero_points, affine, table, block_size, weights);
    store_eight(out + first, wide_stores, length, weights);
  }
}
