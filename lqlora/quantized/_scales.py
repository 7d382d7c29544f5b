"""Storing scales: as floats, or quantized themselves to any depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import NonFiniteError
from lqlora.formats import ScaleFormat
from lqlora.quantized._encoding import decode_scales, encode_array, unpacked
from lqlora.quantized.array import QuantizedArray

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["code_neighbors", "require_in_range", "store_scales", "with_codes"]


def store_scales(
    scales: Array, scale_format: str | ScaleFormat, name: str
) -> tuple[Array, Array] | tuple[QuantizedArray, Array]:
    """Return scales as a format stores them, an array of its dtype or codes with second-level scales, and as decoded."""
    if not isinstance(scale_format, ScaleFormat):
        cast = ops.storage_cast(scales, scale_format)
        decoded = cast if scale_format == "float32" else ops.widen(cast)
        require_in_range(decoded, scale_format, name)
        return cast, decoded
    xp = namespace(scales)
    wide, fmt = ops.storage_cast(scales, "float32"), scale_format.format
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused as a second-level scale
        offset = _offset(wide, scale_format.offset)
        centered = wide if offset is None else wide - offset
    try:
        second, decoded_second = store_scales(_absmax(centered, fmt.block_size), fmt.scales, name)
    except NonFiniteError:
        require_in_range(wide, "float32", name)
        raise
    packed = encode_array(centered, fmt, decoded_second)
    stored = QuantizedArray(packed, second, fmt, tuple(wide.shape), offset)
    decoded = decode_scales(stored)
    if bool(xp.all((decoded > 0) & (decoded < math.inf) & (wide >= 0))):  # nearly always
        return stored, decoded
    require_in_range(decoded, scale_format, name)  # a rounded second-level scale plus the offset may be out of range
    wrong = xp.sign(wide) * decoded <= 0
    if not bool(xp.any(wrong & (wide != 0))):
        return stored, decoded
    moved = _with_signs(stored, wide)
    return moved, decode_scales(moved)


def _absmax(flat: Array, block_size: int) -> Array:
    return ops.block_absmax(flat, max(1, min(block_size, flat.shape[0])))


def _offset(scales: Array, kind: str) -> Array | None:
    xp = namespace(scales)
    if kind == "none":
        return None
    if not scales.shape[0]:
        return xp.zeros((1,), dtype=xp.float32, device=device_of(scales))
    if kind == "min":
        return xp.reshape(xp.min(scales), (1,))
    # Summed in an order of our own: the mean of a library is that of its own order, and so would be the bytes.
    total = ops.row_sums(xp.astype(xp.reshape(scales, (1, -1)), xp.float64))
    # An array of one number and not the number: a library may multiply by the reciprocal of that.
    count = xp.full((1,), scales.shape[0], dtype=xp.float64, device=device_of(scales))
    return xp.astype(total / count, xp.float32)


def _with_signs(stored: QuantizedArray, scales: Array) -> QuantizedArray:
    """Move the codes of scales that decode to zero, or to the other sign, until they do not.

    The weights of such a block would all be lost. With the nearest code of the right sign the block's scale is too
    large, which costs less: none of its weights comes back with more than its own size as error.
    """
    xp = namespace(scales)
    last = len(stored.format.codebook) - 1
    for _ in range(last):
        decoded, codes = decode_scales(stored), unpacked(stored)
        low = (scales > 0) & (decoded <= 0) & (codes < last)
        high = (scales < 0) & (decoded >= 0) & (codes > 0)
        if not bool(xp.any(low | high)):
            break
        stored = with_codes(stored, codes + xp.astype(low, xp.uint8) - xp.astype(high, xp.uint8))
    return stored


def with_codes(stored: QuantizedArray, codes: Array) -> QuantizedArray:
    """Return scales that share everything but their codes."""
    packed = ops.pack_codes(codes, stored.format.bits)
    return QuantizedArray(packed, stored.scales, stored.format, stored.shape, stored.offset)


def code_neighbors(stored: QuantizedArray, wanted: Array) -> list[QuantizedArray]:
    """Return variants of scales whose codes are near to other scales than those they were made of.

    They share second-level scales and offset with what is given: the nearest codes to ``wanted``, those below and those
    above.
    """
    xp = namespace(wanted)
    wide = ops.storage_cast(wanted, "float32")
    centered = wide if stored.offset is None else wide - stored.offset
    nearest = QuantizedArray(
        encode_array(centered, stored.format, decode_scales(stored.scales)),
        stored.scales,
        stored.format,
        stored.shape,
        stored.offset,
    )
    codes, last = unpacked(nearest), len(stored.format.codebook) - 1
    below = codes - xp.astype(codes > 0, xp.uint8)
    above = codes + xp.astype(codes < last, xp.uint8)
    return [nearest, with_codes(stored, below), with_codes(stored, above)]


def require_in_range(scales: Array, scale_format: str | ScaleFormat, name: str) -> None:
    """Refuse scales that are not finite."""
    try:
        ops.require_finite(scales, "The array of scales")
    except NonFiniteError as error:
        raise NonFiniteError(f"A scale of {name} is beyond the range of {scale_format}: {error}") from None
