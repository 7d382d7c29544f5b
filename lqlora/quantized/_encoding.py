"""Encoding of dense values as packed codes under given scales, piece by piece in block order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.codebooks.codebook import cell_boundaries
from lqlora.quantized._decoding import host_levels, read_only
from lqlora.quantized._layout import Layout, stream_size
from lqlora.quantized._trellis import encode_sequences

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["encode_by_absmax", "encode_codes"]


def encode_codes(
    dense: Array, layout: Layout, scales: Array, zero_points: Array | None = None, levels: Array | None = None
) -> Array:
    """Return the packed codes of the levels nearest to an array, under its scales as they decode.

    In a trellis format, these are the sequences of least squared error.

    Parameters
    ----------
    dense : array
        The array with its entries in block order: a flat array, or the result of ``blocks_last``.
    layout : Layout
        Its layout.
    scales : array of float32, shape (blocks,)
        Decoded scales.
    zero_points : array of uint8, shape (blocks,), optional
        Zero points of an affine format.
    levels : array of float32, shape (sets, n), optional
        Fitted levels; those of the codebook by default.

    Returns
    -------
    array of uint8
        Packed codes.
    """
    if layout.is_trellis:
        return encode_sequences(dense, layout, scales)
    table = host_levels(levels, layout.codebook)
    if table is None:
        boundaries = ops.boundaries_by_set(levels)
    else:
        boundaries = layout.codebook.boundaries if levels is None else read_only(cell_boundaries(table))
    if ops.dtype_name(dense) == "float64":
        # A float32 quotient could cross a boundary that the float64 weight does not: scales are widened, exactly.
        scales = namespace(scales).astype(scales, namespace(scales).float64)
    # Pieces begin at multiples of eight weights, where a code of any width begins a byte: 8 b bits are b bytes. So pieces
    # are packed by themselves, and no byte is shared by two of them.
    packed = None
    for piece in layout.pieces(dense):
        flat = ops.take_flat(dense, piece[0].start, piece[0].stop)
        if table is None:
            codes = _codes_by_set(flat, layout, scales, boundaries, piece[0])
        else:
            own, zeros, size = layout.scales_of(scales, zero_points, piece)
            codes = ops.encode_packed(flat, own, zeros, boundaries, layout.bits, size)
        if piece[0].stop - piece[0].start == layout.count:
            return codes
        packed = _empty_codes(layout, dense) if packed is None else packed
        packed[layout.bytes_of(piece[0])] = codes
    return _empty_codes(layout, dense) if packed is None else packed


def _codes_by_set(flat: Array, layout: Layout, scales: Array, boundaries: Array, weights: slice) -> Array:
    """Return the packed codes of a piece in which each line has the levels of its set."""
    xp, sets = namespace(flat), layout.sets_of(weights, scales)
    own = ops.pick(scales, layout.block_of(weights, scales))
    normalized = ops.normalize(ops.widen(flat)[:, None], own)
    codes = ops.nearest_codes_by_row(xp.reshape(normalized, (sets.shape[0], -1)), boundaries, sets)
    return ops.pack_codes(xp.reshape(codes, (-1,)), layout.bits)


def encode_by_absmax(dense: Array, layout: Layout) -> tuple[Array, Array] | None:
    """Return the absolute maxima of the blocks and the packed codes, found in one pass over the weights.

    Returns None where one pass is not enough: the maxima are not the decoded scales, bit for bit, or the ends of blocks and
    pieces differ.
    """
    # Encoding needs the decoded scales, and in general those are known only once all statistics are. Where the maxima are
    # stored as they are, a block's codes follow from the block alone, while it is still in the cache.
    if not (layout.stores_absmax and layout.is_even and layout.count) or ops.dtype_name(dense) == "float64":
        return None
    if not layout.whole and 8 * layout.block_size > stream_size(dense):  # a piece is eight whole blocks or more
        return None
    scales, packed = [], None
    for weights, _ in layout.pieces(dense):
        flat = ops.take_flat(dense, weights.start, weights.stop)
        own, codes = ops.encode_by_absmax(flat, layout.codebook.boundaries, layout.bits, layout.block_size)
        if weights.stop - weights.start == layout.count:
            return own, codes
        packed = _empty_codes(layout, dense) if packed is None else packed
        packed[layout.bytes_of(weights)] = codes
        scales.append(own)
    return namespace(dense).concat(scales), packed


def _empty_codes(layout: Layout, like: Array) -> Array:
    xp, size = namespace(like), ops.packed_size(layout.count, layout.bits)
    return xp.empty((size,), dtype=xp.uint8, device=device_of(like))
