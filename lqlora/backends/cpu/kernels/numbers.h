// Numbers as bits, and conversions of float16 and bfloat16.
#pragma once

#include "kernels.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Weights of a stripe. Their floats (8 KiB) and codes (2 KiB) stay in the first-level cache, as doubles too (16 KiB). A
// multiple of eight, so that the codes of every stripe begin with a whole byte, whatever their number of bits.
constexpr int64_t kStripe = 2048;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename To, typename From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// --- Numbers of 16 bits

float from_half(uint16_t half) {
    // Shifted by 13 bits, the fields lie where float32 has them, but the exponent's bias is 15 and not 127. The product
    // with 2**(127 - 15) corrects the bias, and normalizes subnormal numbers as well.
    const uint32_t magnitude = half & 0x7fffu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return bits_as<float>(scaled | special | sign);
}

uint16_t to_half(float value) {
    const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    // Below the smallest normal half, adding one half aligns the last bit of the sum with that of the subnormal.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    // Otherwise subtract 112 from the exponent, and add half a unit of the last bit that stays, minus one where that
    // bit is even: the carry rounds to nearest, ties to even.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t quiet = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    const uint32_t rounded = magnitude > 0x7f800000u ? quiet : magnitude >= 0x47800000u ? 0x7c00u : finite;
    return static_cast<uint16_t>(rounded | sign);
}

float from_bfloat16(uint16_t value) { return bits_as<float>(static_cast<uint32_t>(value) << 16); }

uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16 & 0x8000u) | 0x7fc0u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

void widen(const uint16_t* values, int32_t dtype, int64_t count, float* wide) {
    if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) wide[i] = from_bfloat16(values[i]);
        return;
    }
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
        _mm512_storeu_ps(wide + i, _mm512_maskz_cvtph_ps(0xffff, halves));
    }
#endif
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
        _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < count; ++i) wide[i] = from_half(values[i]);
}

void narrow(const float* values, int32_t dtype, int64_t count, uint16_t* stored) {
    if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) stored[i] = to_bfloat16(values[i]);
        return;
    }
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(stored + i), halves);
    }
#endif
    for (; i < count; ++i) stored[i] = to_half(values[i]);
}

}  // namespace
