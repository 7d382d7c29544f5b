// Statistics of blocks of weights: absolute maxima, or minima and maxima together with zero.
//
// Maxima are of the bits of numbers without sign, which are ordered as the numbers are, with NaN above all: the order of
// the threads does not matter, and NaN is never lost. A team of 1 to 32 lanes of a warp takes a part of a block. Where
// blocks are longer than parts, results meet in global memory, which the host has set to zero.

template <class Bits> __device__ __forceinline__ Bits larger(Bits a, Bits b) { return a > b ? a : b; }

template <class Value> struct Keys;

template <> struct Keys<float> {
  static constexpr unsigned SIGN = 0x80000000u, NOT_A_NUMBER = 0x7fc00000u;
  static __device__ __forceinline__ unsigned bits(float x) { return __float_as_uint(x); }
};

template <> struct Keys<double> {
  static constexpr unsigned long long SIGN = 0x8000000000000000ull, NOT_A_NUMBER = 0x7ff8000000000000ull;
  static __device__ __forceinline__ unsigned long long bits(double x) {
    return (unsigned long long)__double_as_longlong(x);
  }
};

// What a team has seen. `low` keeps the sign, so that zero is below all keys and a maximum is the least number.
template <class Wide, bool extremes> struct Seen {
  using Bits = typename Arithmetic<Wide>::bits;
  Bits low = 0, high = 0;

  __device__ __forceinline__ void add(Wide x) {
    using K = Keys<Wide>;
    if constexpr (!extremes) {
      high = larger(high, K::bits(x) & ~K::SIGN);
    } else if (x != x) {
      high = larger(high, K::NOT_A_NUMBER), low = larger(low, K::NOT_A_NUMBER | K::SIGN);
    } else if (x > 0) {
      high = larger(high, K::bits(x));
    } else if (x < 0) {
      low = larger(low, K::bits(x));
    }
  }

  __device__ __forceinline__ void meet(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      high = larger(high, __shfl_xor_sync(0xffffffffu, high, distance));
      if constexpr (extremes) low = larger(low, __shfl_xor_sync(0xffffffffu, low, distance));
    }
  }
};

template <class Bits> __device__ __forceinline__ void put(Bits* to, Bits key, bool shared) {
  if (shared) atomicMax(to, key);
  else *to = key;
}

// All lanes of a warp make the same number of turns: shuffles need every lane.
template <class Value, bool extremes>
__global__ void __launch_bounds__(256)
    block_statistics(const Value* __restrict__ flat, typename Arithmetic<Value>::bits* __restrict__ low,
                     typename Arithmetic<Value>::bits* __restrict__ high, long long count, long long block_size,
                     long long part_size, int lanes) {
  using Wide = typename Arithmetic<Value>::type;
  constexpr int at_once = 16 / sizeof(Value);
  const bool aligned = is_aligned(flat, 16) && (part_size % at_once == 0) && (block_size % at_once == 0);
  const long long parts_per_block = (block_size + part_size - 1) / part_size;
  const long long parts = (count + block_size - 1) / block_size * parts_per_block;
  const int lane = threadIdx.x % lanes, teams_per_warp = 32 / lanes;
  for (long long turn = first_thread() / 32 * teams_per_warp; turn < parts; turn += thread_count() / lanes) {
    const long long part = turn + threadIdx.x % 32 / lanes, block = part / parts_per_block;
    const long long begin = block * block_size + part % parts_per_block * part_size;
    const long long stop = block < (count - 1) / block_size ? (block + 1) * block_size : count;
    const long long end = part >= parts ? begin : begin + part_size < stop ? begin + part_size : stop;
    Seen<Wide, extremes> seen;
    long long rest = begin;
    if (aligned && end > begin) {
      rest = end - (end - begin) % at_once;
      for (long long i = begin + lane * at_once; i < rest; i += lanes * at_once) {
        Wide values[at_once];
        spread(*reinterpret_cast<const uint4*>(flat + i), flat, values);
#pragma unroll
        for (int k = 0; k < at_once; ++k) seen.add(values[k]);
      }
    }
    for (long long i = rest + lane; i < end; i += lanes) seen.add(widen(flat[i]));
    seen.meet(lanes);
    if (lane != 0 || part >= parts) continue;
    put(high + block, seen.high, parts_per_block > 1);
    if constexpr (extremes) put(low + block, seen.low, parts_per_block > 1);
  }
}
