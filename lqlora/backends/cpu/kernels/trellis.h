// Decoding of trellis codes, and products with a matrix in trellis codes. The codes of a sequence are a stream of bits,
// and the state of a weight is the window of the stream that ends with its code: reading a word at the right byte and
// shifting it gives the state. Only the windows of the first weights begin in the last bytes of the stream.
#pragma once

#include "numbers.h"
#include "products.h"
#include "sequences.h"

#include <cstring>

namespace {

// Bits before a sequence that windows of its first weights begin in: one fewer than the most bits of a state, and a
// whole number of bytes.
constexpr int64_t kBefore = 16;

template <typename Word>
Word word_at(const uint8_t* bytes) {
    Word word;
    std::memcpy(&word, bytes, sizeof(Word));
    return word;
}

// A copy of a sequence's bits that begins with a byte, with its last bits before it and room to read words after it.
struct Unrolled {
    uint8_t bytes[kBefore / 8 + kSequence / 2 + 16];

    Unrolled(const uint8_t* packed, const uint8_t* end, int64_t first_bit, int64_t bits) : bytes{} {
        const uint8_t* from = packed + first_bit / 8;
        const int shift = static_cast<int>(first_bit % 8);
        uint8_t* own = bytes + kBefore / 8;
        for (int64_t i = 0; 8 * i < bits; ++i) {
            const int above = shift && from + i + 1 < end ? from[i + 1] << (8 - shift) : 0;
            own[i] = static_cast<uint8_t>(from[i] >> shift | above);
        }
        uint32_t last = 0;
        if (bits >= kBefore) {
            last = word_at<uint32_t>(own + (bits - kBefore) / 8) >> (bits - kBefore) % 8;
        } else {  // the stream goes round more than once
            for (int64_t i = 0; i < kBefore; ++i) {
                const int64_t bit = (i + bits * kBefore - kBefore) % bits;
                last |= static_cast<uint32_t>(own[bit / 8] >> bit % 8 & 1) << i;
            }
        }
        bytes[0] = static_cast<uint8_t>(last);
        bytes[1] = static_cast<uint8_t>(last >> 8);
    }
};

#if defined(__AVX2__)
// Takes the states of eight weights out of a word that begins kBefore bits before their first code.
struct Windows {
    __m256i bytes, shifts, mask;

    explicit Windows(const Trellis& trellis) {
        alignas(32) uint8_t from[32];
        alignas(32) int32_t shift[8];
        for (int lane = 0; lane < 8; ++lane) {
            const int begin = static_cast<int>(kBefore) + trellis.bits * (lane + 1) - trellis.state_bits;
            for (int k = 0; k < 4; ++k)  // 0x80 selects zero; the window is in the word
                from[4 * lane + k] = static_cast<uint8_t>(begin / 8 + k < 8 ? begin / 8 + k : 0x80);
            shift[lane] = begin % 8;
        }
        bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
        shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
        mask = _mm256_set1_epi32((1 << trellis.state_bits) - 1);
    }

    __m256i of(uint64_t word) const {
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(word)), bytes);
        return _mm256_and_si256(_mm256_srlv_epi32(spread, shifts), mask);
    }
};
#endif

// The computed code: a level is a multiple of a unit, namely the sum of the bytes of a product minus 510. Arithmetic is
// faster than a look-up among thousands of levels.
constexpr uint32_t kFactor = 34038481, kSummand = 76625530;

int multiple_of(uint32_t state) {
    const uint32_t mixed = state * kFactor + kSummand;
    return static_cast<int>((mixed & 255) + (mixed >> 8 & 255) + (mixed >> 16 & 255) + (mixed >> 24)) - 510;
}

// Returns the unit if the levels are those of the computed code, else zero.
float unit_of(const Trellis& trellis) {
    const uint32_t states = uint32_t{1} << trellis.state_bits;
    float unit = 0;
    for (uint32_t state = 0; state < states && unit == 0; ++state) {
        const int multiple = multiple_of(state), size = multiple < 0 ? -multiple : multiple;
        if (size && !(size & (size - 1))) unit = trellis.levels[state] / static_cast<float>(multiple);  // exact
    }
    for (uint32_t state = 0; state < states && unit != 0; ++state) {
        const float level = static_cast<float>(multiple_of(state)) * unit;
        if (bits_as<uint32_t>(level) != bits_as<uint32_t>(trellis.levels[state])) unit = 0;
    }
    return unit;
}

// Decoding of single sequences.
struct TrellisDecoder {
    const Trellis& trellis;
    const uint8_t *packed, *end;
    const float* scales;
    float unit;
#if defined(__AVX2__)
    Windows windows;
#endif

    // From this many weights a state on, it is worth finding out whether the levels can be computed.
    static constexpr int64_t kWorthAsking = 16;

    explicit TrellisDecoder(const TrellisDecoding& decoding, int64_t count)
        : trellis(decoding.trellis), packed(decoding.packed), end(packed + (trellis.count * trellis.bits + 7) / 8),
          scales(decoding.scales), unit(count >> trellis.state_bits >= kWorthAsking ? unit_of(trellis) : 0.0f)
#if defined(__AVX2__)
          , windows(trellis)
#endif
    {}

    void decode(const Sequence& sequence, float* values) const {
#if defined(__AVX2__)
        if (unit != 0) decode_as<true>(sequence, values);
        else decode_as<false>(sequence, values);
#else
        const Unrolled own(packed, end, sequence.at * trellis.bits, sequence.size * trellis.bits);
        const float scale = scales[sequence.scale];
        const uint32_t mask = (uint32_t{1} << trellis.state_bits) - 1;
        int64_t bit = kBefore - trellis.state_bits;
        for (int64_t i = 0; i < sequence.size; ++i) {
            bit += trellis.bits;
            values[i] = trellis.levels[word_at<uint32_t>(own.bytes + bit / 8) >> bit % 8 & mask] * scale;
        }
#endif
    }

#if defined(__AVX2__)
    template <bool kComputes>
    __m256 eight(uint64_t word, __m256 scale) const {
        const __m256i states = windows.of(word);
        if constexpr (!kComputes) return _mm256_mul_ps(_mm256_i32gather_ps(trellis.levels, states, 4), scale);
        const __m256i product = _mm256_mullo_epi32(states, _mm256_set1_epi32(static_cast<int32_t>(kFactor)));
        const __m256i mixed = _mm256_add_epi32(product, _mm256_set1_epi32(static_cast<int32_t>(kSummand)));
        const __m256i pairs = _mm256_maddubs_epi16(mixed, _mm256_set1_epi8(1));
        const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        const __m256 multiples = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(510)));
        return _mm256_mul_ps(_mm256_mul_ps(multiples, _mm256_set1_ps(unit)), scale);
    }

    template <bool kComputes>
    void decode_as(const Sequence& sequence, float* values) const {
        const int64_t bits = trellis.bits, size = sequence.size, bytes = size * bits / 8;
        const __m256 scale = _mm256_set1_ps(scales[sequence.scale]);
        const uint8_t* from = packed + sequence.at * bits / 8;
        const bool is_whole = sequence.at * bits % 8 == 0 && size % 8 == 0 && bytes >= kBefore / 8;
        if (!is_whole || end - from < bytes + 8) {
            const Unrolled own(packed, end, sequence.at * bits, size * bits);
            int64_t i = 0;
            for (; i + 8 <= size; i += 8)
                _mm256_storeu_ps(values + i, eight<kComputes>(word_at<uint64_t>(own.bytes + i / 8 * bits), scale));
            if (i == size) return;
            float last[8];
            _mm256_storeu_ps(last, eight<kComputes>(word_at<uint64_t>(own.bytes + i / 8 * bits), scale));
            std::memcpy(values + i, last, static_cast<size_t>(size - i) * sizeof(float));
            return;
        }
        // The first word continues in the last bytes; with one bit a weight, so does the second.
        const uint64_t first = word_at<uint64_t>(from) << kBefore | word_at<uint16_t>(from + bytes - kBefore / 8);
        _mm256_storeu_ps(values, eight<kComputes>(first, scale));
        int64_t i = 8;
        if (bits == 1) {
            _mm256_storeu_ps(values + 8, eight<kComputes>(first >> 8, scale));
            i = 16;
        }
        from -= kBefore / 8;
        for (; i < size; i += 8)
            _mm256_storeu_ps(values + i, eight<kComputes>(word_at<uint64_t>(from + i / 8 * bits), scale));
    }
#endif
};

void decode_trellis(const TrellisDecoding* decoding, int64_t first, int64_t last) {
    const TrellisDecoder decoder(*decoding, decoding->trellis.count);
    Walk sequence(decoding->trellis, first);
    for (; first < last; ++first, sequence.next()) {
        if (decoding->dtype == FLOAT32) {
            decoder.decode(sequence, static_cast<float*>(decoding->out) + sequence.at);
            continue;
        }
        float wide[kSequence];
        decoder.decode(sequence, wide);
        narrow(wide, decoding->dtype, sequence.size, static_cast<uint16_t*>(decoding->out) + sequence.at);
    }
}

// A row is decoded in stretches of as many whole sequences as a stripe holds.
void multiply_trellis(const TrellisProduct* product, int64_t first, int64_t last) {
    const Trellis& trellis = product->matrix.trellis;
    const TrellisDecoder decoder(product->matrix, trellis.count);
    Walk sequence(trellis, sequence_count(trellis) / product->rows * first);
    float weights[kStripe];
    for (int64_t row = first; row < last; ++row) {
        for (int64_t m = 0; m < product->x_rows; ++m) product->out[m * product->rows + row] = 0;
        for (int64_t at = 0, size = 0; at < product->columns; at += size) {
            for (size = 0; at + size < product->columns && size + sequence.size <= kStripe; sequence.next()) {
                decoder.decode(sequence, weights + size);
                size += sequence.size;
            }
            for (int64_t m = 0; m < product->x_rows; ++m)
                product->out[m * product->rows + row] += dot(weights, product->x + m * product->columns + at, size);
        }
    }
}

}  // namespace
