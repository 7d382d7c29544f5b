// Packing of codes of one byte each to dense bytes, and unpacking. A thread converts eight codes at a time.

template <int bits>
__global__ void __launch_bounds__(256)
    pack_codes(const unsigned char* __restrict__ codes, unsigned char* __restrict__ packed, long long count) {
  const bool wide_loads = is_aligned(codes, 8), wide_stores = is_aligned(packed, word_bytes<bits>);
  for (long long first = first_thread() * GROUP; first < count; first += thread_count() * GROUP) {
    const int length = group_length(first, count);
    const unsigned long long given = load_group<8>(codes + first, wide_loads, length);
    unsigned long long group = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) group |= (unsigned long long)code_in<8>(given, i) << bits * i;
    store_group<bits>(packed + first / GROUP * bits, wide_stores, length, group);
  }
}

template <int bits>
__global__ void __launch_bounds__(256)
    unpack_codes(const unsigned char* __restrict__ packed, unsigned char* __restrict__ codes, long long count) {
  const bool wide_loads = is_aligned(packed, word_bytes<bits>), wide_stores = is_aligned(codes, 8);
  for (long long first = first_thread() * GROUP; first < count; first += thread_count() * GROUP) {
    const int length = group_length(first, count);
    const unsigned long long group = load_group<bits>(packed + first / GROUP * bits, wide_loads, length);
    unsigned long long spread_out = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) spread_out |= (unsigned long long)code_in<bits>(group, i) << 8 * i;
    store_group<8>(codes + first, wide_stores, length, spread_out);
  }
}
