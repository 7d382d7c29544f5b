// The widest vector register of floats, and the operations on it that code for AVX2 and AVX-512 shares.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>

namespace {

#if defined(__AVX512F__)
struct Lanes {
    using Register = __m512;
    static constexpr int kCount = 16;
    static Register all(float value) { return _mm512_set1_ps(value); }
    static Register load(const float* values) { return _mm512_loadu_ps(values); }
    static void store(float* values, Register own) { _mm512_storeu_ps(values, own); }
    static void stream(float* values, Register own) { _mm512_stream_ps(values, own); }
};
#else
struct Lanes {
    using Register = __m256;
    static constexpr int kCount = 8;
    static Register all(float value) { return _mm256_set1_ps(value); }
    static Register load(const float* values) { return _mm256_loadu_ps(values); }
    static void store(float* values, Register own) { _mm256_storeu_ps(values, own); }
    static void stream(float* values, Register own) { _mm256_stream_ps(values, own); }
};
#endif

}  // namespace
#endif
