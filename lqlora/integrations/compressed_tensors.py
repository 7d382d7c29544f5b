"""Weights in the layout ``pack-quantized`` of compressed-tensors, which transformers and vLLM load.

A weight ``up.weight`` of shape (m, n), in groups of ``g`` weights along the rows and codes of ``b`` bits, is stored as these tensors:

- ``up.weight_packed``, int32 of shape (m, ceil(n b / 32)): codes of a row one after another, the lowest bits first;
- ``up.weight_scale``, of shape (m, n / g);
- ``up.weight_zero_point``, int32 of shape (ceil(m b / 32), n / g): zero points of a column, packed like codes. A symmetric weight has none, and
  ``2**(b - 1)`` stands for it;
- ``up.weight_shape``, int64 of shape (2,): m and n.

A weight is ``scale * (code - zero_point)``, the grid of the codebooks ``affine1`` to ``affine8``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._options import require_integer
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

__all__ = ["compressed_bytes", "compressed_fault", "from_compressed_tensors", "to_compressed_tensors"]


@annotated
def to_compressed_tensors(q: QuantizedArray, name: str = "weight") -> dict[str, npt.NDArray[Any]]:
    """Return a quantized matrix as tensors of compressed-tensors.

    Parameters
    ----------
    q : QuantizedArray
        Matrix of a codebook ``affine1`` to ``affine8``, in blocks along the rows that divide them.
    name : str, default "weight"
        Name of the weight, with which every key begins.

    Returns
    -------
    dict of str to ndarray
        Tensors listed in :mod:`lqlora.integrations.compressed_tensors`. Scales are float32, in which compressed-tensors decodes to the bits
        of :func:`lqlora.dequantize`. Scales that are quantized themselves are decoded.

    Raises
    ------
    FormatError
        If the layout cannot hold the array.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), lq.BlockFormat.parse("affine4/32:float16"))
    >>> {key: own.shape for key, own in to_compressed_tensors(q, "up.weight").items()}
    {'up.weight_packed': (2, 4), 'up.weight_scale': (2, 1), 'up.weight_zero_point': (1, 1), 'up.weight_shape': (2,)}
    """
    require_quantized(q)
    if fault := compressed_fault(q):
        raise FormatError(fault)
    own, bits = q.to(np), q.format.codebook.bits
    return {
        f"{name}_packed": packed_words(np.asarray(own.codes), bits),
        f"{name}_scale": row_scales(own),
        f"{name}_zero_point": np.ascontiguousarray(packed_words(row_zero_points(own).T, bits).T),
        f"{name}_shape": np.array(q.shape, np.int64),
    }


@annotated
def compressed_fault(q: QuantizedArray) -> str:
    """Return why compressed-tensors cannot hold a quantized array; nothing if it can.

    Parameters
    ----------
    q : QuantizedArray
        Array of any library.

    Returns
    -------
    str
        The sentence with which :func:`to_compressed_tensors` would refuse it.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> compressed_fault(lq.quantize(np.ones((2, 64), dtype=np.float32), lq.BlockFormat.parse("nf3/64:float32")))
    'codebook must be affine1 to affine8 for compressed-tensors, got nf3.'
    """
    require_quantized(q)
    if q.format.codebook != affine(q.format.bits):
        return f"codebook must be affine1 to affine8 for compressed-tensors, got {q.format.codebook.name}."
    return row_fault(q, "compressed-tensors")


def compressed_bytes(fmt: BlockFormat, shape: tuple[int, ...]) -> int:
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
    return 4 * (rows * -(-columns * bits // WORD) + rows * groups + -(-rows * bits // WORD) * groups) + 16


@annotated
def from_compressed_tensors(
    tensors: Mapping[str, Array], name: str = "weight", *, bits: int | None = None
) -> QuantizedArray:
    """Return the quantized matrix that tensors of compressed-tensors stand for.

    Parameters
    ----------
    tensors : mapping of str to array
        Tensors listed in :mod:`lqlora.integrations.compressed_tensors`; others are not looked at.
    name : str, default "weight"
        Name of the weight.
    bits : int, optional
        Bits of a code, 1 to 8, which the configuration of a model says. Without it shapes say it, but for some matrices of few columns.

    Returns
    -------
    QuantizedArray
        NumPy arrays, in the format ``affine{bits}/{group}@-1`` with scales of the dtype of ``weight_scale``.

    Raises
    ------
    FormatError
        If a tensor is missing, shapes do not say the bits, or one has another dtype or shape than the others allow, or a packed word has bits beyond its codes.
    NonFiniteError
        If a scale is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), lq.BlockFormat.parse("affine3/16@-1:float32"))
    >>> back = from_compressed_tensors(to_compressed_tensors(q))
    >>> str(back.format), bool((back.packed == q.packed).all())
    ('affine3/16@-1:float32', True)
    """
    parts = {key: host_tensor(tensors, f"{name}_{key}") for key in ("packed", "scale", "shape")}
    packed, scale, size = parts["packed"], parts["scale"], parts["shape"]
    if size.shape != (2,) or size.dtype.kind not in "iu" or (size < 1).any() or (size >= 2**31).any():
        raise FormatError(f"{name}_shape must be two numbers of at least 1, got {size.tolist()!r:.80}.")
    rows, columns = map(int, size)
    if bits is not None:
        require_integer(bits, "bits", 1, 8)
    fitting = [
        own
        for own in (range(1, 9) if bits is None else [int(bits)])
        if packed.shape == (rows, -(-columns * own // WORD))
    ]
    if packed.dtype != np.int32 or not fitting:
        raise FormatError(
            f"{name}_packed must be int32 for shape {(rows, columns)}, got {packed.dtype} of shape {packed.shape}."
        )
    groups = scale.shape[1] if scale.ndim == 2 and len(scale) == rows else 0
    if scale.dtype.name not in ("float32", "float16", "bfloat16") or not groups or columns % groups:
        raise FormatError(
            f"{name}_scale must have a row of scales for each of {rows} rows, got {scale.dtype} of shape {scale.shape}."
        )
    ops.require_finite(ops.widen(scale), f"{name}_scale")
    zeros = host_tensor(tensors, f"{name}_zero_point") if tensors.get(f"{name}_zero_point") is not None else None
    if zeros is not None:
        fitting = [own for own in fitting if zeros.shape == (-(-rows * own // WORD), groups)]
        if zeros.dtype != np.int32 or not fitting:
            raise FormatError(f"{name}_zero_point must be packed like codes, got {zeros.dtype} of shape {zeros.shape}.")
    if len(fitting) > 1:
        raise FormatError(
            f"bits must be given for {name}, whose {columns} columns are too few to tell {fitting[0]} from {fitting[1]}."
        )
    own = fitting[0]
    if zeros is None:
        points = np.full((rows, groups), 2 ** (own - 1), np.uint8)
    else:
        points = unpacked_words(np.ascontiguousarray(zeros.T), own, rows, f"{name}_zero_point").T
    codes = unpacked_words(packed, own, columns, f"{name}_packed")
    fmt = BlockFormat(affine(own), columns // groups, axis=-1, scales=cast("FloatName", scale.dtype.name))
    arrays = {
        "codes": ops.pack_codes(codes.reshape(-1), own),
        "scales": np.ascontiguousarray(scale).reshape(-1),
        "zero_points": ops.pack_codes(np.ascontiguousarray(points).reshape(-1), own),
    }
    return QuantizedArray.from_arrays(arrays, fmt, (rows, columns))
