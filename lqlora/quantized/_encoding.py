"""Between dense values and packed codes, for scales that are given: piece by piece, in block order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.codebooks.codebook import cell_boundaries
from lqlora.quantized._layout import Layout, blocks_last, in_shape, piece_size, stream_size
from lqlora.quantized.array import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from lqlora._typing import Array
    from lqlora.codebooks import Codebook
    from lqlora.formats import BlockFormat

__all__ = ["decode_into", "decode_scales", "encode_array", "encode_by_absmax", "host_levels", "read_only", "unpacked"]


def host_levels(levels: Array | None, codebook: Codebook) -> npt.NDArray[np.float32] | None:
    """Return the one set of levels that all weights have as NumPy knows it, if reading it copies nothing."""
    if levels is None or not levels.shape[0]:  # an array without lines has no sets of levels, and nothing to round
        return codebook.levels
    if levels.shape[0] > 1 or not ops.is_on_host(levels):
        return None
    return read_only(np.asarray(ops.convert(levels, np))[0].copy())


def read_only(table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mark a table as one that every library is given as it is."""
    table.flags.writeable = False
    return table


def encode_array(
    array: Array, fmt: BlockFormat, scales: Array, zero_points: Array | None = None, levels: Array | None = None
) -> Array:
    """Return the packed codes of an array, nearest to its values under the scales as they will be decoded."""
    layout = Layout.of(fmt, array.shape)
    encode = _encoder(layout, fmt, scales, zero_points, levels)
    dense = blocks_last(array, fmt.axis)
    packed = None
    for weights, blocks in _pieces(layout, fmt, dense, stream_size(dense)):
        codes = encode(ops.take_flat(dense, weights.start, weights.stop), weights, blocks)
        if weights.stop - weights.start == layout.count:
            return codes
        packed = _empty_codes(layout, fmt, array) if packed is None else packed
        packed[_bytes(weights, fmt.bits)] = codes
    return _empty_codes(layout, fmt, array) if packed is None else packed


def encode_by_absmax(array: Array, fmt: BlockFormat) -> tuple[Array, Array] | None:
    """Return absolute maxima of blocks and packed codes, read together; None where these are not the scales as decoded."""
    book, layout, dense = fmt.codebook, Layout.of(fmt, array.shape), blocks_last(array, fmt.axis)
    is_plain = fmt.scales == "float32" and fmt.levels == "codebook" and ops.dtype_name(array) != "float64"
    limit = stream_size(dense)
    are_whole = layout.count and layout.is_even and 8 * layout.block_size <= limit
    if not (is_plain and are_whole and book.normalization == "absmax" and book.widest == 1.0):
        return None
    scales, packed = [], None
    for weights, blocks in layout.byte_pieces(limit):
        flat = ops.take_flat(dense, weights.start, weights.stop)
        own, codes = ops.encode_by_absmax(flat, book.boundaries, fmt.bits, layout.block_size)
        if blocks == slice(0, layout.blocks):
            return own, codes
        packed = _empty_codes(layout, fmt, array) if packed is None else packed
        packed[_bytes(weights, fmt.bits)] = codes
        scales.append(own)
    return namespace(array).concat(scales), packed


def _empty_codes(layout: Layout, fmt: BlockFormat, like: Array) -> Array:
    size, device = ops.packed_size(layout.count, fmt.bits), device_of(like)
    return namespace(like).empty((size,), dtype=namespace(like).uint8, device=device)


def _pieces(layout: Layout, fmt: BlockFormat, like: Array, limit: int) -> Iterator[tuple[slice, slice | None]]:
    """Yield the pieces of an array; whole lines where lines have levels of their own."""
    if isinstance(fmt.levels, int):
        return layout.line_pieces(piece_size(like))
    # Where blocks and pieces do not line up, scales are repeated for each weight.
    lines_up = layout.is_even and (layout.block_size <= limit or layout.blocks == 1)
    return layout.byte_pieces(limit if lines_up else piece_size(like))


def _sets(layout: Layout, fmt: BlockFormat, weights: slice, like: Array) -> Array:
    """Return the set of levels of each row that a piece is laid out as: a line, or everything."""
    if not isinstance(fmt.levels, int):
        return namespace(like).zeros((1,), dtype=namespace(like).int64, device=device_of(like))
    return layout.lines_of(weights, like) // fmt.levels


def _bytes(weights: slice, bits: int) -> slice:
    return slice(weights.start * bits // 8, ops.packed_size(weights.stop, bits))


def _encoder(
    layout: Layout, fmt: BlockFormat, scales: Array, zero_points: Array | None, levels: Array | None
) -> Callable[[Array, slice, slice | None], Array]:
    """Return a function from the weights of a piece to their packed codes."""
    table = host_levels(levels, fmt.codebook)

    if table is not None:
        boundaries = fmt.codebook.boundaries if levels is None else read_only(cell_boundaries(table))

        def by_table(flat: Array, weights: slice, blocks: slice | None) -> Array:
            own, zeros, size = _spread(layout, scales, zero_points, weights, blocks)
            own = namespace(flat).astype(own, _arithmetic(flat), copy=False)
            return ops.encode_packed(flat, own, zeros, boundaries, fmt.bits, size)

        return by_table

    cells = ops.boundaries_by_set(levels)

    def by_set(flat: Array, weights: slice, blocks: slice | None) -> Array:  # noqa: ARG001
        xp = namespace(flat)
        sets = _sets(layout, fmt, weights, scales)
        own = xp.astype(ops.pick(scales, layout.block_of(weights, scales)), _arithmetic(flat))
        normalized = ops.normalize(ops.widen(flat)[:, None], own)
        codes = ops.nearest_codes_by_row(xp.reshape(normalized, (sets.shape[0], -1)), cells, sets)
        return ops.pack_codes(xp.reshape(codes, (-1,)), fmt.bits)

    return by_set


def _arithmetic(flat: Array) -> Any:
    """Return the dtype that an array is computed with in."""
    return namespace(flat).float64 if ops.dtype_name(flat) == "float64" else namespace(flat).float32


def _spread(
    layout: Layout, scales: Array, zero_points: Array | None, weights: slice, blocks: slice | None
) -> tuple[Array, Array | None, int]:
    """Return the scales of a piece: one per block, or one per weight where the piece begins or ends within a block."""
    if blocks is not None:
        return scales[blocks], None if zero_points is None else zero_points[blocks], layout.block_size
    index = layout.block_of(weights, scales)
    return ops.pick(scales, index), None if zero_points is None else ops.pick(zero_points, index), 1


def decode_scales(scales: Array | QuantizedArray) -> Array:
    """Return scales as float32, one per block."""
    if not isinstance(scales, QuantizedArray):
        return ops.widen(scales)
    xp, fmt, layout = namespace(scales.packed), scales.format, Layout.of(scales.format, scales.shape)
    decoded = xp.empty(scales.shape, dtype=xp.float32, device=device_of(scales.packed))
    if layout.count > piece_size(decoded):
        decode_into(scales, decoded)
        return decoded
    # One piece of a new array, in one line, of a codebook as it is: the shortest way, which every product goes.
    inner = decode_scales(scales.scales)
    ops.decode(scales.packed, inner, None, fmt.codebook.levels, fmt.bits, layout.block_size, decoded)
    if scales.offset is not None:
        with np.errstate(over="ignore"):
            decoded += scales.offset
    return decoded


def decode_into(q: QuantizedArray, out: Array) -> None:
    """Write the dense values of an array without batch dimensions into another of the same shape."""
    layout = Layout.of(q.format, q.shape)
    decode = _decoder(layout, q)
    target = blocks_last(out, q.format.axis)
    dtype, xp = ops.dtype_name(out), namespace(q.packed)
    # What nothing is added to is rounded to its dtype where it is made.
    own = out.dtype if q.offset is None and dtype in ("float16", "bfloat16") else xp.float32
    in_place = out.dtype == own and ops.is_contiguous(target)
    limit = stream_size(target) if in_place else piece_size(target)
    for weights, blocks in _pieces(layout, q.format, target, limit):
        if in_place:
            flat = ops.take_flat(target, weights.start, weights.stop)
        else:
            shape, device = (weights.stop - weights.start,), device_of(q.packed)
            flat = xp.empty(shape, dtype=own, device=device)
        decode(q.packed[_bytes(weights, q.format.bits)], weights, blocks, flat)
        if q.offset is not None:
            with np.errstate(over="ignore"):  # quantize() looks at the decoded scales and refuses infinite ones
                flat += q.offset
        if not in_place:
            ops.put_flat(target, weights.start, flat if out.dtype == own else ops.storage_cast(flat, dtype))


def _decoder(layout: Layout, q: QuantizedArray) -> Callable[[Array, slice, slice | None, Array], None]:
    """Return a function that writes the values of a piece's packed codes into a flat array."""
    table = host_levels(q.levels, q.format.codebook)
    scales, zero_points, bits = decode_scales(q.scales), q.zero_points, q.format.bits
    if zero_points is not None:
        zero_points = ops.unpack_codes(zero_points, bits, layout.blocks)

    if table is not None:
        known = table

        def by_table(packed: Array, weights: slice, blocks: slice | None, out: Array) -> None:
            own, zeros, size = _spread(layout, scales, zero_points, weights, blocks)
            ops.decode(packed, own, zeros, known, bits, size, out)

        return by_table

    def by_set(packed: Array, weights: slice, blocks: slice | None, out: Array) -> None:  # noqa: ARG001
        xp = namespace(scales)
        sets = _sets(layout, q.format, weights, scales)
        codes = xp.reshape(ops.unpack_codes(packed, bits, weights.stop - weights.start), (sets.shape[0], -1))
        values = xp.reshape(ops.values_by_row(codes, q.levels, sets), (-1,))
        values = values * ops.pick(scales, layout.block_of(weights, scales))
        out[...] = values if out.dtype == values.dtype else ops.storage_cast(values, ops.dtype_name(out))

    return by_set


def unpacked(q: QuantizedArray) -> Array:
    """Return the codes of an array without batch dimensions, in its shape."""
    flat = ops.unpack_codes(q.packed, q.format.bits, Layout.of(q.format, q.shape).count)
    return in_shape(flat, q.format.axis, q.shape)
