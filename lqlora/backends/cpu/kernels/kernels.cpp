// The kernels of one instruction set. This file is compiled once for each of them, with LQLORA_ISA naming it: only the
// table at its end has external linkage. Otherwise the linker might keep the code of one set for all of them. For the
// same reason the file uses no templates of the standard library except constants.
//
// Results are those of lqlora.ops to the bit: no contraction of products and sums, division and not multiplication by
// the reciprocal, and sums in the order that lqlora.ops.row_sums defines. Products of matrices have an order of their
// own.
#include "blocks.h"
#include "crossing.h"
#include "decoding.h"
#include "encoding.h"
#include "level_sums.h"
#include "packing.h"
#include "products.h"
#include "rounding.h"
#include "search.h"
#include "sums.h"
#include "trellis.h"
#include "trellis_search.h"

#define LQLORA_JOIN(a, b) a##b
#define LQLORA_NAME(isa) LQLORA_JOIN(lqlora_kernels_, isa)
#define LQLORA_TEXT(isa) #isa
#define LQLORA_STRING(isa) LQLORA_TEXT(isa)

extern "C" const Kernels LQLORA_NAME(LQLORA_ISA);
const Kernels LQLORA_NAME(LQLORA_ISA) = {LQLORA_STRING(LQLORA_ISA), absmax, extremes, encode, decode, pack, unpack,
                                         row_sums, search, rounding_errors, level_maxima,
                                         level_sums, multiply, cross, widen, narrow, to_rank, add_from_rank,
                                         encode_trellis, decode_trellis, multiply_trellis};
