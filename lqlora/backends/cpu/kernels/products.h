// Products of a few rows of inputs and a packed matrix. The matrix is decoded in registers, or in a stripe of the
// first-level cache: for a few rows, writing the decoded matrix to memory and reading it back would take longer than
// the product.
#pragma once

#include "decoding.h"

namespace {

// Number of partial sums of a product: term i of a stretch is added to sum i % 32. As every register width divides 32,
// the order of additions, and so the result, is the same on every instruction set.
constexpr int kSums = 32;

float halved(float sums[kSums]) {
    for (int half = kSums / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[half + k];
    return sums[0];
}

float dot(const float* a, const float* b, int64_t count) {
    float sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums)
        for (int k = 0; k < kSums; ++k) sums[k] += a[i + k] * b[i + k];
    for (int k = 0; i < count; ++i, ++k) sums[k] += a[i] * b[i];
    return halved(sums);
}

using Adding = void (*)(const Product&, const float*, int64_t, int64_t, int64_t);

#if defined(__AVX2__)
// Products of `kRows` rows of inputs with runs of decoded values, which never leave the registers.
template <typename Lookup, int kBits, int kRows>
struct Dots {
    static constexpr int kLanes = Lookup::kLanes, kStep = kLanes / 8 * kBits, kParts = kSums / kLanes;
    const float* x;
    int64_t columns;
    typename Lookup::Register sums[kRows][kParts] = {};

    void operator()(const Lookup& cells, const uint8_t* packed, int64_t count) {
        for (const float* stop = x + count; x < stop; x += kSums, packed += kParts * kStep) {
            for (int k = 0; k < kParts; ++k) {
                const typename Lookup::Register values = cells.of(packed + k * kStep);
                for (int m = 0; m < kRows; ++m) sums[m][k] += values * Lookup::load(x + m * columns + k * kLanes);
            }
        }
    }
};

// Adds the products of a stretch of a row.
template <int kBits, int kRows>
void add_products(const Product& product, const float* levels, int64_t row, int64_t at, int64_t size) {
    using Own = Dots<Wide<kBits>, kBits, kRows>;
    const int64_t first = row * product.columns + at;
    Own dots{product.x + at, product.columns};
    each_run<Wide<kBits>, kBits>(product.matrix, levels, first, first + size, dots);
    for (int m = 0; m < kRows; ++m) {
        float sums[kSums];
        for (int k = 0; k < Own::kParts; ++k) Wide<kBits>::store(sums + k * Own::kLanes, dots.sums[m][k]);
        product.out[m * product.rows + row] += halved(sums);
    }
}

// Rows of inputs whose sums fit into registers. With AVX2 a row has four registers of sums: three rows take twelve of
// the sixteen. With AVX-512 a row has two: four rows take eight of 32, and the levels need many of the others.
constexpr int64_t kRowsAtOnce = kSums / Wide<4>::kLanes == 2 ? 4 : 3;

template <int kBits>
Adding adding(int64_t rows) {
    constexpr Adding by_rows[] = {add_products<kBits, 1>, add_products<kBits, 2>, add_products<kBits, 3>,
                                  add_products<kBits, kRowsAtOnce>};
    return by_rows[rows - 1];
}

// Returns the function that adds products in registers. Null if blocks or rows are not whole groups of 32, or if the
// codes have too many bits for a table in registers.
Adding adding_in_registers(const Decoding& matrix, int64_t rows, int64_t columns) {
    using Choosing = Adding (*)(int64_t);
    constexpr Choosing by_bits[] = {adding<1>, adding<2>, adding<3>, adding<4>,
#if defined(__AVX512F__)
                                    adding<5>, adding<6>, adding<7>
#endif
    };
    const bool are_filled = matrix.block % kSums == 0 && columns % kSums == 0;
    return are_filled && matrix.bits <= kMostInRegisters ? by_bits[matrix.bits - 1](rows) : nullptr;
}
#else
constexpr int64_t kRowsAtOnce = 1;

Adding adding_in_registers(const Decoding&, int64_t, int64_t) { return nullptr; }
#endif

void multiply_some(const Product& product, int64_t first, int64_t last) {
    const Decoding& matrix = product.matrix;
    const LevelTable table(matrix);
    const uint8_t* end = matrix.packed + (matrix.count * matrix.bits + 7) / 8;
    const Adding add = adding_in_registers(matrix, least(product.x_rows, kRowsAtOnce), product.columns);
    float weights[kStripe];
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * product.columns;
        // A register reads up to 16 bytes from where its codes begin. Near the end of the matrix these may lie beyond
        // the array, so the last rows go through a stripe.
        const bool in_registers = add && end - matrix.packed >= (begin + product.columns) / 8 * matrix.bits + 16;
        for (int64_t m = 0; m < product.x_rows; ++m) product.out[m * product.rows + row] = 0;
        for (int64_t at = 0; at < product.columns; at += kStripe) {
            const int64_t size = least(kStripe, product.columns - at);
            if (in_registers) {
                add(product, table.levels, row, at, size);
                continue;
            }
            decode_stripe(matrix, end, table.levels, begin + at, begin + at + size, false, weights);
            for (int64_t m = 0; m < product.x_rows; ++m)
                product.out[m * product.rows + row] += dot(weights, product.x + m * product.columns + at, size);
        }
    }
}

void multiply(const Product* product, int64_t first, int64_t last) {
    const bool in_registers = adding_in_registers(product->matrix, 1, product->columns) != nullptr;
    const int64_t step = in_registers ? kRowsAtOnce : product->x_rows;
    for (int64_t m = 0; m < product->x_rows; m += step) {
        Product some = *product;
        some.x_rows = least(step, product->x_rows - m);
        some.x += m * product->columns;
        some.out += m * product->rows;
        multiply_some(some, first, last);
    }
}

void to_rank(const LowRank* product) {
    for (int64_t m = 0; m < product->x_rows; ++m)
        for (int64_t r = 0; r < product->rank; ++r)
            product->narrow[m * product->rank + r] =
                dot(product->x + m * product->columns, product->lora_A + r * product->columns, product->columns);
}

// Number of partial sums of a product with a row of `lora_B`, which is short.
constexpr int kShortSums = 8;

void add_from_rank(const LowRank* product, int64_t first, int64_t last) {
    const int64_t rank = product->rank, whole = rank - rank % kShortSums;
    for (int64_t m = 0; m < product->x_rows; ++m) {
        const float* narrow = product->narrow + m * rank;
        for (int64_t row = first; row < last; ++row) {
            const float* outer = product->lora_B + row * rank;
            float sums[kShortSums] = {};
            for (int64_t i = 0; i < whole; i += kShortSums)
                for (int k = 0; k < kShortSums; ++k) sums[k] += narrow[i + k] * outer[i + k];
            for (int64_t i = whole; i < rank; ++i) sums[i - whole] += narrow[i] * outer[i];
            for (int half = kShortSums / 2; half; half /= 2)
                for (int k = 0; k < half; ++k) sums[k] += sums[half + k];
            product->out[m * product->rows + row] += product->scaling * sums[0];
        }
    }
}

}  // namespace
