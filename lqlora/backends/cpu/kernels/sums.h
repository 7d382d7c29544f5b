// Sums of rows in the order that lqlora.ops.row_sums defines: term i and term i + half are added, until one term is
// left.
#pragma once

#include "numbers.h"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

template <typename Real>
Real halved_sum(Real* terms, int64_t count) {
    if (count == 0) return 0;
    while (count > 1) {
        const int64_t half = count / 2, odd = count % 2;
        // The halves do not overlap, which GCC cannot prove: the loop reads and writes one array.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
        for (int64_t i = 0; i < half; ++i) terms[i] += terms[half + i];
        if (odd) terms[half] = terms[2 * half];
        count = half + odd;
    }
    return terms[0];
}

#if defined(__AVX2__)
// Eight at a time as long as both halves are whole registers: most rows are of 64 or 128 entries.
float halved_sum(float* terms, int64_t count) {
    while (count > 16 && count % 16 == 0) {
        const int64_t half = count / 2;
        for (int64_t i = 0; i < half; i += 8)
            _mm256_storeu_ps(terms + i, _mm256_add_ps(_mm256_loadu_ps(terms + i), _mm256_loadu_ps(terms + half + i)));
        count = half;
    }
    if (count != 16) return halved_sum<float>(terms, count);
    const __m256 eight = _mm256_add_ps(_mm256_loadu_ps(terms), _mm256_loadu_ps(terms + 8));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

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

}  // namespace
