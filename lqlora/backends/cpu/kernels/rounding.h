// Squared errors of rows that are rounded to the nearest levels with given scales.
#pragma once

#include "nearest.h"
#include "sums.h"
#include "tables.h"

#include <cstring>
#include <limits>

namespace {

template <typename Real>
struct RoundedLevels {
    Boundaries<Real> boundaries;
    float levels[256];

    explicit RoundedLevels(const RoundingErrors& errors) : boundaries(errors.boundaries, errors.level_count - 1), levels{} {
        std::memcpy(levels, errors.levels, static_cast<size_t>(errors.level_count) * sizeof(float));
    }
};

// A scale and a zero point. Rows without zero points have zero: adding and subtracting zero changes no code and no
// value.
struct Shifted {
    float scale;
    float zero;

    Shifted(const RoundingErrors& errors, int64_t row)
        : scale(errors.scales[row]), zero(errors.zero_points ? static_cast<float>(errors.zero_points[row]) : 0.0f) {}
};

template <typename Real>
void divide(const Real* entries, int64_t count, Shifted by, Real* normalized) {
    const Real divisor = by.scale == 0 ? std::numeric_limits<Real>::infinity() : static_cast<Real>(by.scale);
    const Real zero = static_cast<Real>(by.zero);
    for (int64_t i = 0; i < count; ++i) normalized[i] = entries[i] / divisor + zero;
}

template <typename Real>
void nearest_levels(const Real* normalized, int64_t count, const RoundedLevels<Real>& known, float* values) {
    uint8_t codes[kStripe];
    nearest(normalized, count, known.boundaries, codes);
    if (known.boundaries.count <= kFew)
        look_up_few(codes, known.levels, count, values);
    else
        for (int64_t i = 0; i < count; ++i) values[i] = known.levels[codes[i]];
}

template <typename Real>
void square_differences(const Real* entries, int64_t count, const float* values, Shifted by, double* squares) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = (values[i] - by.zero) * by.scale;
        const double difference = static_cast<double>(entries[i]) - static_cast<double>(value);
        squares[i] = difference * difference;
    }
}

template <typename Weight>
void weigh(const void* weights, int64_t begin, int64_t count, double* squares) {
    const Weight* own = static_cast<const Weight*>(weights) + begin;
    for (int64_t i = 0; i < count; ++i) squares[i] *= static_cast<double>(own[i]);
}

// Short rows are rounded several at once, long ones in parts, so that `nearest` is always given up to a stripe. The
// squares of a whole row are kept until they are summed, because the order of the sum depends on the row's length.
template <typename Real>
void rounding_errors_of(const RoundingErrors& errors, int64_t first, int64_t last) {
    const RoundedLevels<Real> known(errors);
    const int64_t columns = errors.columns, part = least(columns, kStripe), at_once = kStripe / part;
    const Buffer<double> squares(columns);
    Real normalized[kStripe];
    float values[kStripe];
    for (int64_t r = first; r < last; r += at_once) {
        const int64_t count = least(at_once, last - r);
        const Real* rows = static_cast<const Real*>(errors.rows) + r * columns;
        for (int64_t at = 0; at < columns; at += part) {
            const int64_t size = least(part, columns - at);
            for (int64_t k = 0; k < count; ++k)
                divide(rows + k * columns + at, size, Shifted(errors, r + k), normalized + k * size);
            nearest_levels(normalized, count * size, known, values);
            for (int64_t k = 0; k < count; ++k) {
                square_differences(rows + k * columns + at, size, values + k * size, Shifted(errors, r + k),
                                   squares.data + at);
                if (at + size < columns) continue;
                if (errors.weights)
                    (errors.weights_dtype == FLOAT64 ? weigh<double> : weigh<float>)(errors.weights, (r + k) * columns,
                                                                                    columns, squares.data);
                errors.sums[r + k] = halved_sum(squares.data, columns);
            }
        }
    }
}

void rounding_errors(const RoundingErrors* errors, int64_t first, int64_t last) {
    (errors->dtype == FLOAT64 ? rounding_errors_of<double> : rounding_errors_of<float>)(*errors, first, last);
}

}  // namespace
