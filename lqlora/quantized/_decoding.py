"""Decoding of packed codes: dense values, scales under double quantization, and unpacked codes.

The functions read the fields of a :class:`lqlora.QuantizedArray` without batch dimensions. They need only its format to
know whether its scales are quantized, so this module lies below the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.formats import ScaleFormat
from lqlora.quantized._layout import Layout, blocks_last, in_shape, layout_of, piece_size
from lqlora.quantized._trellis import decode_piece

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from lqlora._typing import Array
    from lqlora.codebooks import Codebook
    from lqlora.formats import BlockFormat
    from lqlora.quantized._layout import Piece

__all__ = ["decode_flat", "decode_into", "decode_scales", "host_levels", "read_only", "unpacked", "zero_point_codes"]


class _Quantized(Protocol):
    """The fields of a :class:`lqlora.QuantizedArray`, which is defined above this module."""

    @property
    def packed(self) -> Array: ...
    @property
    def scales(self) -> Any: ...
    @property
    def format(self) -> BlockFormat: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> Array | None: ...
    @property
    def zero_points(self) -> Array | None: ...
    @property
    def levels(self) -> Array | None: ...


def host_levels(levels: Array | None, codebook: Codebook) -> npt.NDArray[np.float32] | None:
    """Return the levels as one NumPy table if all weights share them and reading them copies nothing, else None."""
    if levels is None or not levels.shape[0]:  # an array without lines has no sets of levels, and nothing to round
        return codebook.levels
    if levels.shape[0] > 1 or not ops.is_on_host(levels):
        return None
    return read_only(np.asarray(ops.convert(levels, np))[0].copy())


def read_only(table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mark a table as constant: operations receive read-only tables in NumPy whatever the library of their arrays."""
    table.flags.writeable = False
    return table


def decode_scales(stored: Array | _Quantized, scale_format: str | ScaleFormat) -> Array:
    """Return scales as float32, one per block, from what a format stores for them."""
    if isinstance(scale_format, ScaleFormat):
        inner = decode_scales(stored.scales, scale_format.dtype)
        return decode_flat(layout_of(scale_format.format, stored.shape), stored.packed, inner, stored.offset)
    if scale_format == "float32" and not getattr(stored, "requires_grad", False):
        return stored
    return ops.widen(stored)


def decode_flat(layout: Layout, packed: Array, inner: Array, offset: Array | None) -> Array:
    """Return the values of quantized scales, given their second-level scales as float32.

    Scales lie in one line, without zero points or fitted levels. A small array of them takes one call of an operation. Every
    product with a double-quantized weight makes this call, so it must be cheap.
    """
    # The order of the roundings is part of the format. With the second-level scale t, the offset o and levels l and l':
    #     s = round32(round32(t l') + o) ,   w = round32(s l) .
    # t (l' l), or an addition fused into the product, differs in the last bit. Weights were encoded against s as it is here,
    # so every implementation must round in this order.
    xp = namespace(packed)
    decoded = xp.empty((layout.count,), dtype=xp.float32, device=device_of(packed))
    if not layout.whole:
        _decode_pieces(layout, _Stored(packed, inner, None, None, offset), decoded)
        return decoded
    ops.decode(ops.PackedBlocks(packed, inner, None, layout.codebook.levels, layout.bits, layout.block_size), decoded)
    if offset is not None:
        with np.errstate(over="ignore"):  # quantize() checks the decoded scales and refuses infinite ones
            decoded += offset
    return decoded


def zero_point_codes(q: _Quantized) -> Array | None:
    """Return the unpacked zero points of an affine format, one per block."""
    if q.zero_points is None:
        return None
    return ops.unpack_codes(q.zero_points, q.format.codebook.zero_point_bits, layout_of(q.format, q.shape).blocks)


def decode_into(q: _Quantized, out: Array) -> None:
    """Write the dense values into another array of the same shape, of any strides."""
    scales = decode_scales(q.scales, q.format.scales)
    _decode_pieces(
        layout_of(q.format, q.shape), _Stored(q.packed, scales, zero_point_codes(q), q.levels, q.offset), out
    )


class _Stored(NamedTuple):
    """Arrays that pieces are decoded from: packed codes, decoded scales, zero points, fitted levels, and an offset."""

    packed: Array
    scales: Array
    zero_points: Array | None
    levels: Array | None
    offset: Array | None


def _decode_pieces(layout: Layout, stored: _Stored, out: Array) -> None:
    """Write dense values piece by piece; in place where the memory of ``out`` allows that."""
    xp, table = namespace(stored.packed), host_levels(stored.levels, layout.codebook)
    target, dtype = blocks_last(out, layout.axis), ops.dtype_name(out)
    # Values are rounded to a narrow dtype where they are made, unless an offset is added to them first.
    own = out.dtype if stored.offset is None and dtype in ("float16", "bfloat16") else xp.float32
    in_place = out.dtype == own and ops.is_contiguous(target)
    dense = xp.reshape(target, (-1,)) if in_place else None
    pieces: Iterable[Piece]
    pieces = layout.aligned_blocks(piece_size(target)) if layout.is_trellis else layout.pieces(target, streams=in_place)
    for piece in pieces:
        weights, blocks = piece
        if dense is None:
            flat = xp.empty((weights.stop - weights.start,), dtype=own, device=device_of(stored.packed))
        else:
            flat = dense[weights]
        # An affine code decodes to (l - z) s. The difference of level and zero point is an integer below 256, exact in float32, so
        # there is one rounding here too.
        packed = stored.packed[layout.bytes_of(weights)]
        if layout.is_trellis and blocks is not None:
            decode_piece(layout, stored.packed, stored.scales, (weights, blocks), flat)
        elif table is None:
            _decode_by_set(layout, packed, stored.scales, stored.levels, weights, flat)
        else:
            scales, zeros, size = layout.scales_of(stored.scales, stored.zero_points, piece)
            ops.decode(ops.PackedBlocks(packed, scales, zeros, table, layout.bits, size), flat)
        if stored.offset is not None:
            with np.errstate(over="ignore"):  # as in decode_flat
                flat += stored.offset
        if dense is None:
            ops.put_flat(target, weights.start, flat if out.dtype == own else ops.storage_cast(flat, dtype))


def _decode_by_set(layout: Layout, packed: Array, scales: Array, levels: Array, weights: slice, out: Array) -> None:
    """Write the values of a piece in which each line has the levels of its set."""
    xp = namespace(scales)
    sets = layout.sets_of(weights, scales)
    codes = ops.unpack_codes(packed, layout.bits, weights.stop - weights.start)
    values = xp.reshape(ops.values_by_row(xp.reshape(codes, (sets.shape[0], -1)), levels, sets), (-1,))
    values = values * ops.pick(scales, layout.block_of(weights, scales))
    out[...] = values if out.dtype == values.dtype else ops.storage_cast(values, ops.dtype_name(out))


def unpacked(q: _Quantized) -> Array:
    """Return the codes as an array of uint8 of the dense shape."""
    layout = layout_of(q.format, q.shape)
    return in_shape(ops.unpack_codes(q.packed, layout.bits, layout.count), layout.axis, q.shape)
