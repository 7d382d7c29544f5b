// The values of packed codes.
#pragma once

#include "packing.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Whether codes of four bits or fewer are looked up without unpacking them first.
#if defined(__AVX2__)
constexpr bool kLooksUpPacked = true;
#else
constexpr bool kLooksUpPacked = false;
#endif

// Results of so many numbers leave the caches before anybody looks at them. One thread streams them into memory, which is
// not read for that before. Two threads are faster without: what one of them streams is all that memory takes.
constexpr int64_t kBeyondCaches = int64_t{1} << 23;

// Looks codes up in a table of 16 entries or fewer, already multiplied by the scale.
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

void decode_run(const uint8_t* codes, const float* levels, bool is_few, float zero, float scale, int64_t count,
                float* values) {
    if (is_few && count >= 16) {
        float table[16];
        for (int j = 0; j < 16; ++j) table[j] = (levels[j] - zero) * scale;
        look_up_few(codes, table, count, values);
        return;
    }
    for (int64_t i = 0; i < count; ++i) values[i] = (levels[codes[i]] - zero) * scale;
}

// Decodes runs of one scale straight from packed codes of four bits or fewer: eight of them lie in one word. Returns how
// many weights that was; words are read whole, so a few at the end of the codes are left over.
int64_t decode_packed_run(const uint8_t* packed, const uint8_t* end, int bits, const float* levels, float zero, float scale,
                          int64_t count, bool streams, float* values) {
    int64_t i = 0;
#if defined(__AVX2__)
    float table[16];
    for (int j = 0; j < 16; ++j) table[j] = (levels[j] - zero) * scale;
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    const __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    for (; i + 8 <= count && packed + 4 <= end; i += 8, packed += bits) {
        int32_t word;
        std::memcpy(&word, packed, 4);
        const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), mask);
        __m256 found = _mm256_permutevar8x32_ps(low, codes);
        if (bits == 4) {
            const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
            found = _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, codes), is_high);
        }
        if (streams) _mm256_stream_ps(values + i, found);
        else _mm256_storeu_ps(values + i, found);
    }
#else
    (void)packed, (void)end, (void)bits, (void)levels, (void)zero, (void)scale, (void)count, (void)streams, (void)values;
#endif
    return i;
}

// A stripe, block by block. Codes are unpacked where they cannot be looked up as they are.
void decode_stripe(const Decoding& decoding, const uint8_t* end, const float* levels, int64_t first, int64_t last,
                   bool streams, float* values) {
    const uint8_t *zeros = decoding.zero_points, *packed = decoding.packed + first / 8 * decoding.bits;
    uint8_t codes[kStripe];
    const bool as_packed = kLooksUpPacked && decoding.bits <= 4 && decoding.block % 8 == 0;
    if (!as_packed) unpack_stripe(packed, end, decoding.bits, last - first, codes);
    if (decoding.block == 1) {
        for (int64_t i = first; i < last; ++i) {
            const float zero = zeros ? static_cast<float>(zeros[i]) : 0.0f;
            values[i - first] = (levels[codes[i - first]] - zero) * decoding.scales[i];
        }
        return;
    }
    int64_t block = first / decoding.block;
    for (int64_t at = first; at < last; ++block) {
        const int64_t stop = least((block + 1) * decoding.block, last), begin = at - first;
        const float zero = zeros ? static_cast<float>(zeros[block]) : 0.0f, scale = decoding.scales[block];
        int64_t done = 0;
        if (as_packed) {
            const uint8_t* own = packed + begin / 8 * decoding.bits;
            done = decode_packed_run(own, end, decoding.bits, levels, zero, scale, stop - at, streams, values + begin);
            if (done < stop - at)
                unpack_stripe(own + done / 8 * decoding.bits, end, decoding.bits, stop - at - done, codes + begin + done);
        }
        decode_run(codes + begin + done, levels, decoding.bits <= 4, zero, scale, stop - at - done, values + begin + done);
        at = stop;
    }
}

void decode(const Decoding* decoding, int64_t first, int64_t last) {
    float levels[256] = {};
    std::memcpy(levels, decoding->levels, static_cast<size_t>(decoding->level_count) * sizeof(float));
    const uint8_t* end = decoding->packed + (decoding->count * decoding->bits + 7) / 8;
    float wide[kStripe];
    const bool in_place = decoding->dtype == FLOAT32;
    const bool is_alone = last - first == decoding->count, is_aligned = reinterpret_cast<uintptr_t>(decoding->out) % 32 == 0;
    const bool streams = in_place && is_alone && is_aligned && decoding->count >= kBeyondCaches;
    for (int64_t at = first; at < last; at += kStripe) {
        const int64_t stop = least(at + kStripe, last);
        float* values = in_place ? static_cast<float*>(decoding->out) + at : wide;
        decode_stripe(*decoding, end, levels, at, stop, streams, values);
        if (!in_place) narrow(wide, decoding->dtype, stop - at, static_cast<uint16_t*>(decoding->out) + at);
    }
#if defined(__AVX2__)
    if (streams) _mm_sfence();  // before another thread is told that this one is done
#endif
}

}  // namespace
