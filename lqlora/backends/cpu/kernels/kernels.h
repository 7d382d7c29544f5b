// The interface of the kernels: their arguments, and the table of functions that each instruction set provides. Plain C
// types only: a type with inline functions would be compiled once per instruction set, and the linker would keep one of
// the copies for all.
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, FLOAT64 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

// A flat array in blocks of `block` entries; the last one may be short.
struct Blocks {
    const void* values;
    int32_t dtype;
    int64_t count;
    int64_t block;
};

// Scales are of float, of double for values of double. Either `packed` or `codes` is written.
struct Encoding {
    Blocks blocks;
    const void* scales;
    const uint8_t* zero_points;  // or null
    const float* boundaries;
    int32_t boundary_count;
    int32_t bits;
    uint8_t* packed;
    uint8_t* codes;
};

struct Decoding {
    const uint8_t* packed;
    const float* scales;
    const uint8_t* zero_points;  // or null
    const float* levels;
    int32_t level_count;
    int32_t bits;
    int64_t count;
    int64_t block;
    void* out;
    int32_t dtype;
};

// A few rows times a matrix that is decoded as above, row by row: `out[m * rows + r]` is row m of x times row r of it.
// Its rows begin with a byte: `columns` is a multiple of eight.
struct Product {
    Decoding matrix;
    const float* x;
    int64_t x_rows;
    int64_t rows;
    int64_t columns;
    float* out;
};

// The product of a few rows with low-rank factors: `narrow = x @ lora_A.T`, and `out += scaling * narrow @ lora_B.T`.
struct LowRank {
    const float* x;
    int64_t x_rows;
    int64_t rows;
    int64_t columns;
    const float* lora_A;
    const float* lora_B;
    int64_t rank;
    float scaling;
    float* narrow;
    float* out;
};

// Rows of floats, each already divided by a first scale. The search finds the factor of that scale with the least
// error.
struct Search {
    const float* rows;
    const float* weights;  // of the squared errors, or null
    int64_t columns;
    const float* zero_points;  // one for each row, or null
    const float* levels;
    const float* boundaries;
    int32_t level_count;
    const float* ratios;
    int32_t ratio_count;
    int32_t refinements;
    float* best;
};

// Rows that are encoded and decoded, each with its scale, to measure the error. `dtype` is the dtype of the rows.
struct RoundingErrors {
    const void* rows;
    int32_t dtype;
    const void* weights;  // of the squared errors, or null
    int32_t weights_dtype;
    int64_t columns;
    const float* scales;
    const uint8_t* zero_points;  // one for each row, or null
    const float* levels;
    const float* boundaries;
    int32_t level_count;
    double* sums;
};

// Rows whose entries are summed by the level that their codes name, `size` levels in each set.
struct Levels {
    const float* rows;
    const float* weights;  // or null
    const double* importance;
    const float* ratios;
    const uint8_t* codes;
    const int64_t* sets;
    int64_t columns;
    int64_t size;
};

// `target[i * target_step + j] = source[j * source_step + i]`, of words of two, four or eight bytes. Steps are in
// words.
struct Crossing {
    const void* source;
    void* target;
    int64_t columns;
    int64_t source_step;
    int64_t target_step;
    int32_t width;
};

// An array in trellis codes. Each line of `length` weights is cut into blocks of `block`, and each block into sequences
// of at most kSequence. The state of a weight has `state_bits` bits, of which its code is the highest `bits`.
struct Trellis {
    const float* levels;  // of the states
    int32_t state_bits;
    int32_t bits;
    int64_t count;
    int64_t length;
    int64_t block;
};

// Scales are of float, of double for values of double. Codes are bytes.
struct TrellisEncoding {
    Trellis trellis;
    const void* values;
    int32_t dtype;
    const void* scales;
    const float* importance;  // factors of the squared errors, or null
    uint8_t* codes;
};

struct TrellisDecoding {
    Trellis trellis;
    const uint8_t* packed;
    const float* scales;
    void* out;
    int32_t dtype;
};

// A few rows times a matrix in trellis codes, whose rows begin with a sequence. Otherwise as Product.
struct TrellisProduct {
    TrellisDecoding matrix;
    const float* x;
    int64_t x_rows;
    int64_t rows;
    int64_t columns;
    float* out;
};

// Each function works on a range of blocks, of weights (from a multiple of eight), of sequences
// or of rows.
struct Kernels {
    const char* name;
    void (*absmax)(const Blocks*, int64_t first, int64_t last, void* out);
    void (*extremes)(const Blocks*, int64_t first, int64_t last, void* low, void* high);
    void (*encode)(const Encoding*, int64_t first, int64_t last);
    void (*decode)(const Decoding*, int64_t first, int64_t last);
    void (*pack)(const uint8_t* codes, int32_t bits, int64_t first, int64_t last, uint8_t* packed);
    void (*unpack)(const uint8_t* packed, int32_t bits, int64_t count, int64_t first, int64_t last, uint8_t* codes);
    void (*row_sums)(const void* rows, int32_t dtype, int64_t columns, int64_t first, int64_t last, void* sums);
    void (*search)(const Search*, int64_t first, int64_t last);
    void (*rounding_errors)(const RoundingErrors*, int64_t first, int64_t last);
    void (*level_maxima)(const Levels*, int64_t first, int64_t last, double* above, double* below);
    void (*level_sums)(const Levels*, int64_t first, int64_t last, double above_unit, double below_unit, double* above,
                       double* below);
    void (*multiply)(const Product*, int64_t first, int64_t last);
    void (*cross)(const Crossing*, int64_t first, int64_t last);
    void (*widen)(const uint16_t* values, int32_t dtype, int64_t count, float* wide);
    void (*narrow)(const float* values, int32_t dtype, int64_t count, uint16_t* stored);
    void (*to_rank)(const LowRank*);
    void (*add_from_rank)(const LowRank*, int64_t first, int64_t last);
    void (*encode_trellis)(const TrellisEncoding*, int64_t first, int64_t last);
    void (*decode_trellis)(const TrellisDecoding*, int64_t first, int64_t last);
    void (*multiply_trellis)(const TrellisProduct*, int64_t first, int64_t last);
};
