"""Registers the compiled kernels onto the operations, and turns arrays into what C takes.

``benchmarks/quantize.py`` has the rows that justify them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import Operation, Takes, prefer_pieces
from lqlora._threads import num_threads
from lqlora.backends.cpu.loading import instruction_sets, loaded
from lqlora.errors import InvalidArgumentError
from lqlora.ops.blocks import block_absmax, block_extremes
from lqlora.ops.casting import storage_cast
from lqlora.ops.coding import decode, encode, encode_by_absmax, encode_packed, nearest_codes
from lqlora.ops.matmul import matmul_packed
from lqlora.ops.packing import pack_codes, packed_size, unpack_codes
from lqlora.ops.rounding import rounding_errors
from lqlora.ops.search import best_ratios
from lqlora.ops.slices import copy_across
from lqlora.ops.sums import level_sums, row_sums, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["FEW_ROWS", "PIECE", "register"]

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_BITS = tuple(range(1, 9))
_DTYPES = {name: number for number, name in enumerate(_FLOATS)}

#: Weights that are worked on at a time where they lie one after the other: the kernels need no workspace, and threads
#: are begun anew for each piece.
PIECE = 1 << 24

#: Longer rows are left to the reference: a copy of a row is made.
_LONGEST_ROW = 1 << 20

_OVERRIDES: list[tuple[Operation[Any, Any], Takes, Callable[..., Any]]] = []


def register() -> None:
    """Register all overrides, if the library can be used."""
    if loaded() is None:
        return
    prefer_pieces("numpy", PIECE)
    for operation, takes, function in _OVERRIDES:
        operation.register("numpy", backend="native", takes=takes)(function)


def _overrides(operation: Operation[Any, Any], takes: Takes) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _OVERRIDES.append((operation, takes, function))
        return function

    return add


def _at(array: npt.NDArray[Any] | None) -> int | None:
    """Return the address of the entries."""
    address: int | None = None if array is None else array.__array_interface__["data"][0]
    return address


def _number(array: npt.NDArray[Any]) -> int:
    return _DTYPES[array.dtype.name]


def _call(name: str, *arguments: Any) -> None:
    getattr(loaded(), f"lqlora_{name}")(*arguments, num_threads())


def _arithmetic(array: npt.NDArray[Any]) -> type[np.float32 | np.float64]:
    return np.float64 if array.dtype == np.float64 else np.float32


_FLAT = Takes({"flat": _FLOATS}, contiguous=("flat",), condition=lambda _, size: size >= 1, sentence="whole blocks")


@_overrides(block_absmax, _FLAT)
def absmax(flat: npt.NDArray[Any], block_size: int) -> npt.NDArray[Any]:
    """Take the maximum of the bits, which are ordered like magnitudes."""
    size = min(block_size, max(1, flat.size))
    out = np.empty(-(-flat.size // size), dtype=_arithmetic(flat))
    _call("absmax", _at(flat), _number(flat), flat.size, size, _at(out))
    return out


@_overrides(block_extremes, _FLAT)
def extremes(flat: npt.NDArray[Any], block_size: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Take two maxima of the bits: as signed integers, and as unsigned ones."""
    size = min(block_size, max(1, flat.size))
    low, high = (np.empty(-(-flat.size // size), dtype=_arithmetic(flat)) for _ in range(2))
    _call("extremes", _at(flat), _number(flat), flat.size, size, _at(low), _at(high))
    return low, high


def _is_scaled(flat: Any, scales: Any, zero_points: Any, boundaries: Any, block_size: int) -> bool:
    blocks = -(-flat.size // block_size) if block_size >= 1 else -1
    zeros_fit = zero_points is None or zero_points.shape == (blocks,)
    return bool(scales.shape == (blocks,) and zeros_fit and scales.dtype == _arithmetic(flat) and len(boundaries) < 256)


_ENCODED = {"flat": _FLOATS, "scales": ("float32", "float64"), "zero_points": ("uint8", None)}
_DENSE = ("flat", "scales", "zero_points")


@_overrides(
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
    _encode(flat, scales, zero_points, boundaries, 8, block_size, codes=codes)
    return codes


def _is_scaled_and_packed(
    flat: Any, scales: Any, zero_points: Any, boundaries: Any, bits: int, block_size: int
) -> bool:
    return len(boundaries) < 2**bits and _is_scaled(flat, scales, zero_points, boundaries, block_size)


@_overrides(
    encode_packed,
    Takes(
        _ENCODED,
        bits=_BITS,
        contiguous=_DENSE,
        condition=_is_scaled_and_packed,
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
    _encode(flat, scales, zero_points, boundaries, bits, block_size, packed=packed)
    return packed


def _encode(
    flat: Any,
    scales: Any,
    zeros: Any,
    boundaries: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    *,
    packed: Any = None,
    codes: Any = None,
) -> None:
    table = np.ascontiguousarray(boundaries, dtype=np.float32)
    weights = (_at(flat), _number(flat), flat.size, min(block_size, max(1, flat.size)))
    _call("encode", *weights, _at(scales), _at(zeros), _at(table), len(table), bits, _at(packed), _at(codes))


@_overrides(
    encode_by_absmax,
    Takes(
        {"flat": _FLOATS},
        bits=_BITS,
        contiguous=("flat",),
        condition=lambda _, boundaries, bits, size: size >= 1 and len(boundaries) < 2**bits,
        sentence="whole blocks, and codes of no more than ``bits`` bits",
    ),
)
def scales_and_codes_of(
    flat: npt.NDArray[Any], boundaries: npt.NDArray[np.float32], bits: int, block_size: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Do one after the other with a piece of the array, so that a thread waits for memory while others compute."""
    size = min(block_size, max(1, flat.size))
    scales = np.empty(-(-flat.size // size), dtype=_arithmetic(flat))
    packed = np.empty(packed_size(flat.size, bits), dtype=np.uint8)
    table = np.ascontiguousarray(boundaries, dtype=np.float32)
    weights = (_at(flat), _number(flat), flat.size, size)
    _call("encode_by_absmax", *weights, _at(scales), _at(table), len(table), bits, _at(packed))
    return scales, packed


def _lie_across(source: Any, out: Any) -> bool:
    if source.ndim != 2 or source.shape != out.shape or source.dtype != out.dtype or not source.size:
        return False
    word, steps = source.itemsize, (*source.strides, *out.strides)
    are_across = _are_columns_to_rows(source, out) or _are_columns_to_rows(source.T, out.T)
    is_plain = all(step > 0 and step % word == 0 for step in steps) and source.flags.aligned and out.flags.aligned
    return bool(are_across and is_plain and out.flags.writeable and not np.may_share_memory(source, out))


def _are_columns_to_rows(source: Any, out: Any) -> bool:
    return bool(source.strides[0] == source.itemsize == out.strides[1])


@_overrides(
    copy_across,
    Takes(
        {"source": _FLOATS, "out": _FLOATS},
        condition=_lie_across,
        sentence="two matrices, the rows of one and the columns of the other without gaps",
    ),
)
def crossed(source: npt.NDArray[Any], out: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copy squares that stay in the caches, eight by eight entries in registers."""
    word = source.itemsize
    own, target = (source, out) if _are_columns_to_rows(source, out) else (source.T, out.T)
    _call("cross", _at(own), _at(target), *own.shape, own.strides[1] // word, target.strides[0] // word, word)
    return out


@_overrides(
    nearest_codes,
    Takes(
        {"values": ("float32", "float64")},
        contiguous=("values",),
        condition=lambda _, boundaries: len(boundaries) < 256,
        sentence="fewer than 256 boundaries",
    ),
)
def codes_of_values(values: npt.NDArray[Any], boundaries: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Encode as one block whose scale is one: that division changes nothing."""
    one = np.ones(1, dtype=values.dtype)
    codes = np.empty(values.shape, dtype=np.uint8)
    _encode(values, one, None, boundaries, 8, max(1, values.size), codes=codes)
    return codes


def _is_whole(packed: Any, scales: Any, zero_points: Any, levels: Any, bits: int, block_size: int, out: Any) -> bool:
    blocks = -(-out.size // block_size) if block_size >= 1 else -1
    zeros_fit = zero_points is None or zero_points.shape == (blocks,)
    is_whole = packed.size == packed_size(out.size, bits) and out.flags.writeable
    return bool(is_whole and scales.shape == (blocks,) and zeros_fit and len(levels) <= 2**bits)


@_overrides(
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
def values_of(
    packed: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zero_points: npt.NDArray[np.uint8] | None,
    levels: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    out: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """Unpack, look up, multiply and round, a few thousand weights at a time."""
    table = np.ascontiguousarray(levels, dtype=np.float32)
    codes = (_at(packed), _at(scales), _at(zero_points), _at(table), len(table), bits)
    _call("decode", *codes, out.size, min(block_size, max(1, out.size)), _at(out), _number(out))
    return out


#: Up to this many rows, multiplying each stretch of a decoded row at once is at least as fast as handing many rows of the
#: weight to BLAS. Where values stay in registers it takes half the time.
FEW_ROWS = 16 if "avx512" in instruction_sets() else 8


def _are_few(
    x: Any, packed: Any, scales: Any, zero_points: Any, levels: Any, bits: int, block_size: int, out: Any
) -> bool:
    rows, columns = out.shape[1], x.shape[1]
    blocks = -(-rows * columns // block_size) if block_size >= 1 else -1
    zeros_fit = zero_points is None or zero_points.shape == (blocks,)
    is_whole = packed.size == packed_size(rows * columns, bits) and scales.shape == (blocks,) and zeros_fit
    are_alike = x.shape[0] == out.shape[0] <= FEW_ROWS and x.dtype == out.dtype
    return bool(is_whole and are_alike and out.flags.writeable and columns % 8 == 0 and len(levels) <= 2**bits)


@_overrides(
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
def products_of_few(
    x: npt.NDArray[Any],
    packed: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zero_points: npt.NDArray[np.uint8] | None,
    levels: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    out: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """Look codes up and multiply their values in registers, or at least a stretch of a row while it is in the cache."""
    rows = np.asarray(x, dtype=np.float32)
    in_place = out.dtype == np.float32 and not np.may_share_memory(out, rows)
    sums = out if in_place else np.empty(out.shape, dtype=np.float32)
    table = np.ascontiguousarray(levels, dtype=np.float32)
    size = min(block_size, max(1, rows.shape[1] * out.shape[1]))
    codes = (_at(packed), _at(scales), _at(zero_points), _at(table), len(table), bits, size)
    _call("multiply", _at(rows), rows.shape[0], out.shape[1], rows.shape[1], *codes, _at(sums))
    if sums is not out:
        out[...] = storage_cast(sums, out.dtype.name)
    return out


@_overrides(pack_codes, Takes({"codes": ("uint8",)}, bits=_BITS, contiguous=("codes",)))
def packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Join eight codes in a word, in three steps."""
    found = np.empty(packed_size(codes.size, bits), dtype=np.uint8)
    _call("pack", _at(codes), bits, codes.size, _at(found))
    return found


@_overrides(unpack_codes, Takes({"packed": ("uint8",)}, bits=_BITS[:-1], contiguous=("packed",)))
def unpacked(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Part eight codes of a word, in three steps."""
    if packed.size != packed_size(count, bits):
        needed = packed_size(count, bits)
        raise InvalidArgumentError(f"{count} codes of {bits} bits are {needed} bytes, not {packed.size}.")
    codes = np.empty(count, dtype=np.uint8)
    _call("unpack", _at(packed), bits, count, _at(codes))
    return codes


@_overrides(
    row_sums,
    Takes(
        {"rows": ("float32", "float64")},
        contiguous=("rows",),
        condition=lambda rows: rows.shape[1] <= _LONGEST_ROW,
        sentence="rows of a million entries at most",
    ),
)
def halved_sums(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Halve each row in the cache."""
    sums = np.empty(rows.shape[0], dtype=rows.dtype)
    _call("row_sums", _at(rows), _number(rows), rows.shape[0], rows.shape[1], _at(sums))
    return sums


def _is_searchable(
    rows: Any, weights: Any, levels: Any, boundaries: Any, zeros: Any, grid: Any, _refinements: Any
) -> bool:
    weights_fit = weights is None or weights.shape == rows.shape
    zeros_fit = zeros is None or zeros.shape == (rows.shape[0], 1)
    tables_fit = 1 <= len(levels) <= 256 and len(boundaries) == len(levels) - 1 and len(grid) >= 1
    return bool(weights_fit and zeros_fit and tables_fit and 1 <= rows.shape[1] <= _LONGEST_ROW)


@_overrides(
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
    known = (_at(tables[0]), _at(tables[1]), len(levels), _at(tables[2]), len(grid), refinements)
    _call("search", _at(rows), _at(weights), *rows.shape, _at(zeros), *known, _at(best))
    return best


def _is_encodable(rows: Any, weights: Any, scales: Any, zero_points: Any, levels: Any, boundaries: Any) -> bool:
    weights_fit = weights is None or weights.shape == rows.shape
    zeros_fit = zero_points is None or zero_points.shape == rows.shape[:1]
    tables_fit = 1 <= len(levels) <= 256 and len(boundaries) == len(levels) - 1
    is_even = rows.ndim == 2 and scales.shape == rows.shape[:1] and 1 <= rows.shape[1] <= _LONGEST_ROW
    return bool(weights_fit and zeros_fit and tables_fit and is_even)


@_overrides(
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
    """Divide, round, look up, multiply, and add squares up, a row at a time."""
    tables = [np.ascontiguousarray(table, dtype=np.float32) for table in (levels, boundaries)]
    sums = np.empty(rows.shape[0], dtype=np.float64)
    given = (_at(rows), _number(rows), _at(weights), 0 if weights is None else _number(weights), *rows.shape)
    _call("rounding_errors", *given, _at(scales), _at(zero_points), *map(_at, tables), len(levels), _at(sums))
    return sums


def _can_be_summed(
    rows: Any, weights: Any, importance: Any, ratios: Any, codes: Any, sets: Any, size: int, count: int
) -> bool:
    """Accept what no sum is written beyond the end for."""
    by_row = {array.shape for array in (importance, ratios, sets)} == {rows.shape[:1]}
    by_entry = codes.shape == rows.shape and (weights is None or weights.shape == rows.shape)
    if not by_row or not by_entry or rows.size < 2:
        return False
    return bool(codes.max() < size and sets.min() >= 0 and sets.max() < count)


@_overrides(
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
    """Look for the largest term, then add integers up."""
    maxima, sums = np.empty(2), np.zeros((2, count * size))
    given = (_at(rows), _at(weights), _at(importance), _at(ratios))
    _call("level_maxima", *given, *rows.shape, _at(maxima))
    if not np.isfinite(maxima).all():
        return level_sums.reference(rows, weights, importance, ratios, codes, sets, size, count)
    units = [unit_of(largest, rows.size) if largest else 1.0 for largest in maxima.tolist()]
    _call("level_sums", *given, _at(codes), _at(sets), *rows.shape, size, count, *units, _at(sums[0]), _at(sums[1]))
    return sums[0] * units[0], sums[1] * units[1]


register()
