// Products of a few rows, which would wait for a decoded matrix on its way to memory and back.
#pragma once

#include "decoding.h"

#include <cstring>

namespace {

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

}  // namespace
