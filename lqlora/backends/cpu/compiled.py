"""Overrides for NumPy arrays by the compiled kernels: the conditions, and the calls of the C functions.

The C functions check nothing. The ``Takes`` record of an override is the only check of dtypes, memory layout, lengths
and codes, so a condition that is too wide lets a kernel read or write beyond an array.

``benchmarks/quantize.py`` measures their gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lqlora._dispatch import Operation, Takes, prefer_pieces
from lqlora.backends.cpu.loading import instruction_sets, kernel, loaded
from lqlora.errors import InvalidArgumentError
from lqlora.ops.blocks import block_absmax, block_extremes
from lqlora.ops.casting import storage_cast
from lqlora.ops.coding import PackedBlocks, decode, encode, encode_by_absmax, encode_packed, nearest_codes
from lqlora.ops.matmul import matmul_packed, matmul_trellis
from lqlora.ops.packing import pack_codes, packed_size, unpack_codes
from lqlora.ops.rounding import rounding_errors
from lqlora.ops.search import best_ratios
from lqlora.ops.slices import copy_across
from lqlora.ops.sums import level_sums, row_sums, unit_of
from lqlora.ops.trellis import PackedTrellis, decode_trellis, encode_trellis

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["FEW_ROWS", "PIECE", "begins_rows"]

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_BITS = tuple(range(1, 9))

#: Numbers of the dtypes in ``kernels.h``, and the dtype of the arithmetic for each of them.
_NUMBER: dict[np.dtype[Any], int] = {
    np.dtype(dtype): number for number, dtype in enumerate((np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
}
_WIDE = {dtype: np.dtype(np.float64 if dtype == np.float64 else np.float32) for dtype in _NUMBER}

#: Weights that callers pass at a time if the weights are contiguous. The kernels need no workspace, so pieces are
#: large: each call starts its threads anew.
PIECE = 1 << 24

#: Longer rows are left to the reference, because a kernel copies a row.
_LONGEST_ROW = 1 << 20


def _native(operation: Operation[Any, Any], takes: Takes) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers an override for NumPy, if the kernels can be used."""
    if loaded() is None:
        return lambda function: function
    return operation.register("numpy", backend="native", takes=takes)


if loaded() is not None:
    prefer_pieces("numpy", PIECE)

_FLAT = Takes(
    {"flat": _FLOATS}, contiguous=("flat",), condition=lambda block_size: block_size >= 1, sentence="whole blocks"
)
_ABSMAX = kernel("absmax", "pillp")
_EXTREMES = kernel("extremes", "pillpp")


@_native(block_absmax, _FLAT)
def absmax(flat: npt.NDArray[Any], block_size: int) -> npt.NDArray[Any]:
    """Take the maximum of the bits without the sign, which are ordered like magnitudes."""
    # A block size is any Python integer. It is cut to the number of weights, so that it fits into the kernel's 64 bits,
    # and so do its products with numbers of blocks.
    count = flat.size
    size = min(block_size, max(1, count))
    out = np.empty(-(-count // size), dtype=_WIDE[flat.dtype])
    _ABSMAX(count, flat, _NUMBER[flat.dtype], count, size, out)
    return out


@_native(block_extremes, _FLAT)
def extremes(flat: npt.NDArray[Any], block_size: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Take two maxima of the bits: as signed integers, and as unsigned ones."""
    count = flat.size
    size = min(block_size, max(1, count))
    low, high = (np.empty(-(-count // size), dtype=_WIDE[flat.dtype]) for _ in range(2))
    _EXTREMES(count, flat, _NUMBER[flat.dtype], count, size, low, high)
    return low, high


def _is_packable(flat: Any, scales: Any, zero_points: Any, boundaries: Any, bits: int, block_size: int) -> bool:
    # n boundaries make codes 0 to n, and packing keeps only `bits` bits of a code.
    if block_size < 1 or len(boundaries) >= 2**bits or scales.dtype != _WIDE[flat.dtype]:
        return False
    blocks = (-(-flat.size // block_size),)
    return scales.shape == blocks and (zero_points is None or zero_points.shape == blocks)


def _is_scaled(flat: Any, scales: Any, zero_points: Any, boundaries: Any, block_size: int) -> bool:
    return _is_packable(flat, scales, zero_points, boundaries, 8, block_size)


_ENCODED = {"flat": _FLOATS, "scales": ("float32", "float64"), "zero_points": ("uint8", None)}
_DENSE = ("flat", "scales", "zero_points")
_ENCODE = kernel("encode", "pillpppiipp")


@_native(
    encode,
    Takes(
        {**_ENCODED, "flat": ("float32", "float64")},
        contiguous=_DENSE,
        condition=_is_scaled,
        sentence="a scale of the dtype of the arithmetic for each block",
    ),
)
def codes_of(
    flat: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zero_points: npt.NDArray[np.uint8] | None,
    boundaries: npt.NDArray[np.float32],
    block_size: int,
) -> npt.NDArray[np.uint8]:
    """Divide, and count the boundaries below."""
    codes = np.empty(flat.size, dtype=np.uint8)
    _encode(flat, scales, zero_points, boundaries, 8, block_size, None, codes)
    return codes


@_native(
    encode_packed,
    Takes(
        _ENCODED,
        bits=_BITS,
        contiguous=_DENSE,
        condition=_is_packable,
        sentence="a scale of the dtype of the arithmetic for each block, and codes of no more than ``bits`` bits",
    ),
)
def packed_codes_of(
    flat: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zero_points: npt.NDArray[np.uint8] | None,
    boundaries: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
) -> npt.NDArray[np.uint8]:
    """Divide, count the boundaries below, and pack, a few thousand weights at a time."""
    packed = np.empty(packed_size(flat.size, bits), dtype=np.uint8)
    _encode(flat, scales, zero_points, boundaries, bits, block_size, packed, None)
    return packed


def _encode(
    flat: Any, scales: Any, zeros: Any, boundaries: Any, bits: int, block_size: int, packed: Any, codes: Any
) -> None:
    """Write either the packed codes or the codes."""
    # The record does not check the boundaries, so they are copied here if they are strided or of another dtype.
    table, count = np.ascontiguousarray(boundaries, dtype=np.float32), flat.size
    weights = (flat, _NUMBER[flat.dtype], count, min(block_size, max(1, count)))
    _ENCODE(count, *weights, scales, zeros, table, len(table), bits, packed, codes)


_ENCODE_BY_ABSMAX = kernel("encode_by_absmax", "pillppiip")


@_native(
    encode_by_absmax,
    Takes(
        {"flat": _FLOATS},
        bits=_BITS,
        contiguous=("flat",),
        condition=lambda boundaries, bits, block_size: block_size >= 1 and len(boundaries) < 2**bits,
        sentence="whole blocks, and codes of no more than ``bits`` bits",
    ),
)
def scales_and_codes_of(
    flat: npt.NDArray[Any], boundaries: npt.NDArray[np.float32], bits: int, block_size: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Find the maxima of a piece and encode it while it is in the cache, so that the weights are read once."""
    count = flat.size
    size = min(block_size, max(1, count))
    scales = np.empty(-(-count // size), dtype=_WIDE[flat.dtype])
    packed = np.empty(packed_size(count, bits), dtype=np.uint8)
    table = np.ascontiguousarray(boundaries, dtype=np.float32)
    _ENCODE_BY_ABSMAX(count, flat, _NUMBER[flat.dtype], count, size, scales, table, len(table), bits, packed)
    return scales, packed


def _lie_across(source: Any, out: Any) -> bool:
    if source.ndim != 2 or source.shape != out.shape or source.dtype != out.dtype or not source.size:
        return False
    # The kernel walks over entries in steps of whole words. It copies tile by tile, so the arrays must not overlap.
    word, steps = source.itemsize, (*source.strides, *out.strides)
    are_across = _are_columns_to_rows(source, out) or _are_columns_to_rows(source.T, out.T)
    is_plain = all(step > 0 and step % word == 0 for step in steps) and source.flags.aligned and out.flags.aligned
    return bool(are_across and is_plain and out.flags.writeable and not np.may_share_memory(source, out))


def _are_columns_to_rows(source: Any, out: Any) -> bool:
    return bool(source.strides[0] == source.itemsize == out.strides[1])


_CROSS = kernel("cross", "pplllli")


@_native(
    copy_across,
    Takes(
        {"source": _FLOATS, "out": _FLOATS},
        condition=_lie_across,
        sentence="two matrices, the rows of one and the columns of the other without gaps",
    ),
)
def crossed(source: npt.NDArray[Any], out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Transpose squares that stay in the caches, in tiles of eight by eight entries in registers."""
    word = source.itemsize
    own, target = (source, out) if _are_columns_to_rows(source, out) else (source.T, out.T)
    _CROSS(source.size, own, target, *own.shape, own.strides[1] // word, target.strides[0] // word, word)
    return out


@_native(
    nearest_codes,
    Takes(
        {"values": ("float32", "float64")},
        contiguous=("values",),
        condition=lambda boundaries: len(boundaries) < 256,
        sentence="fewer than 256 boundaries",
    ),
)
def codes_of_values(values: npt.NDArray[Any], boundaries: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Encode as one block whose scale is one, because a division by one changes nothing."""
    one = np.ones(1, dtype=values.dtype)
    codes = np.empty(values.shape, dtype=np.uint8)
    _encode(values, one, None, boundaries, 8, max(1, values.size), None, codes)
    return codes


def _is_whole(stored: PackedBlocks, out: Any) -> bool:
    return out.ndim == 1 and stored.fits(out.size) and out.flags.writeable


def _codes(stored: PackedBlocks) -> tuple[Any, ...]:
    """Return stored weights as arguments of a kernel, but for the block size."""
    table = stored.table()
    return stored.packed, stored.scales, stored.zero_points, table, len(table), stored.bits


_DECODE = kernel("decode", "ppppiillpi")


@_native(
    decode,
    Takes(
        {
            "packed": ("uint8",),
            "scales": ("float32",),
            "zero_points": ("uint8", None),
            "out": ("float32", "float16", "bfloat16"),
        },
        bits=_BITS,
        contiguous=("packed", "scales", "zero_points", "out"),
        condition=_is_whole,
        sentence="a scale for each block, as many bytes as the codes take, and a result that may be written",
    ),
)
def values_of(stored: PackedBlocks, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Unpack, look up, multiply and round, a few thousand weights at a time."""
    count = out.size
    _DECODE(count, *_codes(stored), count, min(stored.block_size, max(1, count)), out, _NUMBER[out.dtype])
    return out


#: Largest number of rows of inputs for the kernel. Up to here, multiplying each stretch of a decoded row at once is at
#: least as fast as decoding many rows of the weight for BLAS. AVX-512 has twice as many registers of twice the width.
FEW_ROWS = 16 if "avx512" in instruction_sets() else 8


def _are_few(x: Any, stored: PackedBlocks, out: Any) -> bool:
    if x.ndim != 2 or out.ndim != 2:
        return False
    rows, columns = out.shape[1], x.shape[1]
    if columns % 8 or not x.shape[0] == out.shape[0] <= FEW_ROWS or x.dtype != out.dtype or not out.flags.writeable:
        return False
    return stored.fits(rows * columns)


_MULTIPLY = kernel("multiply", "plllppppiilp")


@_native(
    matmul_packed,
    Takes(
        {
            "x": ("float32", "float16", "bfloat16"),
            "packed": ("uint8",),
            "scales": ("float32",),
            "zero_points": ("uint8", None),
            "out": ("float32", "float16", "bfloat16"),
        },
        bits=_BITS,
        contiguous=("x", "packed", "scales", "zero_points", "out"),
        condition=_are_few,
        sentence=f"up to {FEW_ROWS} rows of a multiple of eight entries, and results of their dtype that may be written",
    ),
)
def products_of_few(x: npt.NDArray[Any], stored: PackedBlocks, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Decode and multiply in registers; if blocks do not fill these, multiply stretches of a row in the cache."""
    rows, sums = _operands(x, out)
    count = rows.shape[1] * out.shape[1]
    size = min(stored.block_size, max(1, count))
    _MULTIPLY(count, rows, rows.shape[0], out.shape[1], rows.shape[1], *_codes(stored), size, sums)
    return _rounded(sums, out)


def _operands(x: npt.NDArray[Any], out: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return rows of inputs, and an array for results, as a kernel of products takes them."""
    rows = np.asarray(x, dtype=np.float32)
    # The kernel clears an entry of the result before it reads the inputs, so the two must not overlap. Results of 16
    # bits are summed in float32 and rounded once.
    in_place = out.dtype == np.float32 and not np.may_share_memory(out, rows)
    return rows, out if in_place else np.empty(out.shape, dtype=np.float32)


def _rounded(sums: npt.NDArray[Any], out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the results of a product, written to ``out`` unless they are there already."""
    if sums is not out:
        out[...] = storage_cast(sums, out.dtype.name)
    return out


_PACK = kernel("pack", "pilp")
_UNPACK = kernel("unpack", "pilp")


@_native(pack_codes, Takes({"codes": ("uint8",)}, bits=_BITS, contiguous=("codes",)))
def packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Join eight codes in a word of 64 bits, in three steps."""
    found = np.empty(packed_size(codes.size, bits), dtype=np.uint8)
    _PACK(codes.size, codes, bits, codes.size, found)
    return found


@_native(unpack_codes, Takes({"packed": ("uint8",)}, bits=_BITS[:-1], contiguous=("packed",)))
def unpacked(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Split a word of 64 bits into eight codes, in three steps."""
    if packed.size != packed_size(count, bits):
        needed = packed_size(count, bits)
        raise InvalidArgumentError(
            f"packed must have {needed} bytes, since {count} codes of {bits} bits are {needed} bytes, got {packed.size}."
        )
    codes = np.empty(count, dtype=np.uint8)
    _UNPACK(count, packed, bits, count, codes)
    return codes


_ROW_SUMS = kernel("row_sums", "pillp")


@_native(
    row_sums,
    Takes(
        {"rows": ("float32", "float64")},
        contiguous=("rows",),
        condition=lambda rows: rows.shape[1] <= _LONGEST_ROW,
        sentence="rows of a million entries at most",
    ),
)
def halved_sums(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copy each row to the cache and halve it there."""
    sums = np.empty(rows.shape[0], dtype=rows.dtype)
    _ROW_SUMS(rows.size, rows, _NUMBER[rows.dtype], *rows.shape, sums)
    return sums


def _is_searchable(rows: Any, weights: Any, levels: Any, boundaries: Any, zeros: Any, grid: Any) -> bool:
    weights_fit = weights is None or weights.shape == rows.shape
    zeros_fit = zeros is None or zeros.shape == (rows.shape[0], 1)
    tables_fit = 1 <= len(levels) <= 256 and len(boundaries) == len(levels) - 1 and len(grid) >= 1
    return bool(weights_fit and zeros_fit and tables_fit and 1 <= rows.shape[1] <= _LONGEST_ROW)


_SEARCH = kernel("search", "ppllpppipiip")


@_native(
    best_ratios,
    Takes(
        {"rows": ("float32",), "weights": ("float32", None), "zeros": ("float32", None)},
        contiguous=("rows", "weights", "zeros"),
        condition=_is_searchable,
        sentence="rows of a million entries at most, with a weight for each entry",
    ),
)
def searched_ratios(
    rows: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32] | None,
    levels: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32] | None,
    grid: tuple[float, ...],
    refinements: int,
) -> npt.NDArray[np.float32]:
    """Try all ratios on a row while it is in the cache."""
    tables = [np.ascontiguousarray(table, dtype=np.float32) for table in (levels, boundaries, grid)]
    best = np.empty(rows.shape[0], dtype=np.float32)
    known = (tables[0], tables[1], len(levels), tables[2], len(grid), refinements)
    _SEARCH(rows.size * len(grid), rows, weights, *rows.shape, zeros, *known, best)
    return best


def _is_encodable(rows: Any, weights: Any, scales: Any, zero_points: Any, levels: Any, boundaries: Any) -> bool:
    weights_fit = weights is None or weights.shape == rows.shape
    zeros_fit = zero_points is None or zero_points.shape == rows.shape[:1]
    tables_fit = 1 <= len(levels) <= 256 and len(boundaries) == len(levels) - 1
    is_even = rows.ndim == 2 and scales.shape == rows.shape[:1] and 1 <= rows.shape[1] <= _LONGEST_ROW
    return bool(weights_fit and zeros_fit and tables_fit and is_even)


_ROUNDING_ERRORS = kernel("rounding_errors", "pipillppppip")


@_native(
    rounding_errors,
    Takes(
        {
            "rows": ("float32", "float64"),
            "weights": ("float32", "float64", None),
            "scales": ("float32",),
            "zero_points": ("uint8", None),
        },
        contiguous=("rows", "weights", "scales", "zero_points"),
        condition=_is_encodable,
        sentence="rows of a million entries at most, with a scale for each row and a weight for each entry",
    ),
)
def errors_of_rows(
    rows: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None,
    scales: npt.NDArray[np.float32],
    zero_points: npt.NDArray[np.uint8] | None,
    levels: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Divide, round, look up, multiply, and add the squared errors, a row at a time."""
    tables = [np.ascontiguousarray(table, dtype=np.float32) for table in (levels, boundaries)]
    sums = np.empty(rows.shape[0], dtype=np.float64)
    given = (rows, _NUMBER[rows.dtype], weights, 0 if weights is None else _NUMBER[weights.dtype], *rows.shape)
    _ROUNDING_ERRORS(rows.size, *given, scales, zero_points, *tables, len(levels), sums)
    return sums


def _can_be_summed(
    rows: Any, weights: Any, importance: Any, ratios: Any, codes: Any, sets: Any, size: int, count: int
) -> bool:
    """Return whether every code and set has a sum, so that the kernel writes nothing beyond the sums."""
    # Reading all codes takes little time beside the two passes of the kernel, which uses them as indices unchecked.
    by_row = {array.shape for array in (importance, ratios, sets)} == {rows.shape[:1]}
    by_entry = codes.shape == rows.shape and (weights is None or weights.shape == rows.shape)
    if not by_row or not by_entry or rows.size < 2:
        return False
    return bool(codes.max() < size and sets.min() >= 0 and sets.max() < count)


_LEVEL_MAXIMA = kernel("level_maxima", "ppppllp")
_LEVEL_SUMS = kernel("level_sums", "ppppppllllddpp")


@_native(
    level_sums,
    Takes(
        {
            "rows": ("float32",),
            "weights": ("float32", None),
            "importance": ("float64",),
            "ratios": ("float32",),
            "codes": ("uint8",),
            "sets": ("int64",),
        },
        contiguous=("rows", "weights", "importance", "ratios", "codes", "sets"),
        condition=_can_be_summed,
        sentence="two entries or more, and codes and sets that exist",
    ),
)
def summed_by_level(
    rows: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32] | None,
    importance: npt.NDArray[np.float64],
    ratios: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    sets: npt.NDArray[np.int64],
    size: int,
    count: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Find the largest terms, then add integers."""
    # Pass 1 finds the largest magnitudes, and these give the units. In units every partial sum is an integer that
    # float64 holds (see unit_of), so pass 2 may add in any order on any number of threads. NaN or infinity has no unit.
    maxima, sums = np.empty(2), np.zeros((2, count * size))
    given = (rows, weights, importance, ratios)
    _LEVEL_MAXIMA(rows.size, *given, *rows.shape, maxima)
    if not np.isfinite(maxima).all():
        return level_sums.reference(rows, weights, importance, ratios, codes, sets, size, count)
    units = [unit_of(largest, rows.size) if largest else 1.0 for largest in maxima.tolist()]
    _LEVEL_SUMS(rows.size, *given, codes, sets, *rows.shape, size, count, *units, sums[0], sums[1])
    return sums[0] * units[0], sums[1] * units[1]


#: Bits of trellis codes that the kernels take.
_TRELLIS_BITS = (1, 2, 3, 4)


def _is_trellis(levels: Any, bits: int, count: int, block_size: int, length: int) -> bool:
    """Return whether there are weights, which fill whole lines, and as many levels as a state of the kernels can have."""
    states = len(levels)
    # The kernels look a level up by the bits of a state, without a check.
    is_table = (
        levels.dtype == np.float32 and levels.ndim == 1 and 4**bits <= states <= 2**16 and not states & states - 1
    )
    return bool(is_table and count and block_size >= 1 and length >= 1 and count % length == 0)


def _trellis(levels: Any, bits: int, count: int, block_size: int, length: int) -> tuple[Any, ...]:
    """Return a trellis as arguments of a kernel."""
    return np.ascontiguousarray(levels), len(levels).bit_length() - 1, bits, count, length, min(block_size, length)


def _has_paths(flat: Any, scales: Any, importance: Any, levels: Any, bits: int, block_size: int, length: int) -> bool:
    if scales.dtype != _WIDE[flat.dtype] or not _is_trellis(levels, bits, flat.size, block_size, length):
        return False
    blocks = flat.size // length * -(-length // block_size)
    return bool(scales.shape == (blocks,) and (importance is None or importance.shape == flat.shape))


_ENCODE_TRELLIS = kernel("encode_trellis", "pipppiilllp")


@_native(
    encode_trellis,
    Takes(
        {"flat": _FLOATS, "scales": ("float32", "float64"), "importance": ("float32", None)},
        bits=_TRELLIS_BITS,
        contiguous=("flat", "scales", "importance"),
        condition=_has_paths,
        sentence="whole lines, with a scale of the dtype of the arithmetic for each block",
    ),
)
def trellis_codes_of(
    flat: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    importance: npt.NDArray[np.float32] | None,
    levels: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    length: int,
) -> npt.NDArray[np.uint8]:
    """Search eight sequences at once, each in a lane of the registers."""
    count = flat.size
    codes = np.empty(count, dtype=np.uint8)
    table, state_bits, *sizes = _trellis(levels, bits, count, block_size, length)
    given = flat, _NUMBER[flat.dtype], scales, importance, table
    _ENCODE_TRELLIS(count << state_bits, *given, state_bits, *sizes, codes)
    found: npt.NDArray[np.uint8] = packed(codes, bits)
    return found


def _is_whole_trellis(stored: PackedTrellis, out: Any) -> bool:
    return bool(out.ndim == 1 and _fits_trellis(stored, out.size) and out.flags.writeable)


def _fits_trellis(stored: PackedTrellis, count: int) -> bool:
    own, scales, levels, bits, block_size, length = stored
    if not _is_trellis(levels, bits, count, block_size, length):
        return False
    blocks = count // length * -(-length // block_size)
    return bool(own.shape == (packed_size(count, bits),) and scales.shape == (blocks,))


_DECODE_TRELLIS = kernel("decode_trellis", "pppiilllpi")


@_native(
    decode_trellis,
    Takes(
        {"packed": ("uint8",), "scales": ("float32",), "out": ("float32", "float16", "bfloat16")},
        bits=_TRELLIS_BITS,
        contiguous=("packed", "scales", "out"),
        condition=_is_whole_trellis,
        sentence="a scale for each block, as many bytes as the codes take, and a result that may be written",
    ),
)
def trellis_values_of(stored: PackedTrellis, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Shift states out of words, look them up or compute their levels, multiply and round."""
    count = out.size
    trellis = _trellis(stored.levels, stored.bits, count, stored.block_size, stored.length)
    _DECODE_TRELLIS(count, stored.packed, stored.scales, *trellis, out, _NUMBER[out.dtype])
    return out


def _are_few_for_trellis(x: Any, stored: PackedTrellis, out: Any) -> bool:
    if x.ndim != 2 or out.ndim != 2 or not x.shape[0] == out.shape[0] <= FEW_ROWS or x.dtype != out.dtype:
        return False
    count = out.shape[1] * x.shape[1]
    return bool(out.flags.writeable and _fits_trellis(stored, count) and begins_rows(stored, count, x.shape[1]))


def begins_rows(stored: PackedTrellis, count: int, columns: int) -> bool:
    """Return whether each row of a matrix begins with a line, or with a block of the only line.

    Parameters
    ----------
    stored : PackedTrellis
        The matrix.
    count : int
        Number of weights.
    columns : int
        Number of columns.

    Returns
    -------
    bool
        False if a sequence continues from one row to the next.
    """
    return stored.length == columns or (stored.length == count and columns % max(1, stored.block_size) == 0)


_MULTIPLY_TRELLIS = kernel("multiply_trellis", "plllpppiillp")


@_native(
    matmul_trellis,
    Takes(
        {
            "x": ("float32", "float16", "bfloat16"),
            "packed": ("uint8",),
            "scales": ("float32",),
            "out": ("float32", "float16", "bfloat16"),
        },
        bits=_TRELLIS_BITS,
        contiguous=("x", "packed", "scales", "out"),
        condition=_are_few_for_trellis,
        sentence=f"up to {FEW_ROWS} rows, a matrix whose rows begin with a block, and results that may be written",
    ),
)
def trellis_products_of_few(x: npt.NDArray[Any], stored: PackedTrellis, out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Decode and multiply in registers; more than three rows, or short blocks, in the cache."""
    rows, sums = _operands(x, out)
    count = rows.shape[1] * out.shape[1]
    table, state_bits, bits, _, *sizes = _trellis(stored.levels, stored.bits, count, stored.block_size, stored.length)
    shape = rows.shape[0], out.shape[1], rows.shape[1]
    _MULTIPLY_TRELLIS(count, rows, *shape, stored.packed, stored.scales, table, state_bits, bits, *sizes, sums)
    return _rounded(sums, out)
