"""NumPy overrides that keep their workspace in the cache. ``benchmarks/quantize.py`` has the rows that justify them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora.ops.packing import pack_codes, packed_size, unpack_codes
from lqlora.ops.quantize import decode, encode

if TYPE_CHECKING:
    import numpy.typing as npt

__all__: list[str] = []

#: Weights handled at a time: float32 values, comparison and codes of a chunk fit into a second-level cache.
_CHUNK = 32768

#: Up to this many boundaries, counting beats a binary search here.
_FEW = 63

#: Bits of packed codes looked up at a time. 2**12 rows of the widest table (12 codes of 1 bit) are 192 KiB.
_LOOKUP_BITS = 12


def _encode_accepts(flat: Any, scales: Any, boundaries: Any, bits: int, block_size: int) -> bool:  # noqa: ARG001
    return len(boundaries) <= _FEW and block_size <= _CHUNK and isinstance(scales, np.ndarray)


@encode.register("numpy", accepts=_encode_accepts)
def encode_chunked(
    flat: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    boundaries: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
) -> npt.NDArray[np.uint8]:
    """Count the boundaries below each value, chunk by chunk."""
    count = flat.shape[0]
    codes = np.empty(count, dtype=np.uint8)
    whole = count - count % block_size
    blocks, code_blocks = flat[:whole].reshape(-1, block_size), codes[:whole].reshape(-1, block_size)
    block_scales = scales[: len(blocks)]  # without that of a short last block
    step = max(1, _CHUNK // block_size)
    cuts = boundaries.astype(flat.dtype)
    with np.errstate(over="ignore"):
        for first in range(0, len(blocks), step):
            part = slice(first, first + step)
            _encode_rows(blocks[part], block_scales[part], cuts, code_blocks[part])
        if whole < count:
            _encode_rows(flat[None, whole:], scales[-1:], cuts, codes[None, whole:])
    packed: npt.NDArray[np.uint8] = pack_codes(codes, bits)
    return packed


def _encode_rows(
    rows: npt.NDArray[Any], scales: npt.NDArray[Any], cuts: npt.NDArray[Any], codes: npt.NDArray[Any]
) -> None:
    column = scales[:, None]
    positive = column > 0
    normalized = rows / np.where(positive, column, column.dtype.type(1))
    if not positive.all():
        normalized = np.where(positive, normalized, normalized.dtype.type(0))
    above = np.empty(rows.shape, dtype=np.bool_)
    codes[...] = 0
    for cut in cuts:
        np.greater(normalized, cut, out=above)
        np.add(codes, above.view(np.uint8), out=codes)


def _decode_accepts(packed: Any, scales: Any, levels: Any, bits: int, block_size: int, count: int) -> bool:  # noqa: ARG001
    return bits in (1, 2, 3, 4, 6, 8) and isinstance(scales, np.ndarray) and packed.flags.c_contiguous


@decode.register("numpy", accepts=_decode_accepts)
def decode_lookup(
    packed: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    levels: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    count: int,
) -> npt.NDArray[np.float32]:
    """Look several codes up at once: a table row holds the levels of all codes in one byte, or in twelve bits."""
    table, index_bits = _lookup_table(levels.tobytes(), bits)
    if packed.shape[0] != packed_size(count, bits):
        unpack_codes(packed, bits, count)  # raises the reference's error
    indices = packed if index_bits == 8 else unpack_twelve(packed)
    values = np.take(table, indices, axis=0).reshape(-1)[:count]
    whole = count - count % block_size
    blocks = values[:whole].reshape(-1, block_size)
    np.multiply(blocks, scales[: len(blocks), None], out=blocks)
    if whole < count:
        values[whole:] *= scales[-1]
    return values


def unpack_twelve(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Cut a stream of bytes into numbers of twelve bits, least significant bit first; missing bytes count as zero."""
    if packed.shape[0] % 3:
        packed = np.concatenate([packed, np.zeros(-packed.shape[0] % 3, dtype=np.uint8)])
    triples = packed.reshape(-1, 3)
    numbers = np.empty((len(triples), 2), dtype=np.uint16)
    middle = triples[:, 1].astype(np.uint16)
    numbers[:, 0] = triples[:, 0] | (middle & 15) << 8
    numbers[:, 1] = middle >> 4 | triples[:, 2].astype(np.uint16) << 4
    return numbers.reshape(-1)


@functools.lru_cache(maxsize=64)
def _lookup_table(levels: bytes, bits: int) -> tuple[npt.NDArray[np.float32], int]:
    index_bits = 8 if 8 % bits == 0 else _LOOKUP_BITS
    indices = np.arange(2**index_bits)[:, None]
    codes = indices >> np.arange(0, index_bits, bits) & (2**bits - 1)
    known = np.frombuffer(levels, dtype=np.float32)
    # Codes beyond a codebook whose length is no power of two never occur; their rows only have to exist.
    table = known[np.minimum(codes, len(known) - 1)]
    table.flags.writeable = False
    return table, index_bits
