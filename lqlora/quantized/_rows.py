"""Decoding of single rows of a matrix, such as those of an embedding that a batch looks up."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, empty, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.formats import ScaleFormat
from lqlora.quantized._decoding import host_levels
from lqlora.quantized._layout import layout_of
from lqlora.quantized._rotation import as_stored, unrotate

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.quantized._layout import Layout
    from lqlora.quantized.array import QuantizedArray

__all__ = ["decode_rows"]


def decode_rows(q: QuantizedArray, index: Array, dtype: str = "float32") -> Array:
    """Decode some rows of a matrix, and nothing else of it.

    Parameters
    ----------
    q : QuantizedArray of shape (m, n)
        Single matrix whose blocks follow its rows. Blocks may cross the ends of rows.
    index : array of int64, shape (k,)
        Rows, in any order and as often as wanted, in the library and on the device of ``q``.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Dtype of the result.

    Returns
    -------
    array, shape (k, n)
        ``dequantize(q, dtype=dtype)[index]``, bit for bit.

    Raises
    ------
    InvalidArgumentError
        If ``q`` is not a matrix, has blocks along its columns or rotated outputs, or a row is negative or beyond the end. On a device rows are
        not checked.
    """
    if len(q.shape) != 2 or q.batch_shape or q.format.couples_rows:
        raise InvalidArgumentError(
            f"q must be a matrix with blocks along its rows and no rotation of outputs, got shape {q.shape} in format {q.format}."
        )
    if q.format.rotation is not None:
        return _rotated_rows(q, index, dtype)
    xp, layout, (rows, columns) = namespace(q.packed, index), layout_of(q.format, q.shape), q.shape
    count = index.shape[0]
    if count and ops.is_on_host(index):
        least, most = int(xp.min(index)), int(xp.max(index))
        if least < 0 or most >= rows:
            raise InvalidArgumentError(
                f"index must hold rows from 0 to {rows - 1}, got {least if least < 0 else most}."
            )
    own = dtype if dtype in ("float16", "bfloat16") else "float32"
    flat = empty((count * columns,), ops.native_dtype(q.packed, own), q.packed)
    if flat.shape[0]:
        _decode(q, layout, index, flat)
    found = xp.reshape(flat, (count, columns))
    return found if own == dtype else xp.astype(found, ops.native_dtype(q.packed, dtype))


def _rotated_rows(q: QuantizedArray, index: Array, dtype: str) -> Array:
    """Return rows of a format that rotates the inputs: each is rotated back by itself."""
    assert q.format.rotation is not None
    return ops.storage_cast(unrotate(decode_rows(as_stored(q), index), q.format.rotation), dtype)


def _decode(q: QuantizedArray, layout: Layout, index: Array, out: Array) -> None:
    """Write rows into a flat array."""
    xp, columns, count = namespace(out), q.shape[1], index.shape[0]
    # Rows and blocks begin at multiples of `size`, so weights of one unit of this length share a scale.
    size = gcd(layout.block_size, columns)
    units = layout.blocks_at(_runs(index * columns, columns, size))
    scales = _scales_at(q.scales, q.format.scales, units)
    zeros = None if q.zero_points is None else _codes_at(q.zero_points, q.format.codebook.zero_point_bits, units)
    if columns * layout.bits % 8 == 0:
        packed = xp.reshape(ops.pick(xp.reshape(q.packed, (q.shape[0], -1)), index), (-1,))
    else:
        packed = ops.pack_codes(_codes_at(q.packed, layout.bits, _runs(index * columns, columns, 1)), layout.bits)
    if layout.is_trellis:
        _decode_sequences(q, layout, index, out)
        return
    table = host_levels(q.levels, layout.codebook)
    if table is not None:
        ops.decode(ops.PackedBlocks(packed, scales, zeros, table, layout.bits, size), out)
        return
    lines = index if layout.lines_per_set is not None else index * 0
    codes = xp.reshape(ops.unpack_codes(packed, layout.bits, count * columns), (count, columns))
    values = ops.values_by_row(codes, q.levels, lines // (layout.lines_per_set or 1))
    values = xp.reshape(xp.reshape(values, (-1, size)) * scales[:, None], (-1,))
    out[...] = values if out.dtype == values.dtype else ops.storage_cast(values, ops.dtype_name(out))


def _decode_sequences(q: QuantizedArray, layout: Layout, index: Array, out: Array) -> None:
    """Write rows of a trellis format into a flat array."""
    columns, size = q.shape[1], layout.block_size
    if columns % size == 0 or not layout.is_even:  # each row begins a block
        per_row = -(-columns // size)
        numbers, blocks = _runs(index * columns, columns, 1), _runs(index * per_row, per_row, 1)
        _decode_whole(q, layout, (numbers, blocks, columns), out)
        return
    # Blocks cross the ends of rows: those that a row has a part of are decoded whole.
    xp = namespace(out)
    for row in range(index.shape[0]):
        first = int(index[row]) * columns
        start, stop = first // size * size, min(-(-(first + columns) // size) * size, layout.count)
        numbers = xp.arange(start, stop, dtype=index.dtype, device=device_of(index))
        flat = xp.empty(numbers.shape, dtype=out.dtype, device=device_of(out))
        _decode_whole(q, layout, (numbers, numbers[::size] // size, stop - start), flat)
        out[row * columns : (row + 1) * columns] = flat[first - start : first - start + columns]


def _decode_whole(q: QuantizedArray, layout: Layout, which: tuple[Array, Array, int], out: Array) -> None:
    """Write the weights of whole blocks, given their positions, the numbers of the blocks and the length of lines of them."""
    numbers, blocks, length = which
    packed = ops.pack_codes(_codes_at(q.packed, layout.bits, numbers), layout.bits)
    scales, levels = _scales_at(q.scales, q.format.scales, blocks), layout.codebook.levels
    ops.decode_trellis(ops.PackedTrellis(packed, scales, levels, layout.bits, layout.block_size, length), out)


def _runs(starts: Array, length: int, step: int) -> Array:
    """Return the positions ``start, start + step, ...`` of a run of some length from each start, one after another."""
    xp = namespace(starts)
    within = xp.arange(0, length, step, dtype=starts.dtype, device=device_of(starts))
    return xp.reshape(starts[:, None] + within, (-1,))


def _codes_at(packed: Array, bits: int, positions: Array) -> Array:
    """Return the unpacked codes at some positions."""
    if bits == 8:
        return ops.pick(packed, positions)
    xp = namespace(packed, positions)
    # Eight codes fill `bits` bytes. The last group may be shorter, and then its last byte is repeated.
    index = xp.minimum(_runs(positions // 8 * bits, bits, 1), xp.asarray(packed.shape[0] - 1, device=device_of(packed)))
    codes = ops.unpack_codes(ops.pick(packed, index), bits, 8 * positions.shape[0])
    numbers = xp.arange(positions.shape[0], dtype=positions.dtype, device=device_of(positions))
    return ops.pick(codes, 8 * numbers + positions % 8)


def _scales_at(stored: Any, scale_format: str | ScaleFormat, blocks: Array) -> Array:
    """Return the scales of some blocks as float32. The roundings are those of ``decode_flat``."""
    if not isinstance(scale_format, ScaleFormat):
        return ops.widen(ops.pick(stored, blocks))
    layout = layout_of(scale_format.format, stored.shape)
    inner = _scales_at(stored.scales, scale_format.dtype, layout.blocks_at(blocks))
    codes, levels = _codes_at(stored.packed, layout.bits, blocks), layout.codebook.levels
    packed = codes if layout.bits == 8 else ops.pack_codes(codes, layout.bits)
    scales = namespace(inner).empty(blocks.shape, dtype=inner.dtype, device=device_of(inner))
    ops.decode(ops.PackedBlocks(packed, inner, None, levels, layout.bits, 1), scales)
    if stored.offset is not None:
        with np.errstate(over="ignore"):  # as in decode_flat
            scales += stored.offset
    return scales
