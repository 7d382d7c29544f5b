// Encoding of weights: division by the scale of the block, and the code of the nearest level. Weights go through in
// stripes, so that the quotients and codes between the two steps stay in the first-level cache.
#pragma once

#include "nearest.h"
#include "packing.h"

#include <limits>

namespace {

// Divides a range of weights by the scales of their blocks and adds the zero points. A scale of zero is replaced by
// infinity, so that its weights become zeros. It divides and does not multiply by the reciprocal, which would round
// twice.
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

}  // namespace
