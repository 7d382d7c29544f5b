"""Weights in the layout of GPTQ, which GPTQModel, vLLM and SGLang load.

A layer ``up`` with a weight of shape (m, n), in groups of ``g`` weights along the rows and codes of ``b`` bits, is stored as these tensors:

- ``up.qweight``, int32 of shape (n b / 32, m): codes of a row one after another along the first axis, the lowest bits first;
- ``up.scales``, of shape (n / g, m);
- ``up.qzeros``, int32 of shape (n / g, m b / 32): zero points of a group, packed along the second axis. In the format ``"gptq"`` a stored
  number is one less than the zero point, in ``"gptq_v2"`` it is the zero point;
- ``up.g_idx``, int32 of shape (n,): the group of each column.

A weight is ``scale * (code - zero_point)``, the grid of the codebooks ``affine2``, ``affine3``, ``affine4`` and ``affine8``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._options import require_choice
from lqlora.codebooks import affine
from lqlora.errors import FormatError
from lqlora.formats import BlockFormat
from lqlora.integrations._row_blocks import row_fault, row_scales, row_zero_points
from lqlora.integrations._words import WORD, host_tensor, packed_words, unpacked_words
from lqlora.quantized import QuantizedArray
from lqlora.quantized.array import require_quantized

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from lqlora._typing import Array, FloatName

__all__ = ["CheckpointFormat", "decode_gptq", "from_gptq", "gptq_bytes", "gptq_fault", "to_gptq"]

CheckpointFormat: TypeAlias = Literal["gptq", "gptq_v2"]

_FORMATS, _BITS = ("gptq", "gptq_v2"), (2, 3, 4, 8)


@annotated
def to_gptq(
    q: QuantizedArray, name: str = "layer", *, checkpoint_format: CheckpointFormat = "gptq"
) -> dict[str, npt.NDArray[Any]]:
    """Return a quantized matrix as tensors of GPTQ.

    Parameters
    ----------
    q : QuantizedArray
        Matrix of a codebook ``affine2``, ``affine3``, ``affine4`` or ``affine8``, in blocks along the rows that divide them, with scales that
        float16 holds. Rows and columns must fill words.
    name : str, default "layer"
        Name of the layer, with which every key begins.
    checkpoint_format : {"gptq", "gptq_v2"}
        How zero points are stored. ``"gptq"``, which more programs read, has none that is 0.

    Returns
    -------
    dict of str to ndarray
        Tensors listed in :mod:`lqlora.integrations.gptq`, with scales in float16. :func:`decode_gptq` returns the bits of
        :func:`lqlora.dequantize`; programs that compute in 16 bits round them.

    Raises
    ------
    FormatError
        If the layout cannot hold the array.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 2048, dtype=np.float32).reshape(32, 64)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("affine4/32:float16"))
    >>> {key: own.shape for key, own in to_gptq(q, "up", checkpoint_format="gptq_v2").items()}
    {'up.qweight': (8, 32), 'up.qzeros': (2, 4), 'up.scales': (2, 32), 'up.g_idx': (64,)}
    """
    require_choice(checkpoint_format, "checkpoint_format", _FORMATS)
    require_quantized(q)
    if fault := gptq_fault(q, checkpoint_format=checkpoint_format):
        raise FormatError(fault)
    own, (rows, columns), bits = q.to(np), q.shape, q.format.codebook.bits
    zeros, scales = row_zero_points(own), row_scales(own)
    less = 1 if checkpoint_format == "gptq" else 0
    return {
        f"{name}.qweight": np.ascontiguousarray(packed_words(np.asarray(own.codes).reshape(rows, columns), bits).T),
        f"{name}.qzeros": packed_words(np.ascontiguousarray(zeros.T) - np.uint8(less), bits),
        f"{name}.scales": np.ascontiguousarray(scales.astype(np.float16).T),
        f"{name}.g_idx": np.arange(columns, dtype=np.int32) // np.int32(q.format.block_size),
    }


@annotated
def gptq_fault(q: QuantizedArray, *, checkpoint_format: CheckpointFormat = "gptq") -> str:
    """Return why the layout of GPTQ cannot hold a quantized array; nothing if it can.

    Parameters
    ----------
    q : QuantizedArray
        Array of any library.
    checkpoint_format : {"gptq", "gptq_v2"}
        See :func:`to_gptq`.

    Returns
    -------
    str
        The sentence with which :func:`to_gptq` would refuse it.

    Raises
    ------
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> gptq_fault(lq.quantize(np.ones((32, 64), dtype=np.float32), lq.BlockFormat.parse("nf3/64:float32")))
    'codebook must be affine2, affine3, affine4 or affine8 for GPTQ, got nf3.'
    """
    require_choice(checkpoint_format, "checkpoint_format", _FORMATS)
    require_quantized(q)
    if fault := _layout_fault(q):
        return fault
    own = q.to(np)
    scales = row_scales(own)
    with np.errstate(over="ignore"):
        if (scales.astype(np.float16) != scales).any():
            return f"scales must be such that float16 holds them for GPTQ, got {q.format}."
    if checkpoint_format == "gptq" and not row_zero_points(own).all():
        return "zero points must be at least 1 for the format 'gptq', got 0. The format 'gptq_v2' holds them."
    return ""


def _layout_fault(q: QuantizedArray) -> str:
    """Return why the layout has no place for the codes of a format."""
    fmt, shape, bits = q.format, q.shape, q.format.codebook.bits
    if bits not in _BITS or fmt.codebook != affine(bits):
        return f"codebook must be affine2, affine3, affine4 or affine8 for GPTQ, got {fmt.codebook.name}."
    if fault := row_fault(q, "GPTQ"):
        return fault
    if any(length * bits % WORD for length in shape):
        return f"shape must have rows and columns that fill words of 32 bits with codes of {bits} bits, got {shape}."
    return ""


def gptq_bytes(fmt: BlockFormat, shape: tuple[int, ...]) -> int:
    """Return the bytes of the tensors that stand for a matrix.

    Parameters
    ----------
    fmt : BlockFormat
        Its format.
    shape : tuple of int
        Its shape.

    Returns
    -------
    int
        Bytes.
    """
    (rows, columns), bits = shape, fmt.codebook.bits
    groups = columns // fmt.block_size
    return rows * columns * bits // 8 + groups * rows * bits // 8 + 2 * groups * rows + 4 * columns


@annotated
def from_gptq(
    tensors: Mapping[str, Array], name: str = "layer", *, checkpoint_format: CheckpointFormat = "gptq"
) -> QuantizedArray:
    """Return the quantized matrix that tensors of GPTQ stand for.

    Parameters
    ----------
    tensors : mapping of str to array
        Tensors listed in :mod:`lqlora.integrations.gptq`; others are not looked at.
    name : str, default "layer"
        Name of the layer.
    checkpoint_format : {"gptq", "gptq_v2"}
        See :func:`to_gptq`.

    Returns
    -------
    QuantizedArray
        NumPy arrays, in the format ``affine{bits}/{group}@-1`` with scales of the dtype of ``scales``.

    Raises
    ------
    FormatError
        If a tensor is missing or contradicts another one, columns of a group are not side by side (``desc_act``), or a zero point of the
        format ``"gptq"`` is ``2**bits``, which codes do not have. :func:`decode_gptq` reads the latter two.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 2048, dtype=np.float32).reshape(32, 64)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("affine4/32@-1:float16"))
    >>> back = from_gptq(to_gptq(q, checkpoint_format="gptq_v2"), checkpoint_format="gptq_v2")
    >>> str(back.format), bool((back.packed == q.packed).all())
    ('affine4/32@-1:float16', True)
    """
    own = _read(tensors, name, checkpoint_format)
    rows, columns = own.codes.shape
    groups = own.scales.shape[1]
    if columns % groups or (own.groups != np.arange(columns) // (columns // groups)).any():
        raise FormatError(f"{name}.g_idx must have the columns of each group side by side, as without desc_act.")
    if (own.zeros >= 2**own.bits).any():
        raise FormatError(f"{name}.qzeros must have zero points below {2**own.bits}, got {own.zeros.max()}.")
    fmt = BlockFormat(affine(own.bits), columns // groups, axis=-1, scales=cast("FloatName", own.scales.dtype.name))
    arrays = {
        "codes": ops.pack_codes(own.codes.reshape(-1), own.bits),
        "scales": np.ascontiguousarray(own.scales).reshape(-1),
        "zero_points": ops.pack_codes(own.zeros.astype(np.uint8).reshape(-1), own.bits),
    }
    return QuantizedArray.from_arrays(arrays, fmt, (rows, columns))


@annotated
def decode_gptq(
    tensors: Mapping[str, Array], name: str = "layer", *, checkpoint_format: CheckpointFormat = "gptq"
) -> npt.NDArray[np.float32]:
    """Return the dense matrix that tensors of GPTQ stand for, in any order of its columns.

    Parameters
    ----------
    tensors : mapping of str to array
        Tensors listed in :mod:`lqlora.integrations.gptq`; others are not looked at.
    name : str, default "layer"
        Name of the layer.
    checkpoint_format : {"gptq", "gptq_v2"}
        See :func:`to_gptq`.

    Returns
    -------
    ndarray of float32, shape (m, n)
        ``scale * (code - zero_point)``, rounded once.

    Raises
    ------
    FormatError
        If a tensor is missing or contradicts another one.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 2048, dtype=np.float32).reshape(32, 64)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("affine8/32:float16"))
    >>> tensors = to_gptq(q, checkpoint_format="gptq_v2")
    >>> bool((decode_gptq(tensors, checkpoint_format="gptq_v2") == lq.dequantize(q)).all())
    True
    """
    own = _read(tensors, name, checkpoint_format)
    differences = own.codes.astype(np.int16) - own.zeros[:, own.groups]
    found: npt.NDArray[np.float32] = np.asarray(ops.widen(own.scales))[:, own.groups] * differences.astype(np.float32)
    return found


class _Layer(NamedTuple):
    """Codes, scales and zero points of a layer, with a row for each output, and the group of each column."""

    bits: int
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.int16]
    groups: npt.NDArray[np.int64]


def _read(tensors: Mapping[str, Array], name: str, checkpoint_format: CheckpointFormat) -> _Layer:
    require_choice(checkpoint_format, "checkpoint_format", _FORMATS)
    qweight, qzeros, scales, index = (
        host_tensor(tensors, f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise FormatError(f"{name}.g_idx must be integers of one dimension, got {index.dtype} of shape {index.shape}.")
    columns = len(index)
    if scales.dtype.name not in ("float32", "float16", "bfloat16") or scales.ndim != 2 or not scales.size:
        raise FormatError(
            f"{name}.scales must have floating-point numbers of two dimensions, got {scales.dtype} of shape {scales.shape}."
        )
    ops.require_finite(ops.widen(scales), f"{name}.scales")
    groups, rows = scales.shape
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise FormatError(f"{name}.g_idx must have numbers from 0 to {groups - 1}, got {index.min()} to {index.max()}.")
    # The codes of a row fill words, so their number tells the bits.
    bits = next((own for own in _BITS if qweight.shape == (columns * own / WORD, rows)), 0)
    if qweight.dtype != np.int32 or not bits:
        raise FormatError(
            f"{name}.qweight must be int32 for {columns} columns and {rows} rows, got {qweight.dtype} of shape {qweight.shape}."
        )
    if qzeros.dtype != np.int32 or qzeros.shape != (groups, rows * bits / WORD):
        raise FormatError(
            f"{name}.qzeros must be int32 for {groups} groups and {rows} rows, got {qzeros.dtype} of shape {qzeros.shape}."
        )
    codes = unpacked_words(np.ascontiguousarray(qweight.T), bits, columns, f"{name}.qweight")
    zeros = unpacked_words(qzeros, bits, rows, f"{name}.qzeros").T.astype(np.int16)
    more = np.int16(checkpoint_format == "gptq")
    return _Layer(bits, codes, np.ascontiguousarray(scales.T), zeros + more, index.astype(np.int64))
