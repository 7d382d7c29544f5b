// Sums by level. Terms are rounded to integer multiples of a unit. The unit is so large that every partial sum is an
// integer of at most 2**52, which float64 holds exactly: the sums are the same in any order, on any number of threads.
#pragma once

#include "kernels.h"

namespace {

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

// Rounds to the nearest integer, ties to even, for magnitudes below 2**51. The spacing of float64 between 2**52 and
// 2**53 is one, so that adding 1.5 * 2**52 rounds the fraction away; subtracting it again is exact.
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

}  // namespace
