"""Multiplication by a quantized matrix that is not decoded as a whole, where its layout allows that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.quantized._encoding import decode_into, decode_scales, host_levels
from lqlora.quantized._layout import Layout

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.quantized.array import QuantizedArray

__all__ = ["multiply"]


def multiply(x: Array, q: QuantizedArray) -> Array:
    """Return ``x @ dequantize(q).T`` in the dtype of ``x``, a matrix."""
    xp, layout = namespace(x, q.packed), Layout.of(q.format, q.shape)
    levels, device = host_levels(q.levels, q.format.codebook), device_of(x)
    if levels is None or q.offset is not None or not layout.is_even or q.format.axis in (0, -2):
        dense = xp.empty(q.shape, dtype=ops.native_dtype(x, ops.factor_dtype(x)), device=device)
        decode_into(q, dense)
        return ops.matmul_dense(x, dense)
    zeros = None if q.zero_points is None else ops.unpack_codes(q.zero_points, q.format.bits, layout.blocks)
    out = xp.empty((x.shape[0], q.shape[0]), dtype=x.dtype, device=device)
    return ops.matmul_packed(x, q.packed, decode_scales(q.scales), zeros, levels, q.format.bits, layout.block_size, out)
