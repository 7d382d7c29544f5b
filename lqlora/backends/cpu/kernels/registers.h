// Decoding of packed codes in registers, without unpacking them into memory first.
#pragma once

#include "lanes.h"
#include "packing.h"
#include "tables.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace {

// Rounds eight numbers to 16 bits, ties to even.
__m128i narrowed(__m256 wide, int32_t dtype) {
    if (dtype == FLOAT16) return _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
    const __m256i bits = _mm256_castps_si256(wide), upper = _mm256_srli_epi32(bits, 16);
    const __m256i up = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i sign = _mm256_and_si256(upper, _mm256_set1_epi32(0x8000));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi32(0x7fc0));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(wide, wide, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// The sixteen cells of a block of codes of four bits or fewer: (level - zero) * scale.
struct Sixteen {
    __m256 low, high;

    Sixteen(const float* levels, float zero, float scale) {
        const __m256 zeros = _mm256_set1_ps(zero), scales = _mm256_set1_ps(scale);
        low = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(levels), zeros), scales);
        high = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(levels + 8), zeros), scales);
    }
};

#if defined(__AVX512F__)

// Positions of the codes of a register's lanes within sixteen packed bytes: for each byte of a lane, the byte that it
// is taken from; for each lane, the bit of its first byte at which the code begins.
template <int kBits, int kLanes>
struct Places {
    alignas(64) uint8_t bytes[64];
    alignas(64) uint8_t shifts[64];

    constexpr Places() : bytes(), shifts() {
        constexpr int kWidth = 64 / kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int k = 0; k < kWidth; ++k) {
                const int byte = kBits * lane / 8 + k;
                bytes[kWidth * lane + k] = static_cast<uint8_t>(byte < 16 ? byte : 0x80);  // 0x80 selects zero
            }
            shifts[kWidth * lane] = static_cast<uint8_t>(kBits * lane % 8);
        }
    }
};

// Returns a code in the low bits of each lane; bits of the next codes may stand above it. Reads sixteen bytes.
template <int kBits, int kLanes>
__m512i codes_in_lanes(const uint8_t* packed) {
    static constexpr Places<kBits, kLanes> places;
    const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    // With a mask of ones: without one, headers of GCC 12 read a variable that nobody set, and warn of it.
    const __m512i spread = _mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(0xffff, own), _mm512_load_si512(places.bytes));
    const __m512i shifts = _mm512_load_si512(places.shifts);
    if constexpr (kLanes == 16) return _mm512_maskz_srlv_epi32(0xffff, spread, shifts);
    else return _mm512_srlv_epi16(spread, shifts);
}

// Looks up sixteen codes at a time, as float32.
template <int kBits>
struct Wide : Lanes {
    using Value = float;
    static constexpr int kLanes = kCount, kBytesRead = 16;
    const float* levels;
    __m512 zero, scale, low, high;

    Wide(const float* all, float own_zero, float own_scale, int32_t)
        : levels(all), zero(_mm512_set1_ps(own_zero)), scale(_mm512_set1_ps(own_scale)), low(), high() {
        if constexpr (kBits <= 5) low = scaled(_mm512_loadu_ps(levels));
        if constexpr (kBits == 5) high = scaled(_mm512_loadu_ps(levels + 16));
    }

    __m512 scaled(__m512 own) const { return _mm512_mul_ps(_mm512_sub_ps(own, zero), scale); }

    __m512 of(const uint8_t* packed) const {
        const __m512i codes = codes_in_lanes<kBits, 16>(packed);
        if constexpr (kBits <= 4) return _mm512_maskz_permutexvar_ps(0xffff, codes, low);
        else if constexpr (kBits == 5) return _mm512_permutex2var_ps(low, codes, high);
        else return scaled(entries<1 << kBits>(levels, codes));
    }

    static bool store_some(float* values, __m512 found, int64_t count) {
        _mm512_mask_storeu_ps(values, static_cast<__mmask16>((1u << count) - 1), found);
        return true;
    }
};

// Looks up 32 codes of four bits or fewer at a time, as 16-bit numbers. The sixteen cells are rounded once per block,
// and not each value.
template <int kBits>
struct Narrow {
    using Value = uint16_t;
    using Register = __m512i;
    static constexpr int kLanes = 32, kBytesRead = 16;
    __m512i table;  // as many copies of the cells as there is room for

    Narrow(const float* levels, float zero, float scale, int32_t dtype) {
        const Sixteen cells(levels, zero, scale);
        const __m256i own = _mm256_set_m128i(narrowed(cells.high, dtype), narrowed(cells.low, dtype));
        table = _mm512_maskz_broadcast_i64x4(0xff, own);
    }

    __m512i of(const uint8_t* packed) const {
        return _mm512_maskz_permutexvar_epi16(~__mmask32(0), codes_in_lanes<kBits, 32>(packed), table);
    }

    static void store(uint16_t* values, __m512i found) { _mm512_storeu_si512(values, found); }

    static bool store_some(uint16_t* values, __m512i found, int64_t count) {
        _mm512_mask_storeu_epi16(values, (uint32_t{1} << count) - 1, found);
        return true;
    }
};

#else

// Looks up eight codes of four bits or fewer at a time, which lie in one word of 32 bits.
template <int kBits>
struct Wide : Lanes {
    using Value = float;
    static constexpr int kLanes = kCount, kBytesRead = 4;
    Sixteen cells;

    Wide(const float* levels, float zero, float scale, int32_t) : cells(levels, zero, scale) {}

    __m256 of(const uint8_t* packed) const {
        int32_t word;
        std::memcpy(&word, packed, 4);
        const __m256i shifts = _mm256_setr_epi32(0, kBits, 2 * kBits, 3 * kBits, 4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits);
        const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        const __m256 first = _mm256_permutevar8x32_ps(cells.low, codes), second = _mm256_permutevar8x32_ps(cells.high, codes);
        return _mm256_blendv_ps(first, second, is_high);
    }

    static bool store_some(float*, __m256, int64_t) { return false; }  // but for the last ones, all blocks fill registers
};

// Looks up sixteen codes at a time, as 16-bit numbers. AVX2 looks up bytes and not words in a table of
// sixteen, so the low and the high byte of each number
// are looked up separately and interleaved.
template <int kBits>
struct Narrow {
    using Value = uint16_t;
    using Register = __m256i;
    static constexpr int kLanes = 16, kBytesRead = 8;
    __m128i low, high;

    Narrow(const float* levels, float zero, float scale, int32_t dtype) {
        const Sixteen cells(levels, zero, scale);
        const __m128i first = narrowed(cells.low, dtype), second = narrowed(cells.high, dtype);
        const __m128i byte = _mm_set1_epi16(0xff);
        low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
        high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    }

    __m256i of(const uint8_t* packed) const {
        __m128i codes;
        if constexpr (kBits == 4) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)), four = _mm_set1_epi8(15);
            codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, four), _mm_and_si128(_mm_srli_epi16(bytes, 4), four));
        } else {
            uint64_t word;
            std::memcpy(&word, packed, 8);
            const uint64_t first = part(word, kBits), second = part(word >> 8 * kBits, kBits);
            codes = _mm_set_epi64x(static_cast<int64_t>(second), static_cast<int64_t>(first));
        }
        const __m128i below = _mm_shuffle_epi8(low, codes), above = _mm_shuffle_epi8(high, codes);
        return _mm256_set_m128i(_mm_unpackhi_epi8(below, above), _mm_unpacklo_epi8(below, above));
    }

    static void store(uint16_t* values, __m256i found) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), found); }

    static bool store_some(uint16_t* values, __m256i found, int64_t count) {
        if (count != 8) return false;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm256_castsi256_si128(found));
        return true;
    }
};

#endif

// Calls `take` for the run of each block within a range of weights, with the cells of the block, the first byte of the
// run's codes, and their number. Every run must begin with a whole byte, so blocks are multiples of eight.
template <typename Lookup, int kBits, typename Take>
void each_run(const Decoding& decoding, const float* levels, int64_t first, int64_t last, Take& take) {
    const uint8_t* packed = decoding.packed + first / 8 * kBits;
    int64_t block = first / decoding.block;
    for (int64_t at = first; at < last; ++block) {
        const int64_t stop = least((block + 1) * decoding.block, last);
        const float zero = decoding.zero_points ? static_cast<float>(decoding.zero_points[block]) : 0.0f;
        take(Lookup(levels, zero, decoding.scales[block], decoding.dtype), packed, stop - at);
        packed += (stop - at) / 8 * kBits;
        at = stop;
    }
}

// Writes the values of runs, one run after the other. Reads no byte at `end` or beyond.
template <typename Lookup, int kBits, bool kStreams>
struct Stored {
    using Value = typename Lookup::Value;
    static constexpr int64_t kLanes = Lookup::kLanes, kStep = kLanes / 8 * kBits;
    const uint8_t* end;
    Value* values;

    void operator()(const Lookup& cells, const uint8_t* packed, int64_t count) {
        const int64_t spare = end - packed - Lookup::kBytesRead;
        const int64_t whole = spare < 0 ? 0 : least(count / kLanes, spare / kStep + 1);
        int64_t k = 0;
        for (; k + 4 <= whole; k += 4)
            for (int i = 0; i < 4; ++i) put(values + (k + i) * kLanes, cells.of(packed + (k + i) * kStep));
        for (; k < whole; ++k) put(values + k * kLanes, cells.of(packed + k * kStep));
        if (const int64_t left = count - k * kLanes) store_last(cells, packed + k * kStep, left, values + k * kLanes);
        values += count;
    }

    static void put(Value* to, typename Lookup::Register found) {
        if constexpr (kStreams) Lookup::stream(to, found);
        else Lookup::store(to, found);
    }

    void store_last(const Lookup& cells, const uint8_t* packed, int64_t count, Value* to) const {
        const bool is_readable = count < kLanes && end - packed >= Lookup::kBytesRead;
        if (!is_readable || !Lookup::store_some(to, cells.of(packed), count)) store_rest(cells, packed, count, to);
    }

    // Stores the last values, for which a whole register would be written, or sixteen bytes read, beyond an array.
    __attribute__((noinline)) void store_rest(const Lookup& cells, const uint8_t* packed, int64_t count, Value* to) const {
        for (int64_t i = 0; i < count; i += kLanes, packed += kStep) {
            uint8_t bytes[16] = {};
            Value own[kLanes];
            std::memcpy(bytes, packed, static_cast<size_t>(least(16, end - packed)));
            Lookup::store(own, cells.of(bytes));
            std::memcpy(to + i, own, static_cast<size_t>(least(kLanes, count - i)) * sizeof(Value));
        }
    }
};

}  // namespace
#endif
