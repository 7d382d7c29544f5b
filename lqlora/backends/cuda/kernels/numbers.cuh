// Conversions between the dtypes in memory and the dtypes of the arithmetic, and loads and stores of eight numbers. No
// header of CUDA is needed: integer arithmetic converts bfloat16, and gives the same bits on every architecture and on
// the CPU.

struct Float16 { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

template <class Value> struct Arithmetic { using type = float; using bits = unsigned; };
template <> struct Arithmetic<double> { using type = double; using bits = unsigned long long; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// A device converts float16 by an instruction, which keeps subnormal numbers.
#ifdef __CUDA_ARCH__

__device__ __forceinline__ float widen(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

#else

__device__ __forceinline__ float widen(Float16 x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return __uint_as_float(sign | 0x7f800000u | magnitude);  // infinite or NaN
  const float rebiased = __uint_as_float(magnitude) * 0x1p112f;                          // exact, small numbers too
  return __uint_as_float(sign | __float_as_uint(rebiased));
}

#endif

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }

__device__ __forceinline__ void narrow(float x, BFloat16& out) {
  const unsigned bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = (unsigned short)(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#ifdef __CUDA_ARCH__

__device__ __forceinline__ void narrow(float x, Float16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}

#else

__device__ __forceinline__ void narrow(float x, Float16& out) {
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // 65520 and above
  else if (magnitude >= 0x38800000u) half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  else half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;  // the sum rounds at 2**-24
  out.bits = (unsigned short)(bits >> 16 & 0x8000u | half);
}

#endif

__device__ __forceinline__ bool is_aligned(const void* pointer, unsigned bytes) {
  return ((unsigned long long)pointer & (bytes - 1u)) == 0;
}

// Converts the numbers in sixteen bytes.
__device__ __forceinline__ void spread(uint4 raw, const float*, float* to) {
  to[0] = __uint_as_float(raw.x), to[1] = __uint_as_float(raw.y);
  to[2] = __uint_as_float(raw.z), to[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ void spread(uint4 raw, const double*, double* to) {
  to[0] = __longlong_as_double((long long)((unsigned long long)raw.y << 32 | raw.x));
  to[1] = __longlong_as_double((long long)((unsigned long long)raw.w << 32 | raw.z));
}

template <class Half> __device__ __forceinline__ void spread(uint4 raw, const Half*, float* to) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = widen(Half{(unsigned short)(words[i / 2] >> 16 * (i % 2))});
}

// Loads eight numbers that begin at `from`, sixteen bytes at a time if it is aligned.
template <class Value>
__device__ __forceinline__ void load_eight(const Value* from, bool aligned, typename Arithmetic<Value>::type (&to)[8]) {
  constexpr int at_once = 16 / sizeof(Value);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 8; i += at_once) spread(*reinterpret_cast<const uint4*>(from + i), from, to + i);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = widen(from[i]);
  }
}

__device__ __forceinline__ void store_aligned(float* to, const float (&from)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    *reinterpret_cast<float4*>(to + i) = float4{from[i], from[i + 1], from[i + 2], from[i + 3]};
}

template <class Half> __device__ __forceinline__ void store_aligned(Half* to, const float (&from)[8]) {
  Half halves[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) narrow(from[i], halves[i]);
  *reinterpret_cast<uint4*>(to) =
      uint4{halves[0].bits | (unsigned)halves[1].bits << 16, halves[2].bits | (unsigned)halves[3].bits << 16,
            halves[4].bits | (unsigned)halves[5].bits << 16, halves[6].bits | (unsigned)halves[7].bits << 16};
}

// Stores the first `count` of eight numbers, sixteen bytes at a time if `to` is aligned.
template <class Value>
__device__ __forceinline__ void store_eight(Value* to, bool aligned, int count, const float (&from)[8]) {
  if (aligned && count == 8) return store_aligned(to, from);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) narrow(from[i], to[i]);
}
