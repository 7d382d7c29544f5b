// The kernels of one instruction set. This file is compiled once for each of them, with LQLORA_ISA naming it: nothing
// in it has external linkage but the table at its end, or the linker might keep one set's code for all. That is also why
// it uses no templates of the standard library but constants.
//
// Results are those of lqlora.ops to the bit: no contraction of products and sums, division and not multiplication by
// the reciprocal, and sums in the order that lqlora.ops.row_sums defines.
#include "kernels.h"

#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The order of codes within words is that of little-endian machines."
#endif

namespace {

// Weights at hand: as floats and codes they stay in the nearest cache. A multiple of eight, so stripes begin with a byte.
constexpr int64_t kStripe = 2048;
// Whether codes of four bits or fewer are looked up without unpacking them first.
#if defined(__AVX2__)
constexpr bool kLooksUpPacked = true;
#else
constexpr bool kLooksUpPacked = false;
#endif
// Up to this many boundaries, counting those below a value is fastest.
constexpr int kFew = 15;

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
    // The exponent is moved by a product, which also makes subnormal numbers right.
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
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t rounded = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x47800000u ? 0x7c00u : finite;
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

// --- Extremes of blocks, on the bits of the numbers: these are ordered like the magnitudes, and NaN is above them all

template <typename Word>
Word largest_magnitude(const Word* values, int64_t count) {
    constexpr Word magnitude = static_cast<Word>(~Word(0)) >> 1;
    Word largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Word own = values[i] & magnitude;
        largest = own > largest ? own : largest;
    }
    return largest;
}

template <typename Word, typename Store>
void absmax_of(const Blocks& blocks, int64_t first, int64_t last, Store store) {
    const Word* values = static_cast<const Word*>(blocks.values);
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * blocks.block;
        store(b, largest_magnitude(values + begin, least(blocks.block, blocks.count - begin)));
    }
}

void absmax(const Blocks* blocks, int64_t first, int64_t last, void* out) {
    float* narrow_out = static_cast<float*>(out);
    switch (blocks->dtype) {
        case FLOAT64: {
            double* wide_out = static_cast<double*>(out);
            absmax_of<uint64_t>(*blocks, first, last,
                                [=](int64_t b, uint64_t bits) { wide_out[b] = bits_as<double>(bits); });
            break;
        }
        case FLOAT32:
            absmax_of<uint32_t>(*blocks, first, last,
                                [=](int64_t b, uint32_t bits) { narrow_out[b] = bits_as<float>(bits); });
            break;
        case FLOAT16:
            absmax_of<uint16_t>(*blocks, first, last,
                                [=](int64_t b, uint16_t bits) { narrow_out[b] = from_half(bits); });
            break;
        default:
            absmax_of<uint16_t>(*blocks, first, last,
                                [=](int64_t b, uint16_t bits) { narrow_out[b] = from_bfloat16(bits); });
    }
}

// Positive numbers are ordered as signed integers, and negative magnitudes as unsigned ones above all the positive.
template <typename Real, typename Signed, typename Unsigned>
void extremes_of(const Unsigned* values, int64_t count, Real* low, Real* high) {
    constexpr Unsigned sign = ~(static_cast<Unsigned>(~Unsigned(0)) >> 1);
    Signed above = 0;
    Unsigned below = sign;
    for (int64_t i = 0; i < count; ++i) {
        const Signed own = static_cast<Signed>(values[i]);
        above = own > above ? own : above;
        below = values[i] > below ? values[i] : below;
    }
    const Real top = bits_as<Real>(above), bottom = bits_as<Real>(below);
    const bool finite_order = top == top && bottom == bottom;
    *high = finite_order ? top : std::numeric_limits<Real>::quiet_NaN();
    *low = finite_order ? bottom + Real(0) : std::numeric_limits<Real>::quiet_NaN();
}

void extremes(const Blocks* blocks, int64_t first, int64_t last, void* low, void* high) {
    float *lows = static_cast<float*>(low), *highs = static_cast<float*>(high);
    for (int64_t b = first; b < last; ++b) {
        const int64_t begin = b * blocks->block, count = least(blocks->block, blocks->count - begin);
        if (blocks->dtype == FLOAT64) {
            extremes_of<double, int64_t, uint64_t>(static_cast<const uint64_t*>(blocks->values) + begin, count,
                                                   static_cast<double*>(low) + b, static_cast<double*>(high) + b);
        } else if (blocks->dtype == FLOAT32) {
            extremes_of<float, int32_t, uint32_t>(static_cast<const uint32_t*>(blocks->values) + begin, count,
                                                  lows + b, highs + b);
        } else {
            lows[b] = highs[b] = 0.0f;
            bool is_nan = false;
            float wide[kStripe];
            for (int64_t at = 0; at < count; at += kStripe) {
                const int64_t size = least(kStripe, count - at);
                float bottom, top;
                widen(static_cast<const uint16_t*>(blocks->values) + begin + at, blocks->dtype, size, wide);
                uint32_t words[kStripe];
                std::memcpy(words, wide, static_cast<size_t>(size) * sizeof(float));
                extremes_of<float, int32_t, uint32_t>(words, size, &bottom, &top);
                is_nan |= top != top;
                lows[b] = bottom < lows[b] ? bottom : lows[b];
                highs[b] = top > highs[b] ? top : highs[b];
            }
            if (is_nan) lows[b] = highs[b] = std::numeric_limits<float>::quiet_NaN();
        }
    }
}

// --- Codes as bits: eight codes are joined in three steps, each of which halves the gaps between them

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

// `stop` is the end of the packed bytes: words are read whole where they end before it.
void unpack_stripe(const uint8_t* packed, const uint8_t* stop, int bits, int64_t count, uint8_t* codes) {
    if (bits == 8) {
        std::memcpy(codes, packed, static_cast<size_t>(count));
        return;
    }
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

// --- The nearest level: the number of boundaries below a value

template <typename Real>
struct Boundaries {
    int count;       // those of the codebook
    int bits;        // the table has 2**bits - 1 entries
    Real table[256]; // ascending; infinite beyond those of the codebook, so that no value is above them
    Real tree[256];  // the same as a search asks for them: entries 2**d to 2**(d + 1) in the step after d steps

    Boundaries(const float* given, int given_count) : count(given_count), bits(1), tree{} {
        while ((1 << bits) - 1 < count) ++bits;
        for (int i = 0; i < 256; ++i)
            table[i] = i < count ? static_cast<Real>(given[i]) : std::numeric_limits<Real>::infinity();
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
// Entries of a table of 16, 32, 64 or 128, which is held in registers. Of an index the low bits count.
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

// The steps of a binary search from the one that asks for `kSize` boundaries to the last one, in several registers.
template <int kSize, int kBits, int kRegisters>
void take_steps(const __m512* values, const float* tree, __m512i* found) {
    for (int k = 0; k < kRegisters; ++k) {
        const __mmask16 is_above = _mm512_cmp_ps_mask(values[k], entries<kSize>(tree + kSize, found[k]), _CMP_GT_OQ);
        const __m512i twice = _mm512_add_epi32(found[k], found[k]);
        found[k] = _mm512_mask_sub_epi32(twice, is_above, twice, _mm512_set1_epi32(-1));
    }
    if constexpr (2 * kSize < 1 << kBits) take_steps<2 * kSize, kBits, kRegisters>(values, tree, found);
}

// One to `16 * kRegisters` values. No byte beyond their codes is written, and whole registers without a mask: what is
// stored with one has to reach the cache before it can be read again.
template <int kBits, int kRegisters>
void nearest_at_once(const float* values, int64_t count, const float* tree, uint8_t* codes) {
    __m512 own[kRegisters];
    __m512i found[kRegisters] = {};
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

// Counts in four registers, as bytes in their order.
__m256i as_bytes(const __m256i counts[4]) {
    const __m256i words = _mm256_packs_epi32(counts[0], counts[1]), others = _mm256_packs_epi32(counts[2], counts[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, others), order);
}

// A binary search in 32 values at once. Up to 16 boundaries are looked up in registers, more in memory.
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

// --- Encoding

// Divides a range of weights by the scales of their blocks and adds the zero points. A scale of zero makes zeros.
template <typename Real>
void normalize(const Real* values, const Encoding& encoding, int64_t first, int64_t last, Real* normalized) {
    const Real* scales = static_cast<const Real*>(encoding.scales);
    const int64_t size = encoding.blocks.block;
    const Real infinite = std::numeric_limits<Real>::infinity();
    if (size == 1) {
        for (int64_t i = first; i < last; ++i) {
            const Real scale = scales[i];
            normalized[i - first] = values[i - first] / (scale == 0 ? infinite : scale);
        }
        if (encoding.zero_points)
            for (int64_t i = first; i < last; ++i) normalized[i - first] += static_cast<Real>(encoding.zero_points[i]);
        return;
    }
    int64_t block = first / size;
    for (int64_t at = first; at < last; ++block) {
        const int64_t stop = least((block + 1) * size, last);
        const Real divisor = scales[block] == 0 ? infinite : scales[block];
        const Real* from = values + (at - first);
        Real* to = normalized + (at - first);
        for (int64_t i = 0; i < stop - at; ++i) to[i] = from[i] / divisor;
        if (encoding.zero_points) {
            const Real zero = static_cast<Real>(encoding.zero_points[block]);
            for (int64_t i = 0; i < stop - at; ++i) to[i] += zero;
        }
        at = stop;
    }
}

template <typename Real>
void encode_as(const Encoding& encoding, int64_t first, int64_t last) {
    const Boundaries<Real> boundaries(encoding.boundaries, encoding.boundary_count);
    const bool is_narrow = encoding.blocks.dtype == FLOAT16 || encoding.blocks.dtype == BFLOAT16;
    Real normalized[kStripe];
    float wide[kStripe];
    uint8_t stripe[kStripe];
    for (int64_t at = first; at < last; at += kStripe) {
        const int64_t stop = least(at + kStripe, last);
        const Real* values = static_cast<const Real*>(encoding.blocks.values) + at;
        if (is_narrow) {
            widen(static_cast<const uint16_t*>(encoding.blocks.values) + at, encoding.blocks.dtype, stop - at, wide);
            values = reinterpret_cast<const Real*>(wide);  // Real is float then
        }
        normalize(values, encoding, at, stop, normalized);
        uint8_t* codes = encoding.codes ? encoding.codes + at : stripe;
        nearest(normalized, stop - at, boundaries, codes);
        if (encoding.packed) pack_stripe(codes, encoding.bits, stop - at, encoding.packed + at / 8 * encoding.bits);
    }
}

void encode(const Encoding* encoding, int64_t first, int64_t last) {
    (encoding->blocks.dtype == FLOAT64 ? encode_as<double> : encode_as<float>)(*encoding, first, last);
}

// --- Decoding

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

// --- Products of a few rows, which would wait for a decoded matrix on its way to memory and back

// Thirty-two sums are kept, so that the order of additions is the same on every instruction set.
float dot(const float* a, const float* b, int64_t count) {
    constexpr int kLanes = 32;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
    for (; i < count; ++i) lanes[i % kLanes] += a[i] * b[i];
    for (int half = kLanes / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) lanes[k] += lanes[half + k];
    return lanes[0];
}

void multiply(const Product* product, int64_t first, int64_t last) {
    const Decoding& matrix = product->matrix;
    float levels[256] = {};
    std::memcpy(levels, matrix.levels, static_cast<size_t>(matrix.level_count) * sizeof(float));
    const uint8_t* end = matrix.packed + (matrix.count * matrix.bits + 7) / 8;
    float weights[kStripe];
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * product->columns;
        for (int64_t m = 0; m < product->x_rows; ++m) product->out[m * product->rows + row] = 0;
        for (int64_t at = 0; at < product->columns; at += kStripe) {
            const int64_t size = least(kStripe, product->columns - at);
            decode_stripe(matrix, end, levels, begin + at, begin + at + size, false, weights);
            for (int64_t m = 0; m < product->x_rows; ++m)
                product->out[m * product->rows + row] += dot(weights, product->x + m * product->columns + at, size);
        }
    }
}

// --- Sums of rows: halved again and again, which is the order that lqlora.ops.row_sums defines

template <typename Real>
Real halved_sum(Real* terms, int64_t count) {
    if (count == 0) return 0;
    while (count > 1) {
        const int64_t half = count / 2, odd = count % 2;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
        for (int64_t i = 0; i < half; ++i) terms[i] += terms[half + i];
        if (odd) terms[half] = terms[2 * half];
        count = half + odd;
    }
    return terms[0];
}

template <typename T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : data(new T[static_cast<size_t>(count) + 1]) {}
    ~Buffer() { delete[] data; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

template <typename Real>
void row_sums_of(const Real* rows, int64_t columns, int64_t first, int64_t last, Real* sums) {
    const Buffer<Real> terms(columns);
    for (int64_t row = first; row < last; ++row) {
        std::memcpy(terms.data, rows + row * columns, static_cast<size_t>(columns) * sizeof(Real));
        sums[row] = halved_sum(terms.data, columns);
    }
}

void row_sums(const void* rows, int32_t dtype, int64_t columns, int64_t first, int64_t last, void* sums) {
    if (dtype == FLOAT64)
        row_sums_of(static_cast<const double*>(rows), columns, first, last, static_cast<double*>(sums));
    else
        row_sums_of(static_cast<const float*>(rows), columns, first, last, static_cast<float*>(sums));
}

// --- Sums by level. Terms are rounded to integers, whose sums are exact, so that their order does not matter.

double magnitude(double value) { return value < 0 ? -value : value; }

void level_maxima(const Levels* levels, int64_t first, int64_t last, double* above, double* below) {
    double most_above = 0, most_below = 0;
    for (int64_t row = first; row < last; ++row) {
        const float* entries = levels->rows + row * levels->columns;
        const float* weights = levels->weights ? levels->weights + row * levels->columns : nullptr;
        const double ratio = levels->ratios[row], scale = levels->importance[row] * ratio, square = scale * ratio;
        for (int64_t i = 0; i < levels->columns; ++i) {
            const double own = magnitude(scale * entries[i] * (weights ? weights[i] : 1.0));
            const double other = magnitude(square * (weights ? weights[i] : 1.0));
            most_above = own > most_above || own != own ? own : most_above;
            most_below = other > most_below || other != other ? other : most_below;
        }
    }
    *above = most_above;
    *below = most_below;
}

// To the nearest integer, to the even one of two: what is added pushes the fraction out. For magnitudes below 2**51.
double rounded(double value) {
    const double shift = 0x1.8p52;
    return value + shift - shift;
}

void level_sums(const Levels* levels, int64_t first, int64_t last, double above_unit, double below_unit, double* above,
                double* below) {
    const double above_factor = 1 / above_unit, below_factor = 1 / below_unit;  // powers of two, so these are exact
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * levels->columns;
        const float* entries = levels->rows + begin;
        const uint8_t* codes = levels->codes + begin;
        double *own = above + levels->sets[row] * levels->size, *other = below + levels->sets[row] * levels->size;
        const double ratio = levels->ratios[row], scale = levels->importance[row] * ratio, square = scale * ratio;
        for (int64_t i = 0; i < levels->columns; ++i) {
            const double weight = levels->weights ? levels->weights[begin + i] : 1.0;
            own[codes[i]] += rounded(scale * entries[i] * weight * above_factor);
            other[codes[i]] += rounded(square * weight * below_factor);
        }
    }
}

// --- The scale of least error

struct Row {
    const float* entries;
    const float* weights;  // or null
    int64_t count;
    bool has_zero;
    float zero;
    float* scratch;   // `count` floats each
    float* values;    // nearest ones under the ratio tried last
    uint8_t* codes;
};

struct Rounding {
    Boundaries<float> boundaries;
    float levels[256];

    explicit Rounding(const Search& search) : boundaries(search.boundaries, search.level_count - 1), levels{} {
        std::memcpy(levels, search.levels, static_cast<size_t>(search.level_count) * sizeof(float));
    }
};

void round_row(const Row& row, const Rounding& rounding, float ratio) {
    for (int64_t i = 0; i < row.count; ++i) row.scratch[i] = row.entries[i] / ratio;
    if (row.has_zero)
        for (int64_t i = 0; i < row.count; ++i) row.scratch[i] += row.zero;
    nearest(row.scratch, row.count, rounding.boundaries, row.codes);
    if (rounding.boundaries.count <= kFew)
        look_up_few(row.codes, rounding.levels, row.count, row.values);
    else
        for (int64_t i = 0; i < row.count; ++i) row.values[i] = rounding.levels[row.codes[i]];
    if (row.has_zero)
        for (int64_t i = 0; i < row.count; ++i) row.values[i] -= row.zero;
}

float error_of(const Row& row, float ratio) {
    for (int64_t i = 0; i < row.count; ++i) {
        const float difference = row.entries[i] - ratio * row.values[i];
        row.scratch[i] = difference * difference;
    }
    if (row.weights)
        for (int64_t i = 0; i < row.count; ++i) row.scratch[i] = row.weights[i] * row.scratch[i];
    return halved_sum(row.scratch, row.count);
}

// The ratio that is best for the values at hand; the old one where none of the same sign is.
float least_squares(const Row& row, float ratio) {
    for (int64_t i = 0; i < row.count; ++i) {
        const float weighted = row.weights ? row.weights[i] * row.values[i] : row.values[i];
        row.scratch[i] = weighted * row.entries[i];
    }
    const float above = halved_sum(row.scratch, row.count);
    for (int64_t i = 0; i < row.count; ++i) {
        const float weighted = row.weights ? row.weights[i] * row.values[i] : row.values[i];
        row.scratch[i] = weighted * row.values[i];
    }
    const float below = halved_sum(row.scratch, row.count);
    const float refined = above / (below > 0 ? below : 1.0f);
    const bool is_finite = (bits_as<uint32_t>(refined) & 0x7f800000u) != 0x7f800000u;
    return below > 0 && refined * ratio > 0 && is_finite ? refined : ratio;
}

float best_ratio(const Row& row, const Rounding& rounding, const Search& search) {
    float best = search.ratios[0], error = 0;
    for (int32_t k = 0; k < search.ratio_count; ++k) {
        round_row(row, rounding, search.ratios[k]);
        const float own = error_of(row, search.ratios[k]);
        if (k == 0 || own < error) {
            best = search.ratios[k];
            error = own;
        }
    }
    for (int32_t k = 0; k < search.refinements; ++k) {
        round_row(row, rounding, best);
        const float refined = least_squares(row, best);
        round_row(row, rounding, refined);
        const float own = error_of(row, refined);
        if (own < error) {
            best = refined;
            error = own;
        }
    }
    return best;
}

void search(const Search* search, int64_t first, int64_t last) {
    const Rounding rounding(*search);
    const int64_t columns = search->columns;
    const Buffer<float> floats(2 * columns);
    const Buffer<uint8_t> codes(columns);
    for (int64_t r = first; r < last; ++r) {
        const float* weights = search->weights ? search->weights + r * columns : nullptr;
        const float zero = search->zero_points ? search->zero_points[r] : 0.0f;
        const Row row{search->rows + r * columns, weights, columns, search->zero_points != nullptr, zero,
                      floats.data, floats.data + columns, codes.data};
        search->best[r] = best_ratio(row, rounding, *search);
    }
}

}  // namespace

#define LQLORA_JOIN(a, b) a##b
#define LQLORA_NAME(isa) LQLORA_JOIN(lqlora_kernels_, isa)
#define LQLORA_TEXT(isa) #isa
#define LQLORA_STRING(isa) LQLORA_TEXT(isa)

extern "C" const Kernels LQLORA_NAME(LQLORA_ISA);
const Kernels LQLORA_NAME(LQLORA_ISA) = {LQLORA_STRING(LQLORA_ISA), absmax, extremes, encode, decode, pack, unpack,
                                         row_sums, search, level_maxima, level_sums,
                                         multiply};
