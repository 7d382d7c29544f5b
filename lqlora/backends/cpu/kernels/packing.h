// Packing of codes. Eight codes fill `bits` whole bytes for every number of bits, so they are joined in one word of 64
// bits.
//
// The codes of eight bytes are joined in three steps of shifts and masks. After the first step each lane of 16 bits
// holds two codes without a gap (2 * bits bits), after the second each lane of 32 bits holds four, and after the third
// all eight are joined. Unpacking runs the steps backwards.
#pragma once

#include "numbers.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The order of codes within words is that of little-endian machines."
#endif

namespace {

constexpr uint64_t kLow8 = 0x00ff00ff00ff00ffu, kLow16 = 0x0000ffff0000ffffu, kLow32 = 0xffffffffu;

uint64_t join(uint64_t codes, int bits) {
    codes = (codes & kLow8) | (codes >> 8 & kLow8) << bits;
    codes = (codes & kLow16) | (codes >> 16 & kLow16) << 2 * bits;
    return (codes & kLow32) | codes >> 32 << 4 * bits;
}

uint64_t part(uint64_t packed, int bits) {
    const uint64_t four = (uint64_t(1) << 4 * bits) - 1, two = kLow32 & ((uint64_t(1) << 2 * bits) - 1);
    const uint64_t two_lanes = two | two << 32, one = (uint64_t(1) << bits) - 1;
    const uint64_t lanes = one | one << 16 | one << 32 | one << 48;
    packed = (packed & four) | (packed >> 4 * bits & four) << 32;
    packed = (packed & two_lanes) | (packed >> 2 * bits & two_lanes) << 16;
    return (packed & lanes) | (packed >> bits & lanes) << 8;
}

void pack_stripe(const uint8_t* codes, int bits, int64_t count, uint8_t* packed) {
    if (bits == 8) {
        std::memcpy(packed, codes, static_cast<size_t>(count));
        return;
    }
    int64_t i = 0;
#if defined(__AVX2__)
    if (bits == 4) {
        for (; i + 32 <= count; i += 32) {
            const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
            const __m256i pairs = _mm256_maddubs_epi16(own, _mm256_set1_epi16(0x1001));  // first + 16 * second
            const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
        }
    }
#endif
    uint64_t words[kStripe / 8];
    const int64_t whole = (count - i) / 8, stop = (count * bits + 7) / 8;
    std::memcpy(words, codes + i, static_cast<size_t>(whole) * 8);
    for (int64_t k = 0; k < whole; ++k) words[k] = join(words[k], bits);
    uint8_t* to = packed + i / 8 * bits;
    int64_t k = 0;
    // A store of eight bytes also writes zeros beyond the word's own bytes, which the next store overwrites.
    for (; k < whole && i / 8 * bits + k * bits + 8 <= stop; ++k) std::memcpy(to + k * bits, words + k, 8);
    for (; k < whole; ++k) std::memcpy(to + k * bits, words + k, static_cast<size_t>(bits));
    const int64_t rest = count - i - 8 * whole;
    if (rest) {
        uint64_t word = 0;
        std::memcpy(&word, codes + i + 8 * whole, static_cast<size_t>(rest));
        word = join(word, bits);
        std::memcpy(to + whole * bits, &word, static_cast<size_t>((rest * bits + 7) / 8));
    }
}

// Unpacks codes of fewer than eight bits. Words of eight bytes are read whole as long as they end before `stop`, the
// end of all packed bytes; the last words are read byte by byte, so that nothing beyond the array is touched.
void unpack_stripe(const uint8_t* packed, const uint8_t* stop, int bits, int64_t count, uint8_t* codes) {
    int64_t i = 0;
#if defined(__AVX2__)
    if (bits == 4) {
        const __m128i low = _mm_set1_epi8(15);
        for (; i + 32 <= count; i += 32) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
            const __m128i even = _mm_and_si128(bytes, low), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm_unpacklo_epi8(even, odd));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i + 16), _mm_unpackhi_epi8(even, odd));
        }
    }
#endif
    const uint8_t* from = packed + i / 8 * bits;
    uint64_t words[kStripe / 8] = {};
    const int64_t whole = (count - i) / 8, rest = count - i - 8 * whole;
    int64_t k = 0;
    for (; k < whole && from + k * bits + 8 <= stop; ++k) std::memcpy(words + k, from + k * bits, 8);
    for (; k < whole; ++k) std::memcpy(words + k, from + k * bits, static_cast<size_t>(bits));
    for (k = 0; k < whole; ++k) words[k] = part(words[k], bits);
    std::memcpy(codes + i, words, static_cast<size_t>(whole) * 8);
    if (rest) {
        uint64_t word = 0;
        std::memcpy(&word, from + whole * bits, static_cast<size_t>((rest * bits + 7) / 8));
        word = part(word, bits);
        std::memcpy(codes + i + 8 * whole, &word, static_cast<size_t>(rest));
    }
}

void pack(const uint8_t* codes, int32_t bits, int64_t first, int64_t last, uint8_t* packed) {
    for (int64_t i = first; i < last; i += kStripe)
        pack_stripe(codes + i, bits, least(kStripe, last - i), packed + i / 8 * bits);
}

void unpack(const uint8_t* packed, int32_t bits, int64_t count, int64_t first, int64_t last, uint8_t* codes) {
    const uint8_t* stop = packed + (count * bits + 7) / 8;
    for (int64_t i = first; i < last; i += kStripe)
        unpack_stripe(packed + i / 8 * bits, stop, bits, least(kStripe, last - i), codes + i);
}

}  // namespace
