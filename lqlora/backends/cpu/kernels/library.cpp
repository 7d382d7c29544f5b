// The functions that Python calls. They choose the instruction set once, and distribute work over threads in ranges.
#include "kernels.h"
#include "ranges.h"
#include "sequences.h"

#include <cstring>
#include <mutex>
#include <vector>

extern "C" {
extern const Kernels lqlora_kernels_baseline;
#if defined(LQLORA_HAS_AVX2)
extern const Kernels lqlora_kernels_avx2;
#endif
#if defined(LQLORA_HAS_AVX512)
extern const Kernels lqlora_kernels_avx512;
#endif
}

namespace {

// Entries that a core's own cache holds until they are read again. Pieces of this size let one thread compute while
// another reads memory. If all threads first read everything and then computed, they would share the memory bandwidth.
constexpr int64_t kCached = 1 << 16;

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found{&lqlora_kernels_baseline};
#if defined(LQLORA_HAS_AVX2) || defined(LQLORA_HAS_AVX512)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#endif
#if defined(LQLORA_HAS_AVX2)
    if (v3) found.push_back(&lqlora_kernels_avx2);
#endif
#if defined(LQLORA_HAS_AVX512)
    if (v4) found.push_back(&lqlora_kernels_avx512);
#endif
    return found;
}

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> sets = supported();
    return sets;
}

// The set that loading.using() chose; null stands for the best one of this machine.
const Kernels* chosen = nullptr;

const Kernels& kernels() { return chosen ? *chosen : *available().back(); }

// Numbers as floats: where they lie, or widened copies.
struct Wide {
    Wide(const void* given, int32_t dtype, int64_t count) : values(static_cast<const float*>(given)) {
        if (dtype == FLOAT32) return;
        copies.resize(static_cast<size_t>(count));
        kernels().widen(static_cast<const uint16_t*>(given), dtype, count, copies.data());
        values = copies.data();
    }

    std::vector<float> copies;
    const float* values;
};

}  // namespace

// The hash of the sources that this library was compiled from. loading.py refuses the library if the sources changed
// since.
LQLORA_EXPORT const char* lqlora_sources() { return LQLORA_SOURCES; }

LQLORA_EXPORT int32_t lqlora_isa_count() { return static_cast<int32_t>(available().size()); }

LQLORA_EXPORT const char* lqlora_isa_name(int32_t index) { return available()[static_cast<size_t>(index)]->name; }

LQLORA_EXPORT const char* lqlora_isa_chosen() { return kernels().name; }

LQLORA_EXPORT int32_t lqlora_isa_choose(const char* name) {
    for (const Kernels* set : available()) {
        if (std::strcmp(set->name, name) == 0) {
            chosen = set;
            return 1;
        }
    }
    return 0;
}

LQLORA_EXPORT void lqlora_absmax(const void* values, int32_t dtype, int64_t count, int64_t block, void* out,
                                 int32_t threads) {
    const Blocks blocks{values, dtype, count, block};
    in_ranges((count + block - 1) / block, 1, count, threads,
              [&](int64_t first, int64_t last) { kernels().absmax(&blocks, first, last, out); });
}

LQLORA_EXPORT void lqlora_extremes(const void* values, int32_t dtype, int64_t count, int64_t block, void* low,
                                   void* high, int32_t threads) {
    const Blocks blocks{values, dtype, count, block};
    in_ranges((count + block - 1) / block, 1, count, threads,
              [&](int64_t first, int64_t last) { kernels().extremes(&blocks, first, last, low, high); });
}

LQLORA_EXPORT void lqlora_encode(const void* values, int32_t dtype, int64_t count, int64_t block, const void* scales,
                                 const uint8_t* zero_points, const float* boundaries, int32_t boundary_count,
                                 int32_t bits, uint8_t* packed, uint8_t* codes, int32_t threads) {
    const Encoding encoding{{values, dtype, count, block}, scales, zero_points, boundaries, boundary_count, bits,
                            packed, codes};
    in_ranges(count, 64, count, threads,
              [&](int64_t first, int64_t last) { kernels().encode(&encoding, first, last); });
}

LQLORA_EXPORT void lqlora_encode_by_absmax(const void* values, int32_t dtype, int64_t count, int64_t block, void* scales,
                                           const float* boundaries, int32_t boundary_count, int32_t bits,
                                           uint8_t* packed, int32_t threads) {
    const Encoding encoding{{values, dtype, count, block}, scales, nullptr, boundaries, boundary_count, bits, packed,
                            nullptr};
    int64_t unit = block;
    while (unit % 8) unit *= 2;  // whole blocks, and whole bytes of codes
    const int64_t step = unit * (kCached / unit > 1 ? kCached / unit : 1);
    in_ranges(count, unit, count, threads, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; at += step) {
            const int64_t stop = last - at < step ? last : at + step;
            kernels().absmax(&encoding.blocks, at / block, (stop + block - 1) / block, scales);
            kernels().encode(&encoding, at, stop);
        }
    });
}

LQLORA_EXPORT void lqlora_decode(const uint8_t* packed, const float* scales, const uint8_t* zero_points,
                                 const float* levels, int32_t level_count, int32_t bits, int64_t count, int64_t block,
                                 void* out, int32_t dtype, int32_t threads) {
    const Decoding decoding{packed, scales, zero_points, levels, level_count, bits, count, block, out, dtype};
    in_ranges(count, 64, count, threads,
              [&](int64_t first, int64_t last) { kernels().decode(&decoding, first, last); });
}

LQLORA_EXPORT void lqlora_pack(const uint8_t* codes, int32_t bits, int64_t count, uint8_t* packed, int32_t threads) {
    in_ranges(count, 64, count, threads,
              [&](int64_t first, int64_t last) { kernels().pack(codes, bits, first, last, packed); });
}

LQLORA_EXPORT void lqlora_unpack(const uint8_t* packed, int32_t bits, int64_t count, uint8_t* codes, int32_t threads) {
    in_ranges(count, 64, count, threads,
              [&](int64_t first, int64_t last) { kernels().unpack(packed, bits, count, first, last, codes); });
}

LQLORA_EXPORT void lqlora_row_sums(const void* rows, int32_t dtype, int64_t count, int64_t columns, void* sums,
                                   int32_t threads) {
    in_ranges(count, 1, count * columns, threads,
              [&](int64_t first, int64_t last) { kernels().row_sums(rows, dtype, columns, first, last, sums); });
}

LQLORA_EXPORT void lqlora_search(const float* rows, const float* weights, int64_t count, int64_t columns,
                                 const float* zero_points, const float* levels, const float* boundaries,
                                 int32_t level_count, const float* ratios, int32_t ratio_count, int32_t refinements,
                                 float* best, int32_t threads) {
    const Search search{rows, weights, columns, zero_points, levels, boundaries, level_count, ratios, ratio_count,
                        refinements, best};
    in_ranges(count, 1, count * columns * ratio_count, threads,
              [&](int64_t first, int64_t last) { kernels().search(&search, first, last); },
              4 * threads);  // each range begins with a table for every ratio
}

LQLORA_EXPORT void lqlora_rounding_errors(const void* rows, int32_t dtype, const void* weights, int32_t weights_dtype,
                                          int64_t count, int64_t columns, const float* scales,
                                          const uint8_t* zero_points, const float* levels, const float* boundaries,
                                          int32_t level_count, double* sums, int32_t threads) {
    const RoundingErrors errors{rows, dtype, weights, weights_dtype, columns, scales, zero_points, levels, boundaries,
                                level_count, sums};
    in_ranges(count, 1, count * columns, threads,
              [&](int64_t first, int64_t last) { kernels().rounding_errors(&errors, first, last); });
}

LQLORA_EXPORT void lqlora_multiply(const float* x, int64_t x_rows, int64_t rows, int64_t columns,
                                   const uint8_t* packed, const float* scales, const uint8_t* zero_points,
                                   const float* levels, int32_t level_count, int32_t bits, int64_t block, float* out,
                                   int32_t threads) {
    const Decoding matrix{packed, scales, zero_points, levels, level_count, bits, rows * columns, block, nullptr,
                          FLOAT32};
    const Product product{matrix, x, x_rows, rows, columns, out};
    in_ranges(rows, 1, rows * columns, threads,
              [&](int64_t first, int64_t last) { kernels().multiply(&product, first, last); });
}

// A product with a quantized weight and with low-rank factors in one call: below a thousand rows and columns, calls take as
// long as their work. Numbers of 16 bits are widened first, and the results are rounded once. If `scale_codes` is not
// null, scales are decoded first, from their codes and second-level `scales`.
LQLORA_EXPORT void lqlora_linear(const void* x, int32_t dtype, int64_t x_rows, int64_t rows, int64_t columns,
                                 const uint8_t* packed, const float* scales, const float* levels, int32_t level_count,
                                 int32_t bits, int64_t block, const uint8_t* scale_codes, const float* scale_levels,
                                 int32_t scale_level_count, int32_t scale_bits, int64_t scale_block,
                                 const float* offset, const void* lora_A, const void* lora_B, int32_t factor_dtype,
                                 int64_t rank, double scaling, void* out, int32_t threads) {
    const int64_t count = rows * columns, blocks = (count + block - 1) / block;
    std::vector<float> decoded(static_cast<size_t>(scale_codes ? blocks : 0));
    if (scale_codes) {
        const Decoding decoding{scale_codes, scales, nullptr, scale_levels, scale_level_count, scale_bits, blocks,
                                scale_block, decoded.data(), FLOAT32};
        in_ranges(blocks, 64, blocks, threads,
                  [&](int64_t first, int64_t last) { kernels().decode(&decoding, first, last); });
        // The sum is rounded to float32 by itself, as the format prescribes.
        if (offset)
            for (float& scale : decoded) scale += *offset;
        scales = decoded.data();
    }
    const Wide inputs(x, dtype, x_rows * columns);
    const Wide inner(lora_A, factor_dtype, rank * columns), outer(lora_B, factor_dtype, rows * rank);
    std::vector<float> sums(static_cast<size_t>(dtype == FLOAT32 ? 0 : x_rows * rows));
    float* results = dtype == FLOAT32 ? static_cast<float*>(out) : sums.data();
    const Decoding matrix{packed, scales, nullptr, levels, level_count, bits, count, block, nullptr, FLOAT32};
    const Product product{matrix, inputs.values, x_rows, rows, columns, results};
    std::vector<float> narrow(static_cast<size_t>(x_rows * rank));
    const LowRank low_rank{inputs.values, x_rows, rows, columns, inner.values, outer.values, rank,
                           static_cast<float>(scaling), narrow.data(), results};
    kernels().to_rank(&low_rank);
    in_ranges(rows, 1, count, threads, [&](int64_t first, int64_t last) {
        kernels().multiply(&product, first, last);
        kernels().add_from_rank(&low_rank, first, last);
    });
    if (dtype != FLOAT32) kernels().narrow(results, dtype, x_rows * rows, static_cast<uint16_t*>(out));
}

// The work of a search is a visit of every state for each weight.
LQLORA_EXPORT void lqlora_encode_trellis(const void* values, int32_t dtype, const void* scales, const float* importance,
                                         const float* levels, int32_t state_bits, int32_t bits, int64_t count,
                                         int64_t length, int64_t block, uint8_t* codes, int32_t threads) {
    const TrellisEncoding encoding{{levels, state_bits, bits, count, length, block}, values, dtype, scales, importance,
                                   codes};
    in_ranges(sequence_count(encoding.trellis), kSequencesAtOnce, count << state_bits, threads,
              [&](int64_t first, int64_t last) { kernels().encode_trellis(&encoding, first, last); },
              4 * threads);  // each range allocates its own sums
}

LQLORA_EXPORT void lqlora_decode_trellis(const uint8_t* packed, const float* scales, const float* levels,
                                         int32_t state_bits, int32_t bits, int64_t count, int64_t length, int64_t block,
                                         void* out, int32_t dtype, int32_t threads) {
    const TrellisDecoding decoding{{levels, state_bits, bits, count, length, block}, packed, scales, out, dtype};
    in_ranges(sequence_count(decoding.trellis), 1, count, threads,
              [&](int64_t first, int64_t last) { kernels().decode_trellis(&decoding, first, last); });
}

LQLORA_EXPORT void lqlora_multiply_trellis(const float* x, int64_t x_rows, int64_t rows, int64_t columns,
                                           const uint8_t* packed, const float* scales, const float* levels,
                                           int32_t state_bits, int32_t bits, int64_t length, int64_t block, float* out,
                                           int32_t threads) {
    const TrellisDecoding matrix{{levels, state_bits, bits, rows * columns, length, block}, packed, scales, nullptr,
                                 FLOAT32};
    const TrellisProduct product{matrix, x, x_rows, rows, columns, out};
    in_ranges(rows, 1, rows * columns, threads,
              [&](int64_t first, int64_t last) { kernels().multiply_trellis(&product, first, last); });
}

LQLORA_EXPORT void lqlora_cross(const void* source, void* target, int64_t rows, int64_t columns, int64_t source_step,
                                int64_t target_step, int32_t width, int32_t threads) {
    const Crossing crossing{source, target, columns, source_step, target_step, width};
    in_ranges(rows, 8, rows * columns, threads,
              [&](int64_t first, int64_t last) { kernels().cross(&crossing, first, last); });
}

LQLORA_EXPORT void lqlora_level_maxima(const float* rows, const float* weights, const double* importance,
                                       const float* ratios, int64_t count, int64_t columns, double* maxima,
                                       int32_t threads) {
    const Levels levels{rows, weights, importance, ratios, nullptr, nullptr, columns, 0};
    std::mutex mutex;
    maxima[0] = maxima[1] = 0;
    in_ranges(count, 1, count * columns, threads, [&](int64_t first, int64_t last) {
        double own[2];
        kernels().level_maxima(&levels, first, last, own, own + 1);
        const std::lock_guard<std::mutex> lock(mutex);
        for (int k = 0; k < 2; ++k) maxima[k] = own[k] > maxima[k] || own[k] != own[k] ? own[k] : maxima[k];
    });
}

// Every range adds integers of its own, and the lock serializes only their merging. Sums of integers are exact, so the
// order in which ranges finish does not matter.
LQLORA_EXPORT void lqlora_level_sums(const float* rows, const float* weights, const double* importance,
                                     const float* ratios, const uint8_t* codes, const int64_t* sets, int64_t count,
                                     int64_t columns, int64_t size, int64_t set_count, double above_unit,
                                     double below_unit, double* above, double* below, int32_t threads) {
    const Levels levels{rows, weights, importance, ratios, codes, sets, columns, size};
    const size_t bins = static_cast<size_t>(size * set_count);
    std::mutex mutex;
    in_ranges(count, 1, count * columns, threads, [&](int64_t first, int64_t last) {
        std::vector<double> own(2 * bins);
        kernels().level_sums(&levels, first, last, above_unit, below_unit, own.data(), own.data() + bins);
        const std::lock_guard<std::mutex> lock(mutex);
        for (size_t bin = 0; bin < bins; ++bin) {
            above[bin] += own[bin];
            below[bin] += own[bins + bin];
        }
    }, threads);  // each range allocates its own sums: no more ranges than threads
}
