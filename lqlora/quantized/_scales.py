r"""Storage of scales: as floats, or quantized themselves to any depth.

Quantized scales are codes of an array of scales ``s`` from which an offset ``o`` was subtracted: its minimum, its mean,
or zero. With the second-level scale ``t`` of its block and a level ``l``, a scale decodes to

.. math:: \hat s = \operatorname{float32}(t \, l) + o .

The weights are encoded against :math:`\hat s`, so an error of :math:`\hat s` costs little as long as it is small and
:math:`\hat s` has the sign of ``s``. If :math:`\hat s` is zero, the whole block decodes to zeros. :func:`_with_signs` moves
codes away from that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import NonFiniteError
from lqlora.formats import ScaleFormat
from lqlora.quantized._decoding import decode_flat, decode_scales, unpacked
from lqlora.quantized._encoding import encode_codes
from lqlora.quantized._layout import layout_of
from lqlora.quantized.array import QuantizedArray

if TYPE_CHECKING:
    from lqlora._typing import Array, FloatName

__all__ = ["code_neighbors", "require_in_range", "store_scales", "with_codes", "with_scale_format"]


def store_scales(
    scales: Array, scale_format: str | ScaleFormat, name: str
) -> tuple[Array, Array] | tuple[QuantizedArray, Array]:
    """Return scales as a format stores them, and as they decode.

    The first is an array of the format's dtype, or a quantized array with second-level scales; the second is an array of
    float32. ``name`` is that of the weights, for messages.
    """
    xp = namespace(scales)
    is_wide = scales.dtype == xp.float32
    if not isinstance(scale_format, ScaleFormat):
        if is_wide and scale_format == "float32":
            require_in_range(scales, scale_format, name)
            return scales, scales
        cast = ops.storage_cast(scales, scale_format)
        decoded = cast if scale_format == "float32" else ops.widen(cast)
        require_in_range(decoded, scale_format, name)
        return cast, decoded
    wide = scales if is_wide else ops.storage_cast(scales, "float32")
    fmt, shape = scale_format.format, tuple(wide.shape)
    layout = layout_of(fmt, shape)
    offset = _offset(wide, scale_format.offset)
    if offset is None:
        centered = wide
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused as a second-level scale
            centered = wide - offset
    # Second-level scales t are the absolute maxima of s - o over their blocks, stored by this function one depth further.
    # Codes are chosen under t as it decodes, so that the error of t does not add to that of the codes.
    try:
        second, decoded_second = store_scales(ops.block_absmax(centered, layout.block_size), fmt.scales, name)
    except NonFiniteError:
        require_in_range(wide, "float32", name)
        raise
    packed = encode_codes(centered, layout, decoded_second)
    stored = QuantizedArray(packed, second, fmt, shape, offset)
    decoded = decode_flat(layout, packed, decoded_second, offset)
    # The usual case: no scale is negative, and all decode to finite numbers above zero.
    if bool(xp.all((decoded > 0) & (decoded < math.inf) & (wide >= 0))):
        return stored, decoded
    require_in_range(decoded, scale_format, name)  # a rounded second-level scale plus the offset may be out of range
    # The positive-scale rule. sign(s) s^ <= 0 holds for the two faults of a decoded scale s^: it is zero, so that its block
    # decodes to zeros, or it has the other sign. It also holds for s = 0, which the next line exempts: nothing is lost there.
    # Small scales are at risk, since the error of s^ is up to half a step of t l, which does not shrink with s.
    wrong = xp.sign(wide) * decoded <= 0
    if not bool(xp.any(wrong & (wide != 0))):
        return stored, decoded
    moved = _with_signs(stored, wide)
    return moved, _decoded(moved)


def with_scale_format(q: QuantizedArray, scale_format: FloatName | ScaleFormat, name: str) -> QuantizedArray:
    """Return a quantized array with the same codes whose scales are stored in another format, each rounded to nearest."""
    fmt = replace(q.format, scales=scale_format)
    if q.batch_shape:
        parts = [with_scale_format(own, scale_format, f"{name}[{index}]") for index, own in enumerate(q.unstack())]
        return QuantizedArray.stack(parts, q.batch_shape)
    scales = decode_scales(q.scales, q.format.scales)
    return replace(q, scales=store_scales(scales, scale_format, name)[0], format=fmt)


def _decoded(stored: QuantizedArray) -> Array:
    """Return the scales that quantized scales decode to."""
    inner = decode_scales(stored.scales, stored.format.scales)
    return decode_flat(layout_of(stored.format, stored.shape), stored.packed, inner, stored.offset)


def _offset(scales: Array, kind: str) -> Array | None:
    if kind == "none":
        return None
    xp = namespace(scales)
    if not scales.shape[0]:
        return xp.zeros((1,), dtype=xp.float32, device=device_of(scales))
    if kind == "min":
        return xp.reshape(xp.min(scales), (1,))
    # Summed in a fixed order: the mean of a library depends on its own order of additions, and so would the bytes.
    with np.errstate(over="ignore", invalid="ignore"):  # as in store_scales
        total = ops.row_sums(xp.astype(xp.reshape(scales, (1, -1)), xp.float64))
        # An array of one number, not the number: a library may multiply by the reciprocal of a number.
        count = xp.full((1,), scales.shape[0], dtype=xp.float64, device=device_of(scales))
        return xp.astype(total / count, xp.float32)


def _with_signs(stored: QuantizedArray, scales: Array) -> QuantizedArray:
    """Move the codes of scales that decode to zero, or to the other sign, to the nearest code of the right sign.

    Otherwise all weights of such a block would decode to zero, or with the wrong sign. A scale that is too large costs
    less: a weight then rounds to zero or to a level of its own sign, so its error is at most about the weight itself.
    Codes move by one in each pass, because the levels next to zero differ between codebooks and depths.
    """
    xp = namespace(scales)
    # t >= 0 and levels ascend, so t l + o does not decrease with the code: a higher code is right for s > 0, a lower one for
    # s < 0. A code moves at most ``last`` times. Where t = 0 no code helps, and the block is counted as lost later.
    last = len(stored.format.codebook) - 1
    for _ in range(last):
        decoded, codes = _decoded(stored), unpacked(stored)
        low = (scales > 0) & (decoded <= 0) & (codes < last)
        high = (scales < 0) & (decoded >= 0) & (codes > 0)
        if not bool(xp.any(low | high)):
            break
        stored = with_codes(stored, codes + xp.astype(low, xp.uint8) - xp.astype(high, xp.uint8))
    return stored


def with_codes(stored: QuantizedArray, codes: Array) -> QuantizedArray:
    """Return quantized scales with other codes and the same second-level scales and offset."""
    packed = ops.pack_codes(codes, stored.format.bits)
    return QuantizedArray(packed, stored.scales, stored.format, stored.shape, stored.offset)


def code_neighbors(stored: QuantizedArray, wanted: Array) -> list[QuantizedArray]:
    """Return three candidates for quantized scales near given values: with the nearest codes, one below, one above.

    They share second-level scales and offset with ``stored``. The nearest scale need not be the best one for the weights,
    which is why a fit also tries the neighbors.
    """
    # The error E of a block as a function of its scale is not a parabola across a change of codes, and not symmetric about
    # its minimum. The scale nearest to the best one may leave more error than the next one on the other side. The codes
    # below and above include both sides.
    xp = namespace(wanted)
    wide = ops.storage_cast(wanted, "float32")
    centered = wide if stored.offset is None else wide - stored.offset
    second = decode_scales(stored.scales, stored.format.scales)
    packed = encode_codes(centered, layout_of(stored.format, stored.shape), second)
    nearest = QuantizedArray(packed, stored.scales, stored.format, stored.shape, stored.offset)
    codes, last = unpacked(nearest), len(stored.format.codebook) - 1
    below = codes - xp.astype(codes > 0, xp.uint8)
    above = codes + xp.astype(codes < last, xp.uint8)
    return [nearest, with_codes(stored, below), with_codes(stored, above)]


def require_in_range(scales: Array, scale_format: str | ScaleFormat, name: str) -> None:
    """Raise unless all scales are finite."""
    if ops.is_finite(scales):
        return
    try:
        ops.require_finite(scales, "the array of scales")
    except NonFiniteError as error:
        raise NonFiniteError(f"scales of {name} must be in the range of {scale_format}: {error}") from None
