"""Quantized matrices in the block types of GGUF that hold them exactly: Q4_0, Q4_1, Q5_0 and Q8_0 of llama.cpp.

A row is cut into blocks of 32 weights. A block has these bytes, numbers being little-endian:

- Q4_0, 18 bytes: the scale ``d`` (float16), and 16 bytes of codes. Byte ``i`` has the code of weight ``i`` in its low half, and that of
  weight ``16 + i`` in its high half. A weight is ``d * (code - 8)``.
- Q4_1, 20 bytes: ``d`` and the minimum ``m`` (float16), and codes as above. A weight is ``d * code + m``.
- Q5_0, 22 bytes: ``d``, the highest bits of all codes as one word of 32 bits, and their lower bits as above. A weight is ``d * (code - 16)``.
- Q8_0, 34 bytes: ``d``, and 32 integers of 8 bits. A weight is ``d * integer``.

The codebooks ``int4s``, ``int5s`` and ``int8s`` have the same grids: level ``k`` and scale ``s`` are the integer ``-k`` and ``d = -s``, because
their largest level, which has no negative, is the lowest integer here. ``affine4`` and ``affine8`` fit if zero points are where a type has
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._options import require_choice
from lqlora.codebooks import affine, uniform
from lqlora.errors import FormatError, NonFiniteError
from lqlora.formats import BlockFormat
from lqlora.integrations._row_blocks import row_fault, row_scales, row_zero_points
from lqlora.integrations._words import on_host
from lqlora.quantized import QuantizedArray
from lqlora.quantized.array import require_quantized

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["BlockType", "block_type", "from_gguf_blocks", "gguf_bytes", "gguf_fault", "to_gguf_blocks"]

BlockType: TypeAlias = Literal["Q4_0", "Q4_1", "Q5_0", "Q8_0"]

_BLOCK = 32
_BYTES: dict[BlockType, int] = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}
_SIGNED: dict[int, BlockType] = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}


class _Numbers(NamedTuple):
    """Type of a matrix, and the numbers of each block, with a row for each row of the matrix."""

    kind: BlockType
    scales: npt.NDArray[np.float16]
    minima: npt.NDArray[np.float16] | None = None


@annotated
def to_gguf_blocks(q: QuantizedArray) -> npt.NDArray[np.uint8]:
    """Return a quantized matrix as the rows of a tensor in a GGUF file, of the type that :func:`block_type` names.

    Parameters
    ----------
    q : QuantizedArray
        Matrix of the codebook ``int4s``, ``int5s`` or ``int8s``, in blocks of 32 along rows of a multiple of 32 weights, with scales that
        float16 holds. Also of ``affine4`` or ``affine8`` if all zero points are 8 or 128, or their products with scales fit float16, which
        quantization does not see to.

    Returns
    -------
    ndarray of uint8, shape (rows, bytes)
        The blocks listed in :mod:`lqlora.integrations.gguf_blocks`. They decode to equal numbers; the sign of zeros may differ.

    Raises
    ------
    FormatError
        If no type can hold the array.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("int4s/32:float16"))
    >>> block_type(q), to_gguf_blocks(q).shape
    ('Q4_0', (2, 36))
    """
    found = _numbers(q)
    codes = np.asarray(q.to(np).codes).reshape(*found.scales.shape, _BLOCK)
    if q.format.codebook.normalization == "signed":
        codes = np.uint8(2**q.format.codebook.bits - 1) - codes
    parts = [found.scales[..., None].view(np.uint8)]
    if found.minima is not None:
        parts.append(found.minima[..., None].view(np.uint8))
    if found.kind == "Q8_0":
        parts.append(codes ^ np.uint8(128))  # code - 128 in two's complement
    else:
        if found.kind == "Q5_0":
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & np.uint8(15)
        parts.append(low[..., :16] | low[..., 16:] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(q.shape[0], -1)


@annotated
def block_type(q: QuantizedArray) -> BlockType:
    """Return the type of GGUF that holds a quantized matrix.

    Parameters
    ----------
    q : QuantizedArray
        See :func:`to_gguf_blocks`.

    Returns
    -------
    {"Q4_0", "Q4_1", "Q5_0", "Q8_0"}
        Name of the type.

    Raises
    ------
    FormatError
        If no type can hold the array.
    NonFiniteError
        If a scale is NaN or infinite.
    """
    return _numbers(q).kind


@annotated
def gguf_fault(q: QuantizedArray) -> str:
    """Return why no type of GGUF can hold a quantized array; nothing if one can.

    Parameters
    ----------
    q : QuantizedArray
        Array of any library.

    Returns
    -------
    str
        The sentence with which :func:`to_gguf_blocks` would refuse it.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> gguf_fault(lq.quantize(np.ones((2, 64), dtype=np.float32), lq.BlockFormat.parse("nf3/64:float32")))
    'codebook must be int4s, int5s, int8s, affine4 or affine8 for GGUF, got nf3.'
    """
    try:
        _numbers(q)
    except (FormatError, NonFiniteError) as error:
        return str(error)
    return ""


def gguf_bytes(kind: BlockType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a matrix in a type of GGUF.

    Parameters
    ----------
    kind : {"Q4_0", "Q4_1", "Q5_0", "Q8_0"}
        Name of the type.
    shape : tuple of int
        Shape of the matrix.

    Returns
    -------
    int
        Bytes.
    """
    return shape[0] * shape[1] // _BLOCK * _BYTES[kind]


@annotated
def from_gguf_blocks(blocks: Array, kind: BlockType) -> QuantizedArray:
    """Return the quantized matrix that the rows of a tensor in a GGUF file stand for.

    Parameters
    ----------
    blocks : array of uint8, shape (rows, bytes)
        Blocks listed in :mod:`lqlora.integrations.gguf_blocks`, of any array library.
    kind : {"Q4_0", "Q5_0", "Q8_0"}
        Name of the type. Q4_1 is not read: its minima are not products of scales and integers.

    Returns
    -------
    QuantizedArray
        NumPy arrays in the format ``int4s/32@-1:float16``, ``int5s/32@-1:float16`` or ``int8s/32@-1:float16``, with the same values but for
        the sign of zeros.

    Raises
    ------
    FormatError
        If the bytes are not those of blocks.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("int8s/32@-1:float16"))
    >>> back = from_gguf_blocks(to_gguf_blocks(q), "Q8_0")
    >>> str(back.format), bool((lq.dequantize(back) == lq.dequantize(q)).all())
    ('int8s/32@-1:float16', True)
    """
    require_choice(kind, "kind", tuple(_SIGNED.values()))
    size, bits = _BYTES[kind], next(bits for bits, own in _SIGNED.items() if own == kind)
    host = on_host(blocks, "blocks")
    if host.dtype != np.uint8 or host.ndim != 2 or not host.size or host.shape[1] % size:
        raise FormatError(
            f"blocks must be rows of uint8 of a multiple of {size} bytes for {kind}, got {host.dtype} of shape {host.shape}."
        )
    rows = len(host)
    own = np.ascontiguousarray(host).reshape(rows, -1, size)
    scales = np.ascontiguousarray(own[..., :2]).view("<f2")[..., 0]
    if not np.isfinite(scales).all():
        raise NonFiniteError(f"blocks must have finite scales, got {scales[~np.isfinite(scales)][0]}.")
    if kind == "Q8_0":
        integers = own[..., 2:] ^ np.uint8(128)
    else:
        low = own[..., -16:]
        integers = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
        if kind == "Q5_0":
            integers |= np.unpackbits(own[..., 2:6], axis=-1, bitorder="little") << np.uint8(4)
    codes = np.uint8(2**bits - 1) - integers
    shape = (rows, own.shape[1] * _BLOCK)
    fmt = BlockFormat(uniform(bits, normalization="signed"), _BLOCK, axis=-1, scales="float16")
    arrays = {"codes": ops.pack_codes(codes.reshape(-1), bits), "scales": -np.ascontiguousarray(scales).reshape(-1)}
    return QuantizedArray.from_arrays(arrays, fmt, shape)


def _numbers(q: QuantizedArray) -> _Numbers:
    """Return the type and the numbers of all blocks, or raise."""
    require_quantized(q)
    _check_layout(q)
    fmt, bits, own = q.format, q.format.codebook.bits, q.to(np)
    wide = row_scales(own)
    is_signed = fmt.codebook.normalization == "signed"
    narrow = _as_float16(-wide if is_signed else wide)
    if narrow is None:
        raise FormatError(f"scales must be such that float16 holds them for GGUF, got {fmt}.")
    if is_signed:
        return _Numbers(_SIGNED[bits], narrow)
    zeros = row_zero_points(own).astype(np.float32)
    if (zeros == 2 ** (bits - 1)).all():
        return _Numbers(_SIGNED[bits], narrow)
    minima = _as_float16(-wide * zeros) if bits == 4 else None
    if minima is None:
        others = ", or their products with scales such that float16 holds them" if bits == 4 else ""
        raise FormatError(f"zero points must all be {2 ** (bits - 1)} for GGUF{others}, got others.")
    return _Numbers("Q4_1", narrow, minima)


def _check_layout(q: QuantizedArray) -> None:
    """Raise if no type has the codes of a format."""
    fmt, bits = q.format, q.format.codebook.bits
    is_affine = bits in (4, 8) and fmt.codebook == affine(bits)
    is_signed = bits in _SIGNED and fmt.codebook == uniform(bits, normalization="signed") and fmt.levels == "codebook"
    if not is_affine and not is_signed:
        raise FormatError(
            f"codebook must be int4s, int5s, int8s, affine4 or affine8 for GGUF, got {fmt.codebook.name}."
        )
    if fault := row_fault(q, "GGUF"):
        raise FormatError(fault)
    if fmt.block_size != _BLOCK:
        raise FormatError(f"block_size must be {_BLOCK} for GGUF, got {fmt.block_size}.")


def _as_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16] | None:
    """Return values as float16, or None if it does not hold one of them."""
    with np.errstate(over="ignore"):
        found = values.astype("<f2")
    return found if (found == values).all() else None
