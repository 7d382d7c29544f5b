// Search for the scale of least error: each row tries the ratios of a grid, then refines the best one by least squares.
#pragma once

#include "lanes.h"
#include "nearest.h"
#include "sums.h"
#include "tables.h"

#include <cstring>

namespace {

struct Row {
    const float* entries;
    const float* weights;  // or null
    int64_t count;
    bool has_zero;
    float zero;
    float* scratch;   // `count` floats each
    float* values;    // nearest values with the ratio that was tried last
    uint8_t* codes;
};

struct Rounding {
    Boundaries<float> boundaries;
    float levels[256];

    explicit Rounding(const Search& search) : boundaries(search.boundaries, search.level_count - 1), levels{} {
        std::memcpy(levels, search.levels, static_cast<size_t>(search.level_count) * sizeof(float));
        for (int j = 1 << boundaries.bits; j < 16; ++j) levels[j] = levels[j - (1 << boundaries.bits)];
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

// Writes the weighted squared errors of the values to `scratch`.
void square_errors(const Row& row, float ratio) {
    for (int64_t i = 0; i < row.count; ++i) {
        const float difference = row.entries[i] - ratio * row.values[i];
        row.scratch[i] = difference * difference;
    }
    if (row.weights)
        for (int64_t i = 0; i < row.count; ++i) row.scratch[i] = row.weights[i] * row.scratch[i];
}

// Returns the least-squares ratio of the current values v, sum(w * v * x) / sum(w * v * v). Returns the old ratio if
// the new one has another sign or is not finite.
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

// Tries all ratios and then the refinements. `round(ratio, k)` writes the values and squared errors of the row; k is
// the index of the ratio in the grid, or -1 for a refined one. Only a strictly smaller error replaces the best, as in
// the reference.
template <typename Round>
float best_ratio(const Row& row, const Search& search, const Round& round) {
    float best = search.ratios[0], error = 0;
    for (int32_t k = 0; k < search.ratio_count; ++k) {
        round(search.ratios[k], k);
        const float own = halved_sum(row.scratch, row.count);
        if (k == 0 || own < error) {
            best = search.ratios[k];
            error = own;
        }
    }
    for (int32_t k = 0; k < search.refinements; ++k) {
        round(best, -1);
        const float refined = least_squares(row, best);
        round(refined, -1);
        const float own = halved_sum(row.scratch, row.count);
        if (own < error) {
            best = refined;
            error = own;
        }
    }
    return best;
}

// --- The same in registers

#if defined(__AVX512F__)
constexpr int kMostSearched = 8;

template <int kBits>
__m512 nearest_level(__m512 compared, const float* tree, const float* levels) {
    __m512i found;
    take_steps<1, kBits, 1>(&compared, tree, &found);
    return entries<1 << kBits>(levels, found);
}
#elif defined(__AVX2__)
constexpr int kMostSearched = 4;

template <int kBits>
__m256 nearest_level(__m256 compared, const float* tree, const float* levels) {
    const __m256 first = _mm256_loadu_ps(tree), last = _mm256_loadu_ps(tree + 8);
    __m256i found = _mm256_set1_epi32(1);  // index in the tree: 1 is the root, node n has the children 2n and 2n + 1
    for (int done = 0; done < kBits; ++done) {
        const __m256 boundary = _mm256_permutevar8x32_ps(done < 3 ? first : last, found);
        found = _mm256_sub_epi32(_mm256_add_epi32(found, found), above(compared, boundary));
    }
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), found);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), found);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(found, 28)));
}
#endif

// Returns the float that is `steps` places after a value. Signed floats are ordered by magnitude; `lowest - bits` maps
// the negative ones to integers in their numerical order, so that a step is an addition.
float after(float value, int32_t steps) {
    const int32_t bits = bits_as<int32_t>(value), lowest = std::numeric_limits<int32_t>::min();
    const int32_t order = (bits < 0 ? lowest - bits : bits) + steps;
    return bits_as<float>(order < 0 ? lowest - order : order);
}

// Finds the largest number whose rounded quotient with a positive ratio is not above a boundary. The quotient rises
// with the number, so this is a threshold, and it lies a step or two from the product. The threshold of a boundary of
// zero is zero: the smallest positive number divided by a ratio of up to 1.5 does not round to zero.
bool find_last_below(float boundary, float ratio, float* last) {
    constexpr int kSteps = 8;
    int steps = 0;
    *last = boundary * ratio;
    if (boundary == 0) return true;
    for (; *last / ratio > boundary && steps < kSteps; ++steps) *last = after(*last, -1);
    for (; after(*last, 1) / ratio <= boundary && steps < kSteps; ++steps) *last = after(*last, 1);
    return steps < kSteps;
}

// Thresholds of the undivided entries for one ratio. Comparing an entry with these gives the code of the rounded
// quotient without a division. If `divides`, the thresholds could not be found, and quotients are compared with the
// boundaries. A negative ratio uses the thresholds of its magnitude, and entries of the opposite sign.
struct Cuts {
    bool divides;
    float tree[256];

    Cuts() : divides(true), tree{} {}

    void move(const Boundaries<float>& boundaries, float ratio) {
        if (!can_be_moved(boundaries, ratio)) return;
        float table[256];
        std::memcpy(table, boundaries.table, sizeof(table));
        for (int i = 0; i < boundaries.count; ++i)
            if (!find_last_below(boundaries.table[i], ratio < 0 ? -ratio : ratio, table + i)) return;
        Boundaries<float>::plant(table, boundaries.bits, tree);
        divides = false;
    }

    // True if all quotients near a boundary are zero or normal numbers: subnormal ones are rounded with a coarser step.
    static bool can_be_moved(const Boundaries<float>& boundaries, float ratio) {
        const float size = ratio < 0 ? -ratio : ratio;
        if (!(size >= 0x1p-20f && size <= 1.5f)) return false;
        for (int i = 0; i < boundaries.count; ++i) {
            const float own = boundaries.table[i] < 0 ? -boundaries.table[i] : boundaries.table[i];
            if (!(own == 0 || (own >= 0x1p-60f && own <= 0x1p20f))) return false;
        }
        return true;
    }
};

using Searching = float (*)(const Row&, const Rounding&, const Cuts*, const Search&);

#if defined(__AVX2__)
// Rounds the entries to `values`, and writes the weighted squared errors to `scratch`.
template <int kBits, bool kDivides>
void round_in_registers(const Row& row, const Rounding& rounding, const float* tree, float ratio) {
    using Register = Lanes::Register;
    const Register factor = Lanes::all(ratio), sign = Lanes::all(ratio < 0 ? -1.0f : 1.0f), zero = Lanes::all(row.zero);
    for (int64_t i = 0; i < row.count; i += Lanes::kCount) {
        const Register own = Lanes::load(row.entries + i), compared = kDivides ? own / factor + zero : own * sign;
        Register value = nearest_level<kBits>(compared, tree, rounding.levels);
        if constexpr (kDivides) value = value - zero;
        const Register difference = own - factor * value, square = difference * difference;
        Lanes::store(row.values + i, value);
        Lanes::store(row.scratch + i, row.weights ? Lanes::load(row.weights + i) * square : square);
    }
}

template <int kBits>
float best_in_registers(const Row& row, const Rounding& rounding, const Cuts* cuts, const Search& search) {
    return best_ratio(row, search, [&](float ratio, int32_t k) {
        if (k < 0 || cuts[k].divides) round_in_registers<kBits, true>(row, rounding, rounding.boundaries.tree, ratio);
        else round_in_registers<kBits, false>(row, rounding, cuts[k].tree, ratio);
    });
}

// Returns the function that searches rows of whole registers; null for other rows, and for codes of too many bits.
Searching searching_in_registers(const Rounding& rounding, int64_t columns) {
    constexpr Searching by_bits[] = {best_in_registers<1>, best_in_registers<2>, best_in_registers<3>, best_in_registers<4>,
#if defined(__AVX512F__)
                                     best_in_registers<5>, best_in_registers<6>, best_in_registers<7>, best_in_registers<8>
#endif
    };
    const int bits = rounding.boundaries.bits;
    return columns % Lanes::kCount == 0 && bits <= kMostSearched ? by_bits[bits - 1] : nullptr;
}
#else
Searching searching_in_registers(const Rounding&, int64_t) { return nullptr; }
#endif

// From this many entries on, finding the thresholds of every ratio takes less time than the divisions that they save.
constexpr int64_t kWorthMoving = 1 << 10;

void search(const Search* search, int64_t first, int64_t last) {
    const Rounding rounding(*search);
    const int64_t columns = search->columns;
    const Buffer<float> floats(2 * columns);
    const Buffer<uint8_t> codes(columns);
    const Searching in_registers = searching_in_registers(rounding, columns);
    const Buffer<Cuts> cuts(search->ratio_count);
    if (in_registers && !search->zero_points && (last - first) * columns >= kWorthMoving)
        for (int32_t k = 0; k < search->ratio_count; ++k) cuts.data[k].move(rounding.boundaries, search->ratios[k]);
    for (int64_t r = first; r < last; ++r) {
        const float* weights = search->weights ? search->weights + r * columns : nullptr;
        const float zero = search->zero_points ? search->zero_points[r] : 0.0f;
        const Row row{search->rows + r * columns, weights, columns, search->zero_points != nullptr, zero,
                      floats.data, floats.data + columns, codes.data};
        search->best[r] = in_registers ? in_registers(row, rounding, cuts.data, *search)
                                       : best_ratio(row, *search, [&](float ratio, int32_t) {
                                             round_row(row, rounding, ratio);
                                             square_errors(row, ratio);
                                         });
    }
}

}  // namespace
