"""Encoding, decoding and scales of trellis formats, whose codes depend on their neighbors.

A sequence of codes lies inside a block, so blocks are independent of each other as in other formats. Arrays are worked on
in pieces of whole blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.ops.trellis import SEQUENCE, trellis_codes, trellis_values
from lqlora.quantized._layout import piece_size

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.codebooks import Trellis
    from lqlora.quantized._layout import Layout

__all__ = ["column_values", "decode_piece", "encode_sequences", "scale_ratios", "values_of_rows"]


def encode_sequences(dense: Array, layout: Layout, scales: Array, importance: Array | None = None) -> Array:
    """Return the packed codes of the sequences of least error under some scales.

    Parameters
    ----------
    dense : array
        The array with its entries in block order: a flat array, or the result of ``blocks_last``.
    layout : Layout
        Its layout.
    scales : array of float32, shape (blocks,)
        Decoded scales.
    importance : array, optional
        Factor of each squared error, in block order.

    Returns
    -------
    array of uint8
        Packed codes.
    """
    xp = namespace(dense)
    if ops.dtype_name(dense) == "float64":
        scales = xp.astype(scales, xp.float64)
    packed = xp.zeros((ops.packed_size(layout.count, layout.bits),), dtype=xp.uint8, device=device_of(dense))
    for weights, blocks in layout.aligned_blocks(piece_size(dense)):
        flat = ops.take_flat(dense, weights.start, weights.stop)
        own = None
        if importance is not None:
            own = xp.astype(ops.widen(ops.take_flat(importance, weights.start, weights.stop)), xp.float32, copy=False)
        packed[layout.bytes_of(weights)] = ops.encode_trellis(
            flat, scales[blocks], own, layout.codebook.levels, layout.bits, layout.block_size, _length(layout, weights)
        )
    return packed


def _length(layout: Layout, weights: slice) -> int:
    """Return the length of the lines of a piece: blocks of an even layout follow each other across the ends of lines."""
    return weights.stop - weights.start if layout.is_even else layout.length


def decode_piece(layout: Layout, packed: Array, scales: Array, piece: tuple[slice, slice], out: Array) -> None:
    """Write the values of a piece of whole blocks."""
    weights, blocks = piece
    stored = ops.PackedTrellis(
        packed[layout.bytes_of(weights)], scales[blocks], layout.codebook.levels, layout.bits, layout.block_size,
        _length(layout, weights),
    )  # fmt: skip
    ops.decode_trellis(stored, out)


def values_of_rows(rows: Array, levels: Array, bits: int) -> Array:
    """Return the values of the sequences of least error for rows of normalized weights, one block a row."""
    xp = namespace(rows)
    parts = []
    for first in range(0, rows.shape[1], SEQUENCE):
        own = rows[:, first : first + SEQUENCE]
        parts.append(trellis_values(trellis_codes(own, None, levels, bits), levels, bits))
    return xp.concat(parts, axis=1) if parts else xp.astype(rows, xp.float32)


def column_values(target: Array, scales: Array, book: Trellis, block_size: int) -> Array:
    """Return the values of a column of weights whose blocks begin with it, given the scale of each weight."""
    xp, count = namespace(target), target.shape[0]
    own = scales[::block_size]
    packed = ops.encode_trellis(target, xp.astype(own, target.dtype), None, book.levels, book.bits, block_size, count)
    values = xp.empty((count,), dtype=xp.float32, device=device_of(target))
    return ops.decode_trellis(ops.PackedTrellis(packed, own, book.levels, book.bits, block_size, count), values)


def scale_ratios(entries: Array, values: Array, importance: Array | None) -> Array:
    r"""Return the least-squares scale of each row for the values of its codes under the scale one.

    With importance ``w``, weights ``x`` and values ``v`` it is :math:`\sum w x v / \sum w v^2`, and zero where the codes say
    nothing about it.
    """
    xp = namespace(entries)
    x, v = xp.astype(entries, xp.float64), xp.astype(values, xp.float64)
    weighted = v if importance is None else xp.astype(importance, xp.float64) * v
    above, below = ops.row_sums(weighted * x), ops.row_sums(weighted * v)
    return xp.where(below > 0, above / xp.where(below > 0, below, xp.ones_like(below)), xp.zeros_like(below))
