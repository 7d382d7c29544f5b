// Lookups of codes in tables that are held in registers.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Looks up codes in a table of 16 entries. A permutation of AVX2 reads three bits of an index; the fourth bit, shifted
// into the sign, selects between the two halves of the table.
void look_up_few(const uint8_t* codes, const float table[16], int64_t count, float* values) {
    int64_t i = 0;
#if defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    for (; i + 8 <= count; i += 8) {
        const __m256i own = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(own, 28));
        const __m256 first = _mm256_permutevar8x32_ps(low, own), second = _mm256_permutevar8x32_ps(high, own);
        _mm256_storeu_ps(values + i, _mm256_blendv_ps(first, second, is_high));
    }
#endif
    for (; i < count; ++i) values[i] = table[codes[i]];
}

#if defined(__AVX512F__)
// Looks up indices in a table of up to 256 entries, as far as possible in registers. At least sixteen entries are read,
// also of a smaller table. Only the low bits of an index count.
template <int kSize>
__m512 entries(const float* table, __m512i index) {
    if constexpr (kSize <= 16) {
        // With a mask of ones: without one, the header of GCC 12 reads a variable that nobody set, and warns of it.
        return _mm512_maskz_permutexvar_ps(0xffff, index, _mm512_loadu_ps(table));
    } else if constexpr (kSize == 32) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
    } else {
        const __mmask16 is_high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(kSize / 2));
        const __m512 low = entries<kSize / 2>(table, index), high = entries<kSize / 2>(table + kSize / 2, index);
        return _mm512_mask_mov_ps(low, is_high, high);
    }
}
#endif

}  // namespace
