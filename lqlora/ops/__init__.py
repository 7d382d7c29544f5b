"""Array API references of every hot operation: the documentation, and the oracle that overrides are held against.

Kernels see flat contiguous arrays: decisions about shapes, formats and padding are made above, in plain Python.
"""

from __future__ import annotations

from lqlora.ops.blocks import block_absmax, from_blocks, to_blocks
from lqlora.ops.casting import convert, dtype_name, storage_cast, stored_bytes, widen
from lqlora.ops.finite import require_finite, sum_of_squares
from lqlora.ops.lowrank import LowRank, exact_svd, low_rank_product, subspace_svd
from lqlora.ops.matmul import matmul_dense
from lqlora.ops.packing import pack_codes, packed_size, unpack_codes
from lqlora.ops.quantize import decode, encode, nearest_codes

__all__ = [
    "LowRank",
    "block_absmax",
    "convert",
    "decode",
    "dtype_name",
    "encode",
    "exact_svd",
    "from_blocks",
    "low_rank_product",
    "matmul_dense",
    "nearest_codes",
    "pack_codes",
    "packed_size",
    "require_finite",
    "storage_cast",
    "stored_bytes",
    "subspace_svd",
    "sum_of_squares",
    "to_blocks",
    "unpack_codes",
    "widen",
]
