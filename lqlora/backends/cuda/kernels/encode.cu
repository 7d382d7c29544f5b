// Encoding of weights with given scales. A thread encodes eight weights at a time, so that it writes whole bytes.

// Divisor and zero point of a block. A scale of zero is replaced by infinity, so that the quotients are zeros and not
// NaN.
template <class Wide> struct Scaling {
  Wide divisor, zero;

  __device__ __forceinline__ void of(long long block, const Wide* scales, const unsigned char* zero_points, bool affine) {
    const Wide scale = scales[block];
    divisor = scale != 0 ? scale : (Wide)__uint_as_float(0x7f800000u);
    zero = affine ? (Wide)zero_points[block] : (Wide)0;
  }
};

template <int bits, class Value>
__global__ void __launch_bounds__(256)
    encode_packed(const Value* __restrict__ flat, const typename Arithmetic<Value>::type* __restrict__ scales,
                  const unsigned char* __restrict__ zero_points, int affine, const float* __restrict__ boundaries,
                  unsigned char* __restrict__ packed, long long count, long long block_size, double inverse) {
  using Wide = typename Arithmetic<Value>::type;
  constexpr int cells = 1 << bits;
  constexpr bool gaps = cells > MANY;
  __shared__ float cuts[place_of<gaps>(cells)];
  share_boundaries<gaps>(boundaries, cells, cuts);
  const bool wide_loads = is_aligned(flat, 16), wide_stores = is_aligned(packed, word_bytes<bits>);
  for (long long first = first_thread() * GROUP; first < count; first += thread_count() * GROUP) {
    const int length = group_length(first, count);
    Wide values[GROUP];
    if (length == GROUP) {
      load_eight(flat + first, wide_loads, values);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) values[i] = i < length ? widen(flat[first + i]) : (Wide)0;
    }
    BlockWalk walk(position_of(first, {block_size, inverse}), block_size);
    Scaling<Wide> scaling;
    scaling.of(walk.block, scales, zero_points, affine);
    unsigned long long group = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      if (i >= length) break;
      if (walk.enters(i)) scaling.of(walk.block, scales, zero_points, affine);
      const Wide normalized = values[i] / scaling.divisor + scaling.zero;
      group |= (unsigned long long)cell_of<gaps>(normalized, cuts, cells) << bits * i;
    }
    store_group<bits>(packed + first / GROUP * bits, wide_stores, length, group);
  }
}

template <class Value>
__global__ void __launch_bounds__(256)
    nearest_codes(const Value* __restrict__ flat, const float* __restrict__ boundaries, int cells,
                  unsigned char* __restrict__ codes, long long count) {
  __shared__ float cuts[255];
  share_boundaries<false>(boundaries, cells, cuts);
  const bool wide_loads = is_aligned(flat, 16), wide_stores = is_aligned(codes, 8);
  for (long long first = first_thread() * GROUP; first < count; first += thread_count() * GROUP) {
    const int length = group_length(first, count);
    Value values[GROUP];
    if (length == GROUP) {
      load_eight(flat + first, wide_loads, values);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; ++i) values[i] = i < length ? flat[first + i] : (Value)0;
    }
    unsigned long long group = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) group |= (unsigned long long)cell_of<false>(values[i], cuts, cells) << 8 * i;
    store_group<8>(codes + first, wide_stores, length, group);
  }
}
