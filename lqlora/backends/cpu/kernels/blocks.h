// Absolute maxima and extremes of blocks, as maxima of integers: the bits of magnitudes are ordered as the magnitudes
// are, with NaN above infinity. So a NaN is never lost, and the compiler can use integer vectors.
#pragma once

#include "numbers.h"

#include <cstring>
#include <limits>

namespace {

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

// The bits of positive numbers are ordered as signed integers, where all negative numbers are below them. The bits of
// negative numbers are ordered by magnitude as unsigned integers, above all positive numbers. So the signed maximum is
// the largest number and the unsigned maximum the smallest; both start at a zero, so that zero lies within the range.
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
    // Adding zero turns the start value -0 into +0, as the reference has it.
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

}  // namespace
