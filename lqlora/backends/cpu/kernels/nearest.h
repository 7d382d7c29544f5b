// The code of the nearest level, which is the number of boundaries strictly below a value. NaN compares above no
// boundary, so that its code is zero.
#pragma once

#include "numbers.h"
#include "tables.h"

#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Up to this many boundaries, counting those below a value is fastest.
constexpr int kFew = 15;

template <typename Real>
struct Boundaries {
    int count;       // those of the codebook
    int bits;        // the table has 2**bits - 1 entries
    Real table[256]; // ascending; infinite beyond those of the codebook, so that no value is above them
    Real tree[256];  // the same in the order of a binary search (Eytzinger layout): step d reads entries 2**d to 2**(d + 1)

    Boundaries(const float* given, int given_count) : count(given_count), bits(1), tree{} {
        while ((1 << bits) - 1 < count) ++bits;
        for (int i = 0; i < 256; ++i)
            table[i] = i < count ? static_cast<Real>(given[i]) : std::numeric_limits<Real>::infinity();
        plant(table, bits, tree);
    }

    // After `done` steps the search has found the top `done` bits j of the code. It then compares with the boundary in
    // the middle of the codes that begin with j. These boundaries lie side by side in the tree, so that one register
    // holds them.
    static void plant(const Real* table, int bits, Real* tree) {
        for (int done = 0; done < bits; ++done)
            for (int j = 0; j < 1 << done; ++j) tree[(1 << done) + j] = table[(2 * j + 1) * (1 << (bits - done - 1)) - 1];
    }
};

template <typename Real>
void count_below(const Real* values, int64_t count, const Boundaries<Real>& boundaries, uint8_t* codes) {
    std::memset(codes, 0, static_cast<size_t>(count));
    for (int j = 0; j < boundaries.count; ++j) {
        const Real boundary = boundaries.table[j];
        for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] + (values[i] > boundary));
    }
}

template <typename Real>
void search_below(const Real* values, int64_t count, const Boundaries<Real>& boundaries, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        int code = 0;
        for (int step = 1 << (boundaries.bits - 1); step; step >>= 1)
            code += values[i] > boundaries.table[code + step - 1] ? step : 0;
        codes[i] = static_cast<uint8_t>(code);
    }
}

void nearest(const double* values, int64_t count, const Boundaries<double>& boundaries, uint8_t* codes) {
    (boundaries.count <= kFew ? count_below<double> : search_below<double>)(values, count, boundaries, codes);
}

#if defined(__AVX512F__)
// The steps of a binary search, from the step among `kSize` boundaries to the last one. Several registers take turns,
// so that the latency of one lookup is hidden behind the others.
template <int kSize, int kBits, int kRegisters>
void take_steps(const __m512* values, const float* tree, __m512i* found) {
    for (int k = 0; k < kRegisters; ++k) {
        if constexpr (kSize == 1) {
            const __mmask16 is_above = _mm512_cmp_ps_mask(values[k], _mm512_set1_ps(tree[1]), _CMP_GT_OQ);
            found[k] = _mm512_maskz_set1_epi32(is_above, 1);
        } else {
            const __mmask16 is_above = _mm512_cmp_ps_mask(values[k], entries<kSize>(tree + kSize, found[k]), _CMP_GT_OQ);
            const __m512i twice = _mm512_add_epi32(found[k], found[k]);
            found[k] = _mm512_mask_sub_epi32(twice, is_above, twice, _mm512_set1_epi32(-1));
        }
    }
    if constexpr (2 * kSize < 1 << kBits) take_steps<2 * kSize, kBits, kRegisters>(values, tree, found);
}

// Finds the codes of one to `16 * kRegisters` values, and writes no byte beyond them. Whole registers are stored
// without a mask, because a load cannot be forwarded from a masked store: it would wait for the cache.
template <int kBits, int kRegisters>
void nearest_at_once(const float* values, int64_t count, const float* tree, uint8_t* codes) {
    __m512 own[kRegisters];
    __m512i found[kRegisters];
    const uint64_t all = ~uint64_t(0) >> (64 - count);
    for (int k = 0; k < kRegisters; ++k)
        own[k] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(all >> 16 * k), values + 16 * k);
    take_steps<1, kBits, kRegisters>(own, tree, found);
    for (int k = 0; k < kRegisters; ++k) {
        const __mmask16 given = static_cast<__mmask16>(all >> 16 * k);
        const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, found[k]);
        if (given == 0xffff) _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16 * k), bytes);
        else _mm_mask_storeu_epi8(codes + 16 * k, given, bytes);
    }
}

template <int kBits>
int64_t nearest_in_tree(const float* values, int64_t count, const float* tree, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) nearest_at_once<kBits, 4>(values + i, 64, tree, codes + i);
    for (; i < count; i += 32) nearest_at_once<kBits, 2>(values + i, least(32, count - i), tree, codes + i);
    return count;
}
#elif defined(__AVX2__)
__m256i above(__m256 values, __m256 boundary) {
    return _mm256_castps_si256(_mm256_cmp_ps(values, boundary, _CMP_GT_OQ));  // -1 where it is
}

// Narrows the counts in four registers to bytes. Packing works within halves of 128 bits, so the bytes are reordered
// last.
__m256i as_bytes(const __m256i counts[4]) {
    const __m256i words = _mm256_packs_epi32(counts[0], counts[1]), others = _mm256_packs_epi32(counts[2], counts[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, others), order);
}

// A binary search for 32 values at once. A step among up to 16 boundaries looks them up in registers, a later one in
// memory.
template <int kBits>
void nearest_32(const float* values, const float* tree, uint8_t* codes) {
    __m256 own[4];
    __m256i found[4];
    for (int k = 0; k < 4; ++k) {
        own[k] = _mm256_loadu_ps(values + 8 * k);
        found[k] = _mm256_sub_epi32(_mm256_setzero_si256(), above(own[k], _mm256_broadcast_ss(tree + 1)));
    }
    for (int done = 1; done < kBits; ++done) {
        const float* step = tree + (1 << done);
        for (int k = 0; k < 4; ++k) {
            __m256 boundary;
            if (done <= 3) {
                boundary = _mm256_permutevar8x32_ps(_mm256_loadu_ps(step), found[k]);
            } else if (done == 4) {
                const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(step), found[k]);
                const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(step + 8), found[k]);
                boundary = _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(found[k], 28)));
            } else {
                boundary = _mm256_i32gather_ps(step, found[k], 4);
            }
            found[k] = _mm256_sub_epi32(_mm256_add_epi32(found[k], found[k]), above(own[k], boundary));
        }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), as_bytes(found));
}

template <int kBits>
int64_t nearest_in_tree(const float* values, int64_t count, const float* tree, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) nearest_32<kBits>(values + i, tree, codes + i);
    return i;
}
#endif

void nearest(const float* values, int64_t count, const Boundaries<float>& boundaries, uint8_t* codes) {
    int64_t i = 0;
#if defined(__AVX2__)
    using Searching = int64_t (*)(const float*, int64_t, const float*, uint8_t*);
    constexpr Searching by_bits[] = {nearest_in_tree<1>, nearest_in_tree<2>, nearest_in_tree<3>, nearest_in_tree<4>,
                                     nearest_in_tree<5>, nearest_in_tree<6>, nearest_in_tree<7>, nearest_in_tree<8>};
    i = by_bits[boundaries.bits - 1](values, count, boundaries.tree, codes);
#endif
    (boundaries.count <= kFew && count - i > 8 ? count_below<float> : search_below<float>)(values + i, count - i,
                                                                                            boundaries, codes + i);
}

}  // namespace
