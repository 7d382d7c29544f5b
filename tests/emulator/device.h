// The part of CUDA C++ that kernels use, for a compiler of the host. Functions that concern several threads are in
// runtime.cpp. It is compiled separately, because the compiler inserts a call to the runtime at every memory access of
// the kernels, and the runtime must not check its own accesses.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static

struct uint3 { unsigned x, y, z; };

namespace emulated {

#pragma GCC visibility push(default)

// Position of the running thread. The scheduler changes it whenever it switches to another thread.
struct Here { uint3 thread, block, block_size, grid_size; };
extern "C" Here emulated_here;

// A launch: `kernel` calls the kernel function with `arguments`, an array of pointers to the parameters' values.
struct Launch {
  void (*kernel)(void** arguments);
  void** arguments;
  uint3 grid, block;
  unsigned schedule;
  const void* const* arrays;  // pairs of addresses: first byte, and one beyond the last
  int array_count;
  char* shared_begin;
  char* shared_end;
};

enum class Collective { shuffle, sync };

extern "C" const char* emulated_launch(const Launch*);
extern "C" void emulated_barrier(int line);
extern "C" uint64_t emulated_meet(Collective kind, unsigned mask, uint64_t value, int source, int line);
extern "C" int emulated_lane();
extern "C" void emulated_atomic(const void* address, int size);
extern "C" void emulated_vector(const void* address);

#pragma GCC visibility pop

template <class T> T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t raw = 0;
  memcpy(&raw, &value, sizeof value);
  raw = emulated_meet(Collective::shuffle, mask, raw, source, line);
  memcpy(&value, &raw, sizeof value);
  return value;
}

template <class T> struct Parameter { static constexpr char kind = std::is_floating_point_v<T> ? 'f' : 'i', size = sizeof(T); };
template <class T> struct Parameter<T*> { static constexpr char kind = 'p', size = sizeof(T); };

template <auto kernel> struct Kernel;
template <class... Arguments, void (*kernel)(Arguments...)> struct Kernel<kernel> {
  template <size_t... i>
  __attribute__((no_sanitize("thread"), noinline)) static void spread(void** arguments, std::index_sequence<i...>) {
    kernel(*static_cast<Arguments*>(arguments[i])...);
  }
  __attribute__((no_sanitize("thread"))) static void call(void** arguments) {
    spread(arguments, std::index_sequence_for<Arguments...>{});
  }
  __attribute__((no_sanitize("thread"))) static void signature(char* out) {
    ((*out++ = Parameter<std::remove_cv_t<Arguments>>::kind,
      *out++ = '0' + Parameter<std::remove_cv_t<Arguments>>::size), ...);
    *out = 0;
  }
};

}  // namespace emulated

// __shared__ variables are static, so they lie in the section of zero-initialized data (.bss). Kernels have no other
// variables that can be changed, so the section is exactly the shared memory of a block.
#ifdef EMULATED_ADDRESSES
#define EMULATED_SHARED nullptr, nullptr  // AddressSanitizer has guards there, which must not be overwritten
#define EMULATED_ATOMIC(address)          // AddressSanitizer checks the access itself
#else
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];
#define EMULATED_SHARED __bss_start, _end
#define EMULATED_ATOMIC(address) emulated::emulated_atomic(address, sizeof *(address))
#endif

#define EMULATED_HOST extern "C" __attribute__((visibility("default"), no_sanitize("thread")))
#define EMULATED_EXPORT(number, ...)                                                                                 \
  EMULATED_HOST void emulated_signature_##number(char* out) { emulated::Kernel<&__VA_ARGS__>::signature(out); }      \
  EMULATED_HOST const char* emulated_launch_##number(const unsigned* sizes, unsigned schedule, void** arguments,     \
                                                     const void* const* arrays, int array_count) {                   \
    const emulated::Launch launch{emulated::Kernel<&__VA_ARGS__>::call, arguments,                                   \
                                  {sizes[0], sizes[1], sizes[2]},       {sizes[3], sizes[4], sizes[5]},              \
                                  schedule, arrays, array_count,        EMULATED_SHARED};                            \
    return emulated::emulated_launch(&launch);                                                                       \
  }

// Vectors of sixteen bytes. The compiler splits a copy into words, whose addresses no longer show that a device needs
// sixteen-byte alignment. So the copy functions report both addresses themselves.
template <class T> struct alignas(16) EmulatedVector {
  T x, y, z, w;
  EmulatedVector() = default;
  EmulatedVector(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  EmulatedVector(const EmulatedVector& from) : x(from.x), y(from.y), z(from.z), w(from.w) {
    emulated::emulated_vector(&from);
  }
  EmulatedVector& operator=(const EmulatedVector& from) {
    emulated::emulated_vector(this);
    emulated::emulated_vector(&from);
    x = from.x, y = from.y, z = from.z, w = from.w;
    return *this;
  }
};
using uint4 = EmulatedVector<unsigned>;
using float4 = EmulatedVector<float>;

#define threadIdx (emulated::emulated_here.thread)
#define blockIdx (emulated::emulated_here.block)
#define blockDim (emulated::emulated_here.block_size)
#define gridDim (emulated::emulated_here.grid_size)

static inline void __syncthreads(int line = __builtin_LINE()) { emulated::emulated_barrier(line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulated::emulated_meet(emulated::Collective::sync, mask, 0, 0, line);
}
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulated::shuffle(mask, value, source & 31, line);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  return emulated::shuffle(mask, value, emulated::emulated_lane() ^ distance, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE()) {
  const unsigned lane = (unsigned)emulated::emulated_lane();
  return emulated::shuffle(mask, value, (int)(lane + distance > 31 ? lane : lane + distance), line);
}

template <class T>
__attribute__((no_sanitize("thread"), noinline)) static T atomicMax(T* address, T value) {
  EMULATED_ATOMIC(address);
  const T before = *address;
  if (value > before) *address = value;
  return before;
}

template <class T>
__attribute__((no_sanitize("thread"), noinline)) static T atomicAdd(T* address, T value) {
  EMULATED_ATOMIC(address);
  const T before = *address;
  *address = before + value;
  return before;
}

static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline long long __double_as_longlong(double x) { long long bits; memcpy(&bits, &x, 8); return bits; }
static inline double __longlong_as_double(long long bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
