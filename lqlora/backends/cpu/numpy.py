"""Overrides in NumPy that keep their workspace in the cache.

``benchmarks/quantize.py`` measures their gain.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

# Overrides are tried in the order of their registration, and compiled ones come first whatever is imported first.
import lqlora.backends.cpu.compiled  # noqa: F401
from lqlora._dispatch import Takes, prefer_maker
from lqlora.backends.cpu.buffer_pool import large_empty
from lqlora.ops.coding import FEW, PackedBlocks, decode, nearest_codes
from lqlora.ops.packing import unpack_codes
from lqlora.ops.sums import bin_sums, exact_terms

if TYPE_CHECKING:
    import numpy.typing as npt

__all__: list[str] = []

#: Values that are looked up at a time. With their buckets (int64) and codes they fit into a second-level cache.
_CHUNK = 32768

#: Number of buckets that the range of the boundaries is cut into.
_BUCKETS = 2048

#: Boundaries that span less than this run the reference: buckets per unit of the values would overflow float32.
_NARROW = 2.0**-100

#: From this many weights on, two bytes are looked up at a time. For fewer, making the table of up to 1 MiB takes longer
#: than it saves.
_MANY = 1 << 18


def _can_be_bucketed(boundaries: npt.NDArray[np.float32]) -> bool:
    """Return whether buckets are faster than counting, and whether the boundaries span enough for float32."""
    return len(boundaries) > FEW and float(boundaries[-1]) - float(boundaries[0]) >= _NARROW


@nearest_codes.register(
    "numpy",
    takes=Takes(
        {"values": ("float32", "float64")},
        condition=_can_be_bucketed,
        sentence=f"more than {FEW} boundaries that span 2**-100 or more",
    ),
)
def nearest_codes_in_buckets(values: npt.NDArray[Any], boundaries: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Look up the number of boundaries below a value's bucket, chunk by chunk.

    A value's bucket is ``b(v) = floor(clip((v - low) * factor))``. Rounding keeps the order of differences and
    products, so ``v <= w`` implies ``b(v) <= b(w)``: boundaries in lower buckets are below ``v``, and those in higher
    buckets are not. Only the boundaries in the bucket of ``v`` have to be compared with it, at most ``most`` of them.
    """
    flat, codes = values.reshape(-1), np.empty(values.size, dtype=np.uint8)
    table = _buckets(boundaries.tobytes(), values.dtype)
    with np.errstate(over="ignore"):
        for first in range(0, len(flat), _CHUNK):
            _look_up(table, flat[first : first + _CHUNK], codes[first : first + _CHUNK])
    return codes.reshape(values.shape)


class _Buckets(NamedTuple):
    """A map from values to buckets, and for each bucket the number of boundaries in lower ones."""

    low: Any
    factor: Any
    below: npt.NDArray[np.uint8]
    cuts: npt.NDArray[Any]
    most: int


@functools.lru_cache(maxsize=64)
def _buckets(boundaries: bytes, dtype: np.dtype[Any]) -> _Buckets:
    cuts = np.frombuffer(boundaries, dtype=np.float32).astype(dtype)
    low, factor = cuts[0], dtype.type((_BUCKETS - 1) / (float(cuts[-1]) - float(cuts[0])))
    # The bucket of a boundary is computed as that of a value, with the same roundings. So a boundary and an equal value
    # share a bucket, and the comparison decides between them.
    own = _bucket(cuts, low, factor)
    below = np.searchsorted(own, np.arange(_BUCKETS), side="left").astype(np.uint8)
    most = int(np.bincount(own).max())
    return _Buckets(low, factor, below, np.append(cuts, dtype.type(np.inf)), most)


def _bucket(values: npt.NDArray[Any], low: Any, factor: Any) -> npt.NDArray[np.intp]:
    """Return the bucket of each value, which is a non-decreasing function of the value."""
    place = values - low
    place *= factor
    with np.errstate(invalid="ignore"):  # NaN gets any bucket, and compares above no boundary
        # Clipped before the cast: casting infinity or a large number to an integer gives any value.
        buckets: npt.NDArray[np.intp] = np.clip(place, 0, _BUCKETS - 1, out=place).astype(np.intp)
        return buckets


def _look_up(table: _Buckets, values: npt.NDArray[Any], codes: npt.NDArray[np.uint8]) -> None:
    """Start from the boundaries in lower buckets, then count those in the value's own bucket one by one."""
    np.take(table.below, _bucket(values, table.low, table.factor), out=codes, mode="clip")
    for _ in range(table.most):
        above = values > np.take(table.cuts, codes, mode="clip")
        np.add(codes, above.view(np.uint8), out=codes)


@decode.register(
    "numpy",
    takes=Takes(
        {"packed": ("uint8",), "scales": ("float32",), "zero_points": ("uint8", None), "out": ("float32",)},
        bits=(1, 2, 3, 4, 6, 8),
        contiguous=("packed", "out"),
        condition=lambda stored, out: out.ndim == 1 and stored.fits(out.size) and out.flags.writeable,
        sentence="a flat result that may be written, a scale for each block, and as many bytes as the codes take",
    ),
)
def decode_lookup(stored: PackedBlocks, out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Look up several codes at once: an entry of the table has the levels of all codes in 8, 12 or 16 bits."""
    packed, scales, zero_points, _, bits, block_size = stored
    levels, count = stored.table(), out.shape[0]
    index_bits = _index_bits(bits, count)
    table = _lookup_table(levels.tobytes(), bits, index_bits)
    at_once = index_bits // bits
    indices = _indices(packed, index_bits)
    whole = min(count // at_once, len(indices)) // 2 * 2  # two numbers of twelve bits end with a byte
    # This mode checks no bounds, and an index of one byte or twelve bits cannot be out of bounds.
    np.take(table, indices[:whole], out=out[: whole * at_once].view(table.dtype), mode="wrap")
    if whole * at_once < count:
        rest = slice(whole * index_bits // 8, None)
        codes = unpack_codes(packed[rest], bits, count - whole * at_once)
        np.take(levels, codes, out=out[whole * at_once :], mode="clip")  # any other mode would buffer the result
    if zero_points is not None:
        np.subtract(out, _by_weight(zero_points, block_size, count), out=out)
    np.multiply(out, _by_weight(scales, block_size, count), out=out)
    return out


def _by_weight(per_block: npt.NDArray[Any], block_size: int, count: int) -> npt.NDArray[Any]:
    """Repeat the number of each block for its weights: one long product is faster than one product for each block."""
    return per_block if block_size == 1 else np.repeat(per_block, min(block_size, count))[:count]


def _index_bits(bits: int, count: int) -> int:
    """Return the number of bits of packed codes that are looked up at a time."""
    if 8 % bits:
        return 12
    return 16 if bits in (4, 8) and count >= _MANY else 8


def _indices(packed: npt.NDArray[np.uint8], index_bits: int) -> npt.NDArray[Any]:
    """Split a stream of bytes into numbers of ``index_bits`` bits, least significant bit first. Drop a remainder."""
    if index_bits == 8:
        return packed
    if index_bits == 16:
        pairs: npt.NDArray[Any] = packed[: len(packed) // 2 * 2].view("<u2")
        return pairs
    triples = packed[: len(packed) // 3 * 3].reshape(-1, 3)
    numbers = np.empty((len(triples), 2), dtype=np.uint16)
    middle = triples[:, 1].astype(np.uint16)
    numbers[:, 0] = triples[:, 0] | (middle & 15) << 8
    numbers[:, 1] = middle >> 4 | triples[:, 2].astype(np.uint16) << 4
    return numbers.reshape(-1)


#: Dtypes as large as 1, 2 and 4 values of float32: copying one number is faster than copying a short row.
_AS_ONE = {1: np.float32, 2: np.int64, 4: np.complex128}


@functools.lru_cache(maxsize=64)
def _lookup_table(levels: bytes, bits: int, index_bits: int) -> npt.NDArray[Any]:
    indices = np.arange(2**index_bits)[:, None]
    codes = indices >> np.arange(0, index_bits, bits) & (2**bits - 1)
    known = np.frombuffer(levels, dtype=np.float32)
    rows = known[codes]
    table: npt.NDArray[Any] = rows.view(_AS_ONE.get(rows.shape[1], np.dtype((np.void, 4 * rows.shape[1]))))[:, 0]
    table.flags.writeable = False
    return table


@bin_sums.register(
    "numpy",
    takes=Takes(
        {"terms": ("float64",), "bins": ("int64",)},
        condition=lambda terms, bins, count: (
            terms.ndim == 1
            and terms.shape == bins.shape  # NumPy broadcasts neither
            and (not bins.size or 0 <= bins.min() <= bins.max() < count)
        ),
        sentence="a bin that exists for each term",
    ),
)
def bin_sums_counted(
    terms: npt.NDArray[np.float64], bins: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.float64]:
    """Sum all bins in one pass: the rounded terms are integers, so the order of additions does not matter."""
    rounded, unit = exact_terms(terms)
    sums: npt.NDArray[Any] = np.bincount(bins, weights=rounded, minlength=count) * unit
    return sums


def _empty(shape: tuple[int, ...], dtype: Any, _: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array for a result, in memory of the pool if it is large."""
    large = large_empty(shape, dtype)
    return np.empty(shape, dtype) if large is None else large


prefer_maker("numpy", _empty)
