"""One iteration of the alternation, by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._dispatch import namespace
from lqlora.quantized import QuantizedArray, dequantize, quantize

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.weighting import AbstractWeighting, LowRankStep

__all__ = ["iterate", "remainder", "residual_of"]


def iterate(
    matrix: Array, target: Array, fmt: BlockFormat, weighting: AbstractWeighting, previous: LowRankStep
) -> LowRankStep:
    """Quantize what a low-rank part left of a matrix, then approximate what the quantized part leaves.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        The matrix; finite.
    target : array of the same shape and dtype
        The matrix minus a low-rank part, which may be that of a similar format: see :func:`remainder`.
    fmt : BlockFormat
        Format of the quantized part.
    weighting : AbstractWeighting
        Norm of the residual.
    previous : LowRankStep
        A step on a similar residual, which this one starts from; its rank is that of the result.

    Returns
    -------
    LowRankStep
        The low-rank part, and the error that it leaves together with the quantized part.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w, norm = np.random.default_rng(0).standard_normal((64, 64)), lq.weighting.Uniform()
    >>> similar = lq.quantize(w, lq.BlockFormat.parse("nf3/64:float32"))
    >>> start = norm.low_rank(w - lq.dequantize(similar), 8)
    >>> step = iterate(w, remainder(w, start), lq.BlockFormat.parse("nf3/64:u8/256:float32"), norm, start)
    >>> step.squared_error < start.squared_error
    True
    """
    rank = int(previous.left.shape[1])
    return weighting.low_rank(residual_of(matrix, quantize(target, fmt)), rank, previous=previous)


def remainder(matrix: Array, kept: LowRankStep, former: LowRankStep | None = None, extrapolation: float = 0.0) -> Array:
    """Return the matrix without a low-rank part, which may be carried on in the direction of its last change.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        The matrix.
    kept : LowRankStep
        The low-rank part.
    former : LowRankStep, optional
        What it was before; not given, nothing is carried on.
    extrapolation : float, default 0.0
        How far: 1 repeats the change.

    Returns
    -------
    array of the same shape and dtype
        What is to be quantized.
    """
    left, right = -kept.left, kept.right
    if former is not None:
        # One product of twice the rank: no dense array but the result is made.
        xp = namespace(matrix)
        left = xp.concat([left * (1 + extrapolation), former.left * extrapolation], axis=1)
        right = xp.concat([right, former.right], axis=0)
    remainder = left @ right
    remainder += matrix
    return remainder


def residual_of(matrix: Array, quantized: QuantizedArray) -> Array:
    """Return the matrix minus a quantized part, in the memory that the part is decoded to.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        The matrix.
    quantized : QuantizedArray of shape (m, n)
        The quantized part.

    Returns
    -------
    array of the same shape and dtype as ``matrix``
        What is to be approximated.
    """
    residual = namespace(matrix).astype(dequantize(quantized), matrix.dtype, copy=False)
    residual *= -1
    residual += matrix
    return residual
