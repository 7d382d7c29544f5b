"""Reference implementations of all operations in the array API: overrides must return the same bytes.

Operations take flat arrays; their callers know shapes, formats and padding. ``coding`` divides weights by their scale and
finds the codes, ``packing`` packs the codes, ``search`` fits the scale of a block.
"""

from __future__ import annotations

from lqlora._dispatch import dtype_name, is_contiguous, is_on_host
from lqlora.ops.blocks import block_absmax, block_extremes, from_blocks, to_blocks
from lqlora.ops.casting import (
    convert,
    native_dtype,
    require_float,
    storage_cast,
    stored_bytes,
    widen,
)
from lqlora.ops.coding import (
    PackedBlocks,
    boundaries_by_set,
    decode,
    encode,
    encode_by_absmax,
    encode_packed,
    nearest_codes,
    nearest_codes_by_row,
    normalize,
    values_by_row,
)
from lqlora.ops.finite import is_finite, power_of_four, require_finite, sum_of_squares
from lqlora.ops.lowrank import LowRank, exact_svd, low_rank_product, subspace_svd
from lqlora.ops.matmul import add_low_rank, factor_dtype, matmul_dense, matmul_packed, matmul_trellis
from lqlora.ops.moments import symmetric_moment
from lqlora.ops.packing import pack_codes, packed_size, unpack_codes
from lqlora.ops.rotation import rotate, rotate_rows, rotated_importance, rotated_moment
from lqlora.ops.rounding import rounding_errors, wide_errors
from lqlora.ops.search import best_ratios, least_squares, search_ratios, squared_errors
from lqlora.ops.slices import copy_across, put_flat, take_flat
from lqlora.ops.sums import bin_sums, level_sums, row_sums
from lqlora.ops.tables import pick, table_beside
from lqlora.ops.trellis import PackedTrellis, decode_trellis, encode_trellis

__all__ = [
    "LowRank",
    "PackedBlocks",
    "PackedTrellis",
    "add_low_rank",
    "best_ratios",
    "bin_sums",
    "block_absmax",
    "block_extremes",
    "boundaries_by_set",
    "convert",
    "copy_across",
    "decode",
    "decode_trellis",
    "dtype_name",
    "encode",
    "encode_by_absmax",
    "encode_packed",
    "encode_trellis",
    "exact_svd",
    "factor_dtype",
    "from_blocks",
    "is_contiguous",
    "is_finite",
    "is_on_host",
    "least_squares",
    "level_sums",
    "low_rank_product",
    "matmul_dense",
    "matmul_packed",
    "matmul_trellis",
    "native_dtype",
    "nearest_codes",
    "nearest_codes_by_row",
    "normalize",
    "pack_codes",
    "packed_size",
    "pick",
    "power_of_four",
    "put_flat",
    "require_finite",
    "require_float",
    "rotate",
    "rotate_rows",
    "rotated_importance",
    "rotated_moment",
    "rounding_errors",
    "row_sums",
    "search_ratios",
    "squared_errors",
    "storage_cast",
    "stored_bytes",
    "subspace_svd",
    "sum_of_squares",
    "symmetric_moment",
    "table_beside",
    "take_flat",
    "to_blocks",
    "unpack_codes",
    "values_by_row",
    "wide_errors",
    "widen",
]
