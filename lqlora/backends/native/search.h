// The scale of least error.
#pragma once

#include "decoding.h"
#include "nearest.h"
#include "sums.h"

#include <cstring>

namespace {

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
