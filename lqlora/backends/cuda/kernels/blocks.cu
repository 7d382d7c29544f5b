// Statistics of blocks of weights: absolute maxima, or minima and maxima together with zero.
//
// The kernel takes maxima of the bits of numbers as integers. Bits are ordered as the numbers are, with NaN beyond
// infinity: the result does not depend on the order of the threads, and a NaN is never lost. A team of 1 to 32 lanes of
// a warp reduces one part of a block. A block of several parts is merged by atomic maxima in global memory, which the
// host has set to zero.

template <class Bits> __device__ __forceinline__ Bits larger(Bits a, Bits b) { return a > b ? a : b; }

template <class Half> constexpr unsigned infinite = 0;
template <> constexpr unsigned infinite<Float16> = 0x7c00u;
template <> constexpr unsigned infinite<BFloat16> = 0x7f80u;

// Integer keys of numbers, as wide as the results. A 16-bit number is the upper half of its key, and is widened to
// float32 only at the end, once per block.
template <class Value> struct Keys {
  using Bits = unsigned;
  using Signed = int;
  static constexpr Bits SIGN = 0x80000000u, INFINITE = infinite<Value> << 16;
  static constexpr int at_once = 8;
  static __device__ __forceinline__ Bits of(Value x) { return (Bits)x.bits << 16; }
  static __device__ __forceinline__ void spread(uint4 raw, Bits (&to)[at_once]) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = words[i] << 16, to[2 * i + 1] = words[i] & 0xffff0000u;
  }
  static __device__ __forceinline__ Bits result(Bits key) {
    return __float_as_uint(widen(Value{(unsigned short)(key >> 16 & 0x7fffu)})) | (key & SIGN);  // NaN keeps its sign
  }
};

template <> struct Keys<float> {
  using Bits = unsigned;
  using Signed = int;
  static constexpr Bits SIGN = 0x80000000u, INFINITE = 0x7f800000u;
  static constexpr int at_once = 4;
  static __device__ __forceinline__ Bits of(float x) { return __float_as_uint(x); }
  static __device__ __forceinline__ void spread(uint4 raw, Bits (&to)[at_once]) {
    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
  }
  static __device__ __forceinline__ Bits result(Bits key) { return key; }
};

template <> struct Keys<double> {
  using Bits = unsigned long long;
  using Signed = long long;
  static constexpr Bits SIGN = 0x8000000000000000ull, INFINITE = 0x7ff0000000000000ull;
  static constexpr int at_once = 2;
  static __device__ __forceinline__ Bits of(double x) { return (Bits)__double_as_longlong(x); }
  static __device__ __forceinline__ void spread(uint4 raw, Bits (&to)[at_once]) {
    to[0] = (Bits)raw.y << 32 | raw.x, to[1] = (Bits)raw.w << 32 | raw.z;
  }
  static __device__ __forceinline__ Bits result(Bits key) { return key; }
};

// Extremes that a team has seen so far; they start at zero. As signed integers, the keys of positive numbers are above
// those of all negative ones, so `high` is a signed maximum. As unsigned integers, the keys of negative numbers are
// above those of all positive ones, the least number topmost, so `low` is an unsigned maximum.
template <class Value, bool extremes> struct Seen {
  using K = Keys<Value>;
  using Bits = typename K::Bits;
  using Signed = typename K::Signed;
  Bits low = 0, high = 0;

  __device__ __forceinline__ void add(Bits key) {
    if constexpr (extremes) meet(key, key);
    else high = larger(high, key & ~K::SIGN);
  }

  __device__ __forceinline__ void meet(Bits other_low, Bits other_high) {
    high = extremes ? (Bits)larger((Signed)high, (Signed)other_high) : larger(high, other_high);
    if constexpr (extremes) low = larger(low, other_low);
  }

  __device__ __forceinline__ void meet(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      meet(extremes ? __shfl_xor_sync(0xffffffffu, low, distance) : 0, __shfl_xor_sync(0xffffffffu, high, distance));
  }

  // Corrects `low` where the block has no negative number: it is then the key of a positive number or of -0, and
  // becomes +0. A NaN of either sign becomes both extremes.
  __device__ __forceinline__ void finish() {
    if constexpr (extremes) {
      const bool is_nan = high > K::INFINITE || (low & ~K::SIGN) > K::INFINITE;
      if (low <= K::SIGN) low = 0;
      if (is_nan) high = ~K::SIGN, low = ~(Bits)0;
    }
  }
};

template <class Bits> __device__ __forceinline__ void put(Bits* to, Bits key, bool shared) {
  if (shared) atomicMax(to, key);
  else *to = key;
}

// Beginning and end of a part of a block. Parts from number `parts` on are empty: a last warp may have teams without
// work.
struct Part {
  long long block, begin, end;

  __device__ __forceinline__ Part(long long part, long long parts, Blocks parts_of_block, long long part_size,
                                  long long block_size, long long count) {
    const Position position = parts_of_block.size > 1 ? position_of(part, parts_of_block) : Position{part, 0};
    block = position.block;
    begin = block * block_size + position.within * part_size;
    end = smaller(smaller(begin + part_size, (block + 1) * block_size), count);
    if (part >= parts || begin > end) end = begin;
  }

  static __device__ __forceinline__ long long smaller(long long a, long long b) { return a < b ? a : b; }
};

// All lanes of a warp take the same number of turns, because a shuffle waits for every lane. The loop counts by warps,
// and a team without a part takes its turn with an empty one.
template <class Value, bool extremes>
__global__ void __launch_bounds__(256)
    block_statistics(const Value* __restrict__ flat, typename Keys<Value>::Bits* __restrict__ low,
                     typename Keys<Value>::Bits* __restrict__ high, long long count, long long block_size,
                     long long part_size, long long parts_per_block, double inverse, long long parts, int lanes) {
  using K = Keys<Value>;
  constexpr int at_once = K::at_once, batch = 4;
  const bool aligned = is_aligned(flat, 16) && (part_size % at_once == 0) && (block_size % at_once == 0);
  const int lane = threadIdx.x & (lanes - 1), team = (threadIdx.x & 31) / lanes, teams_per_warp = 32 / lanes;
  const long long step = thread_count() / lanes;
  for (long long turn = first_thread() / 32 * teams_per_warp; turn < parts; turn += step) {
    const Part part(turn + team, parts, {parts_per_block, inverse}, part_size, block_size, count);
    Seen<Value, extremes> seen;
    long long rest = part.begin;
    if (aligned) {
      rest = part.end - (part.end - part.begin) % at_once;
      long long i = part.begin + lane * at_once;
      const int stride = lanes * at_once;
      for (; i + (batch - 1) * stride < rest; i += batch * stride) {  // loads that do not wait for each other
        uint4 raw[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) raw[b] = *reinterpret_cast<const uint4*>(flat + i + b * stride);
#pragma unroll
        for (int b = 0; b < batch; ++b) {
          typename K::Bits keys[at_once];
          K::spread(raw[b], keys);
#pragma unroll
          for (int k = 0; k < at_once; ++k) seen.add(keys[k]);
        }
      }
      for (; i < rest; i += stride) {
        typename K::Bits keys[at_once];
        K::spread(*reinterpret_cast<const uint4*>(flat + i), keys);
#pragma unroll
        for (int k = 0; k < at_once; ++k) seen.add(keys[k]);
      }
    }
    for (long long i = rest + lane; i < part.end; i += lanes) seen.add(K::of(flat[i]));
    seen.meet(lanes);
    seen.finish();
    if (lane != 0 || turn + team >= parts) continue;
    put(high + part.block, K::result(seen.high), parts_per_block > 1);
    if constexpr (extremes) put(low + part.block, K::result(seen.low), parts_per_block > 1);
  }
}
