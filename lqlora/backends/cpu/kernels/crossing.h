// Transposing copies, for matrices of which one is row-major and the other column-major. The matrix is cut into squares
// that stay in the caches, and a square into tiles of eight by eight entries that are transposed in registers.
#pragma once

#include "numbers.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Side of a square. Source and target of a square take 512 KiB together in float32, which fits into the second-level
// cache of most server cores: each line of memory is then read once and written once.
constexpr int64_t kSquare = 256;
constexpr int64_t kTile = 8;

template <typename Word>
void cross_entries(const Word* source, int64_t source_step, Word* target, int64_t target_step, int64_t rows,
                   int64_t columns) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) target[i * target_step + j] = source[j * source_step + i];
}

template <typename Word>
void cross_tile(const Word* source, int64_t source_step, Word* target, int64_t target_step) {
    cross_entries(source, source_step, target, target_step, kTile, kTile);
}

#if defined(__AVX2__)
void cross_tile(const uint32_t* source, int64_t source_step, uint32_t* target, int64_t target_step) {
    __m256 lines[8], pairs[8];
    for (int k = 0; k < 8; ++k) lines[k] = _mm256_loadu_ps(reinterpret_cast<const float*>(source + k * source_step));
    for (int k = 0; k < 8; k += 2) {
        pairs[k] = _mm256_unpacklo_ps(lines[k], lines[k + 1]);
        pairs[k + 1] = _mm256_unpackhi_ps(lines[k], lines[k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
        lines[k] = _mm256_shuffle_ps(pairs[k], pairs[k + 2], 0x44);
        lines[k + 1] = _mm256_shuffle_ps(pairs[k], pairs[k + 2], 0xee);
        lines[k + 2] = _mm256_shuffle_ps(pairs[k + 1], pairs[k + 3], 0x44);
        lines[k + 3] = _mm256_shuffle_ps(pairs[k + 1], pairs[k + 3], 0xee);
    }
    for (int k = 0; k < 4; ++k) {
        float *first = reinterpret_cast<float*>(target + k * target_step), *second = first + 4 * target_step;
        _mm256_storeu_ps(first, _mm256_permute2f128_ps(lines[k], lines[4 + k], 0x20));
        _mm256_storeu_ps(second, _mm256_permute2f128_ps(lines[k], lines[4 + k], 0x31));
    }
}
#endif

#if defined(__SSE2__)
void cross_tile(const uint16_t* source, int64_t source_step, uint16_t* target, int64_t target_step) {
    __m128i lines[8], joined[8];
    for (int k = 0; k < 8; ++k) lines[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k * source_step));
    // Interleave lines pairwise in three steps, as a butterfly: after step s, a register holds 2**s lines side by side.
    for (int k = 0; k < 4; ++k) {  // two lines
        joined[k] = _mm_unpacklo_epi16(lines[2 * k], lines[2 * k + 1]);
        joined[4 + k] = _mm_unpackhi_epi16(lines[2 * k], lines[2 * k + 1]);
    }
    for (int k = 0; k < 4; ++k) {  // four lines
        lines[2 * k] = _mm_unpacklo_epi32(joined[2 * k], joined[2 * k + 1]);
        lines[2 * k + 1] = _mm_unpackhi_epi32(joined[2 * k], joined[2 * k + 1]);
    }
    for (int k = 0; k < 4; ++k) {  // all eight lines
        const int own = k / 2 * 4 + k % 2;
        __m128i* first = reinterpret_cast<__m128i*>(target + 2 * k * target_step);
        __m128i* second = reinterpret_cast<__m128i*>(target + (2 * k + 1) * target_step);
        _mm_storeu_si128(first, _mm_unpacklo_epi64(lines[own], lines[own + 2]));
        _mm_storeu_si128(second, _mm_unpackhi_epi64(lines[own], lines[own + 2]));
    }
}
#endif

template <typename Word>
void cross_square(const Word* source, int64_t source_step, Word* target, int64_t target_step, int64_t rows,
                  int64_t columns) {
    for (int64_t i = 0; i < rows; i += kTile) {
        for (int64_t j = 0; j < columns; j += kTile) {
            const Word* from = source + j * source_step + i;
            Word* to = target + i * target_step + j;
            const int64_t high = least(kTile, rows - i), wide = least(kTile, columns - j);
            if (high == kTile && wide == kTile) cross_tile(from, source_step, to, target_step);
            else cross_entries(from, source_step, to, target_step, high, wide);
        }
    }
}

template <typename Word>
void cross_words(const Crossing& crossing, int64_t first, int64_t last) {
    const Word* source = static_cast<const Word*>(crossing.source);
    Word* target = static_cast<Word*>(crossing.target);
    for (int64_t i = first; i < last; i += kSquare)
        for (int64_t j = 0; j < crossing.columns; j += kSquare)
            cross_square(source + j * crossing.source_step + i, crossing.source_step, target + i * crossing.target_step + j,
                         crossing.target_step, least(kSquare, last - i), least(kSquare, crossing.columns - j));
}

void cross(const Crossing* crossing, int64_t first, int64_t last) {
    if (crossing->width == 2) cross_words<uint16_t>(*crossing, first, last);
    else if (crossing->width == 4) cross_words<uint32_t>(*crossing, first, last);
    else cross_words<uint64_t>(*crossing, first, last);
}

}  // namespace
