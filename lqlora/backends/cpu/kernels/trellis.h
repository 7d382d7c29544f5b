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

// Room for the bits of a sequence, with its last bits before it, and words that may be read after it.
struct Room {
    uint8_t bytes[kBefore / 8 + kSequence / 2 + 16];
};

// Copies a sequence of `bits` bits, so that it begins with a byte and follows its own last bits.
const uint8_t* unroll(const uint8_t* packed, const uint8_t* end, int64_t first_bit, int64_t bits, Room& room) {
    const uint8_t* from = packed + first_bit / 8;
    const int shift = static_cast<int>(first_bit % 8);
    uint8_t* own = room.bytes + kBefore / 8;
    const int64_t bytes = (bits + 7) / 8;
    for (int64_t i = 0; i < bytes; ++i) {
        const int above = shift && from + i + 1 < end ? from[i + 1] << (8 - shift) : 0;
        own[i] = static_cast<uint8_t>(from[i] >> shift | above);
    }
    std::memset(own + bytes, 0, 16);
    uint32_t last = 0;
    if (bits >= kBefore) {
        last = word_at<uint32_t>(own + (bits - kBefore) / 8) >> (bits - kBefore) % 8;
    } else {  // the stream goes round more than once
        for (int64_t i = 0; i < kBefore; ++i) {
            const int64_t bit = (i + bits * kBefore - kBefore) % bits;
            last |= static_cast<uint32_t>(own[bit / 8] >> bit % 8 & 1) << i;
        }
    }
    room.bytes[0] = static_cast<uint8_t>(last);
    room.bytes[1] = static_cast<uint8_t>(last >> 8);
    return room.bytes;
}

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

#if defined(__AVX2__)
// Takes the states of eight weights out of a word that begins kBefore bits before their first code. With one bit or two
// they lie in 32 bits; with up to four, each lane first takes its bytes out of 64.
template <typename Word>
struct Windows {
    __m256i bytes, shifts, mask;

    explicit Windows(const Trellis& trellis) {
        alignas(32) uint8_t from[32];
        alignas(32) int32_t shift[8];
        for (int lane = 0; lane < 8; ++lane) {
            const int begin = static_cast<int>(kBefore) + trellis.bits * (lane + 1) - trellis.state_bits;
            for (int k = 0; k < 4; ++k)  // 0x80 selects zero: no window ends behind the word
                from[4 * lane + k] = static_cast<uint8_t>(begin / 8 + k < 8 ? begin / 8 + k : 0x80);
            shift[lane] = sizeof(Word) == 4 ? begin : begin % 8;
        }
        bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
        shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
        mask = _mm256_set1_epi32((1 << trellis.state_bits) - 1);
    }

    __m256i of(Word word) const {
        __m256i spread;
        if constexpr (sizeof(Word) == 4) spread = _mm256_set1_epi32(static_cast<int32_t>(word));
        else spread = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(word)), bytes);
        return _mm256_and_si256(_mm256_srlv_epi32(spread, shifts), mask);
    }
};

// Values of eight weights without their scale: levels, or multiples of the unit of the computed code.
template <typename OwnWord, bool kOwnComputes>
struct Eights {
    using Word = OwnWord;
    static constexpr bool kComputes = kOwnComputes;
    const float* levels;
    Windows<Word> windows;

    explicit Eights(const Trellis& trellis) : levels(trellis.levels), windows(trellis) {}

    __m256 of(Word word) const {
        const __m256i states = windows.of(word);
        if constexpr (!kComputes) return _mm256_i32gather_ps(levels, states, 4);
        const __m256i product = _mm256_mullo_epi32(states, _mm256_set1_epi32(static_cast<int32_t>(kFactor)));
        const __m256i mixed = _mm256_add_epi32(product, _mm256_set1_epi32(static_cast<int32_t>(kSummand)));
        const __m256i pairs = _mm256_maddubs_epi16(mixed, _mm256_set1_epi8(1));
        const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(510)));
    }
};
#else
template <bool kOwnComputes>
struct Singles {
    static constexpr bool kComputes = kOwnComputes;
    const float* levels;
    uint32_t mask;

    explicit Singles(const Trellis& trellis)
        : levels(trellis.levels), mask((uint32_t{1} << trellis.state_bits) - 1) {}

    float of(uint32_t window) const {
        if constexpr (kComputes) return static_cast<float>(multiple_of(window & mask));
        else return levels[window & mask];
    }
};
#endif

// A matrix in trellis codes, as functions read it.
struct TrellisSource {
    const Trellis& trellis;
    const uint8_t *packed, *end;
    const float* scales;
    float unit;  // of the computed code, or zero

    // From this many weights a state on, it is worth finding out whether the levels can be computed.
    static constexpr int64_t kWorthAsking = 16;

    explicit TrellisSource(const TrellisDecoding& decoding)
        : trellis(decoding.trellis), packed(decoding.packed), end(packed + (trellis.count * trellis.bits + 7) / 8),
          scales(decoding.scales), unit(trellis.count >> trellis.state_bits >= kWorthAsking ? unit_of(trellis) : 0.0f) {}

    const uint8_t* unrolled(const Sequence& sequence, Room& room) const {
        return unroll(packed, end, sequence.at * trellis.bits, sequence.size * trellis.bits, room);
    }

#if defined(__AVX2__)
    // The words of a sequence, one for eight weights. The first continues in the last bytes of the sequence; with one bit
    // a weight, so does the second.
    struct Words {
        const uint8_t* from;
        uint64_t first, second;
    };

    Words words_of(const Sequence& sequence, Room& room) const {
        const int64_t bits = trellis.bits, size = sequence.size, bytes = size * bits / 8;
        const uint8_t* from = packed + sequence.at * bits / 8;
        const bool is_whole = sequence.at * bits % 8 == 0 && size % 8 == 0 && bytes >= kBefore / 8;
        if (is_whole && end - from >= bytes + 8) {
            const uint64_t first = word_at<uint64_t>(from) << kBefore | word_at<uint16_t>(from + bytes - kBefore / 8);
            from -= kBefore / 8;
            return {from, first, bits == 1 ? first >> 8 : word_at<uint64_t>(from + bits)};
        }
        from = unrolled(sequence, room);
        return {from, word_at<uint64_t>(from), word_at<uint64_t>(from + bits)};
    }

#endif

    // The factor of the values of a sequence.
    template <typename Values>
    float factor_of(const Sequence& sequence) const {
        return Values::kComputes ? scales[sequence.scale] * unit : scales[sequence.scale];
    }

    // Calls `act` with the fastest way to get values.
    template <typename Act>
    void with_values(Act act) const {
#if defined(__AVX2__)
        if (trellis.bits <= 2) unit != 0 ? act(Eights<uint32_t, true>(trellis)) : act(Eights<uint32_t, false>(trellis));
        else unit != 0 ? act(Eights<uint64_t, true>(trellis)) : act(Eights<uint64_t, false>(trellis));
#else
        unit != 0 ? act(Singles<true>(trellis)) : act(Singles<false>(trellis));
#endif
    }
};

// Writes the values of a sequence. A computed level times the scale is rounded twice if `kExact`, as the values of a table
// are; else the product of unit and scale is rounded first, which takes one product less.
template <bool kExact, typename Values>
void write_values(const TrellisSource& source, const Values& known, const Sequence& sequence, float* values) {
    Room room;
    const int64_t bits = source.trellis.bits, size = sequence.size;
    const float scale = kExact ? source.scales[sequence.scale] : source.template factor_of<Values>(sequence);
#if defined(__AVX2__)
    using Word = typename Values::Word;
    const TrellisSource::Words words = source.words_of(sequence, room);
    const __m256 units = _mm256_set1_ps(source.unit), scales = _mm256_set1_ps(scale);
    const auto eight = [&](int64_t i) {
        const Word word = i > 8 ? word_at<Word>(words.from + i / 8 * bits) : static_cast<Word>(i ? words.second : words.first);
        const __m256 own = known.of(word);
        if constexpr (kExact && Values::kComputes) return _mm256_mul_ps(_mm256_mul_ps(own, units), scales);
        else return _mm256_mul_ps(own, scales);
    };
    int64_t i = 0;
    for (; i < 16 && i + 8 <= size; i += 8) _mm256_storeu_ps(values + i, eight(i));
    for (; i + 8 <= size; i += 8) _mm256_storeu_ps(values + i, eight(i));
    if (i == size) return;
    float last[8];
    _mm256_storeu_ps(last, eight(i));
    std::memcpy(values + i, last, static_cast<size_t>(size - i) * sizeof(float));
#else
    const uint8_t* own = source.unrolled(sequence, room);
    int64_t bit = kBefore - source.trellis.state_bits;
    for (int64_t i = 0; i < size; ++i) {
        bit += bits;
        float value = known.of(word_at<uint32_t>(own + bit / 8) >> bit % 8);
        if constexpr (kExact && Values::kComputes) value *= source.unit;
        values[i] = value * scale;
    }
#endif
}

void decode_trellis(const TrellisDecoding* decoding, int64_t first, int64_t last) {
    const TrellisSource source(*decoding);
    source.with_values([&](const auto& known) {
        Walk sequence(decoding->trellis, first);
        for (int64_t i = first; i < last; ++i, sequence.next()) {
            if (decoding->dtype == FLOAT32) {
                write_values<true>(source, known, sequence, static_cast<float*>(decoding->out) + sequence.at);
                continue;
            }
            float wide[kSequence];
            write_values<true>(source, known, sequence, wide);
            narrow(wide, decoding->dtype, sequence.size, static_cast<uint16_t*>(decoding->out) + sequence.at);
        }
    });
}

// --- Products. Product i of a sequence is added to sum i % kSums of the row, on every instruction set.

void add_products(const float* values, const float* x, int64_t count, float* sums) {
    float own[kSums];
    std::memcpy(own, sums, sizeof(own));
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums)
        for (int k = 0; k < kSums; ++k) own[k] += values[i + k] * x[i + k];
    for (int k = 0; i < count; ++i, ++k) own[k] += values[i] * x[i];
    std::memcpy(sums, own, sizeof(own));
}

// Multiplies a few rows of inputs, from row m on, by a row of the matrix, whose first sequence is given.
template <typename Values>
struct InCache {
    void operator()(const TrellisProduct& product, const TrellisSource& source, const Values& known, Walk& sequence,
                    int64_t m, int64_t row) const {
        float values[kStripe], sums[kAtOnce][kSums] = {};
        const int64_t rows = least(kAtOnce, product.x_rows - m);
        for (int64_t column = 0, size = 0; column < product.columns; column += size) {
            bool is_filled = true;  // the next sequence begins with sum 0
            for (size = 0; is_filled && column + size < product.columns && size + kSequence <= kStripe; sequence.next()) {
                write_values<false>(source, known, sequence, values + size);
                size += sequence.size;
                is_filled = size % kSums == 0;
            }
            for (int64_t r = 0; r < rows; ++r)
                add_products(values, product.x + (m + r) * product.columns + column, size, sums[r]);
        }
        for (int64_t r = 0; r < rows; ++r) product.out[(m + r) * product.rows + row] = halved(sums[r]);
    }

    static constexpr int64_t kAtOnce = 8;
};

#if defined(__AVX2__)
// The same for sequences of a multiple of kSums weights, whose values never leave the registers.
template <typename Values, int kRows>
struct InRegisters {
    void operator()(const TrellisProduct& product, const TrellisSource& source, const Values& known, Walk& sequence,
                    int64_t m, int64_t row) const {
        using Word = typename Values::Word;
        constexpr int kParts = kSums / 8;
        const int64_t bits = source.trellis.bits;
        const float* x = product.x + m * product.columns;
        __m256 sums[kRows][kParts] = {};
        for (const float* stop = x + product.columns; x < stop; sequence.next()) {
            Room room;
            const TrellisSource::Words words = source.words_of(sequence, room);
            const __m256 factor = _mm256_set1_ps(source.template factor_of<Values>(sequence));
            const uint8_t* from = words.from;
            const auto add = [&](Word word, int k) {
                const __m256 values = known.of(word) * factor;
                for (int r = 0; r < kRows; ++r)
                    sums[r][k] += values * _mm256_loadu_ps(x + r * product.columns + 8 * k);
            };
            add(static_cast<Word>(words.first), 0);
            add(static_cast<Word>(words.second), 1);
            for (int k = 2; k < kParts; ++k) add(word_at<Word>(from + k * bits), k);
            x += kSums;
            from += kParts * bits;
            for (const float* end = x + sequence.size - kSums; x < end; x += kSums, from += kParts * bits)
                for (int k = 0; k < kParts; ++k) add(word_at<Word>(from + k * bits), k);
        }
        for (int r = 0; r < kRows; ++r) {
            float own[kSums];
            for (int k = 0; k < kParts; ++k) _mm256_storeu_ps(own + 8 * k, sums[r][k]);
            product.out[(m + r) * product.rows + row] = halved(own);
        }
    }

    static constexpr int64_t kAtOnce = kRows;
};
#endif

template <typename Values, typename Multiplying>
void multiply_rows(const TrellisProduct& product, const TrellisSource& source, const Values& known, int64_t first,
                   int64_t last, int64_t m, Multiplying multiply_row) {
    Walk sequence(source.trellis, sequence_count(source.trellis) / product.rows * first);
    for (int64_t row = first; row < last; ++row) multiply_row(product, source, known, sequence, m, row);
}

template <typename Values>
void multiply_by(const TrellisProduct& product, const TrellisSource& source, const Values& known, int64_t first,
                 int64_t last) {
    int64_t m = 0;
#if defined(__AVX2__)
    // From four rows on, storing the values takes less time than decoding them again.
    const bool are_filled = source.trellis.block % kSums == 0 && product.columns % kSums == 0;
    if (are_filled && product.x_rows <= 3) {
        if (product.x_rows == 1) multiply_rows(product, source, known, first, last, m, InRegisters<Values, 1>());
        if (product.x_rows == 2) multiply_rows(product, source, known, first, last, m, InRegisters<Values, 2>());
        if (product.x_rows == 3) multiply_rows(product, source, known, first, last, m, InRegisters<Values, 3>());
        return;
    }
#endif
    for (; m < product.x_rows; m += InCache<Values>::kAtOnce)
        multiply_rows(product, source, known, first, last, m, InCache<Values>());
}

void multiply_trellis(const TrellisProduct* product, int64_t first, int64_t last) {
    const TrellisSource source(product->matrix);
    source.with_values([&](const auto& known) { multiply_by(*product, source, known, first, last); });
}

}  // namespace
