// Decoding of packed codes: value = (level[code] - zero point) * scale, rounded to the dtype of the result at the end.
#pragma once

#include "packing.h"
#include "registers.h"
#include "tables.h"

#include <cstring>

namespace {

// The levels of the codebook, padded to the 256 that a byte can index. Levels of fewer than four bits are repeated up
// to the sixteenth, because a lookup among sixteen reads four bits: above a short code it finds bits of the next code.
struct LevelTable {
    float levels[256];

    explicit LevelTable(const Decoding& decoding) : levels{} {
        std::memcpy(levels, decoding.levels, static_cast<size_t>(decoding.level_count) * sizeof(float));
        for (int j = 1 << decoding.bits; j < 16; ++j) levels[j] = levels[j - (1 << decoding.bits)];
    }
};

// --- Codes of one byte each: the way for bits, block sizes and processors that have no faster one

// Not inlined: if the compiler can prove that levels and values do not overlap, it gathers eight levels at once. Most
// processors run a gather more slowly than eight loads.
__attribute__((noinline)) void decode_run(const uint8_t* codes, const float* levels, bool are_few, float zero, float scale,
                                          int64_t count, float* values) {
    if (are_few && count >= 16) {
        float table[16];
        for (int j = 0; j < 16; ++j) table[j] = (levels[j] - zero) * scale;
        look_up_few(codes, table, count, values);
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, codes + i, 8);
        float own[8];
        for (int k = 0; k < 8; ++k) own[k] = levels[eight >> 8 * k & 255];
        for (int k = 0; k < 8; ++k) values[i + k] = (own[k] - zero) * scale;
    }
    for (; i < count; ++i) values[i] = (levels[codes[i]] - zero) * scale;
}

void decode_bytes(const uint8_t* codes, const Decoding& decoding, const float* levels, int64_t first, int64_t last,
                  float* values) {
    int64_t block = first / decoding.block;
    for (int64_t at = first; at < last; ++block) {
        const int64_t stop = least((block + 1) * decoding.block, last), begin = at - first;
        const float zero = decoding.zero_points ? static_cast<float>(decoding.zero_points[block]) : 0.0f;
        decode_run(codes + begin, levels, decoding.bits <= 4, zero, decoding.scales[block], stop - at, values + begin);
        at = stop;
    }
}

// Decodes blocks of one weight: every weight has its own scale.
void decode_single(const uint8_t* codes, const Decoding& decoding, const float* levels, int64_t first, int64_t last,
                   float* values) {
    for (int64_t i = first; i < last; ++i) {
        const float zero = decoding.zero_points ? static_cast<float>(decoding.zero_points[i]) : 0.0f;
        values[i - first] = (levels[codes[i - first]] - zero) * decoding.scales[i];
    }
}

// --- Stripes

#if defined(__AVX2__)
#if defined(__AVX512F__)
// A lookup among the 256 levels of eight bits is faster in memory than in sixteen registers.
constexpr int kMostInRegisters = 7;
#else
constexpr int kMostInRegisters = 4;
#endif

template <typename Lookup, int kBits, bool kStreams>
void store_stripe(const Decoding& decoding, const uint8_t* end, const float* levels, int64_t first, int64_t last,
                  typename Lookup::Value* values) {
    Stored<Lookup, kBits, kStreams> stored{end, values};
    each_run<Lookup, kBits>(decoding, levels, first, last, stored);
}

template <typename Value>
using Storing = void (*)(const Decoding&, const uint8_t*, const float*, int64_t, int64_t, Value*);

template <bool kStreams>
Storing<float> storing_wide(int bits) {
    constexpr Storing<float> by_bits[] = {
        store_stripe<Wide<1>, 1, kStreams>, store_stripe<Wide<2>, 2, kStreams>, store_stripe<Wide<3>, 3, kStreams>,
        store_stripe<Wide<4>, 4, kStreams>,
#if defined(__AVX512F__)
        store_stripe<Wide<5>, 5, kStreams>, store_stripe<Wide<6>, 6, kStreams>, store_stripe<Wide<7>, 7, kStreams>,
#endif
    };
    return by_bits[bits - 1];
}

Storing<uint16_t> storing_narrow(int bits) {
    constexpr Storing<uint16_t> by_bits[] = {store_stripe<Narrow<1>, 1, false>, store_stripe<Narrow<2>, 2, false>,
                                             store_stripe<Narrow<3>, 3, false>, store_stripe<Narrow<4>, 4, false>};
    return by_bits[bits - 1];
}

// Results of this many numbers leave the caches before they are used. A single thread writes them by streaming stores,
// which save reading each cache line before it is written. Two threads are faster with ordinary stores: the streaming
// stores of one thread already use the whole memory bandwidth.
constexpr int64_t kBeyondCaches = int64_t{1} << 23;

bool is_streamed(const Decoding& decoding, int64_t count) {
    constexpr int64_t kLanes = Wide<4>::kLanes;
    const bool is_aligned = reinterpret_cast<uintptr_t>(decoding.out) % (kLanes * sizeof(float)) == 0;
    const bool is_long = count == decoding.count && count >= kBeyondCaches;
    return decoding.dtype == FLOAT32 && is_long && is_aligned && decoding.block % kLanes == 0;
}
#else
bool is_streamed(const Decoding&, int64_t) { return false; }
#endif

void decode_stripe(const Decoding& decoding, const uint8_t* end, const float* levels, int64_t first, int64_t last,
                   bool streams, float* values) {
#if defined(__AVX2__)
    if (decoding.bits <= kMostInRegisters && decoding.block % 8 == 0) {
        const Storing<float> store = (streams ? storing_wide<true> : storing_wide<false>)(decoding.bits);
        return store(decoding, end, levels, first, last, values);
    }
#endif
    (void)streams;
    const uint8_t* packed = decoding.packed + first / 8 * decoding.bits;
    uint8_t unpacked[kStripe];
    if (decoding.bits < 8) unpack_stripe(packed, end, decoding.bits, last - first, unpacked);
    const uint8_t* codes = decoding.bits < 8 ? unpacked : packed;
    (decoding.block == 1 ? decode_single : decode_bytes)(codes, decoding, levels, first, last, values);
}

// From this block size on, rounding the sixteen cells of a block to 16 bits costs less than rounding each of its
// weights.
constexpr int64_t kLongBlock = 32;

void decode_stripe(const Decoding& decoding, const uint8_t* end, const float* levels, int64_t first, int64_t last,
                   bool, uint16_t* values) {
#if defined(__AVX2__)
    if (decoding.bits <= 4 && decoding.block % 8 == 0 && decoding.block >= kLongBlock)
        return storing_narrow(decoding.bits)(decoding, end, levels, first, last, values);
#endif
    float wide[kStripe];
    decode_stripe(decoding, end, levels, first, last, false, wide);
    narrow(wide, decoding.dtype, last - first, values);
}

template <typename Value>
void decode_as(const Decoding& decoding, int64_t first, int64_t last) {
    const LevelTable table(decoding);
    const uint8_t* end = decoding.packed + (decoding.count * decoding.bits + 7) / 8;
    const bool streams = is_streamed(decoding, last - first);
    Value* out = static_cast<Value*>(decoding.out);
    for (int64_t at = first; at < last; at += kStripe)
        decode_stripe(decoding, end, table.levels, at, least(at + kStripe, last), streams, out + at);
#if defined(__AVX2__)
    if (streams) _mm_sfence();  // streaming stores are weakly ordered: finish them before another thread may read them
#endif
}

void decode(const Decoding* decoding, int64_t first, int64_t last) {
    (decoding->dtype == FLOAT32 ? decode_as<float> : decode_as<uint16_t>)(*decoding, first, last);
}

}  // namespace
