"""One iteration of the alternation: quantize the matrix without the low-rank part, approximate the residual."""

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
    """Return the low-rank step of one iteration: quantize the target, then approximate the residual.

    Cost tables use it to continue, in one format, from the low-rank part of a similar format.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        Matrix of finite entries.
    target : array of the same shape and dtype
        Matrix minus a low-rank part, which may come from a similar format; see :func:`remainder`.
    fmt : BlockFormat
        Format of the quantized part.
    weighting : AbstractWeighting
        Norm of the residual.
    previous : LowRankStep
        Step on a similar residual, to start from. The result has its rank.

    Returns
    -------
    LowRankStep
        Low-rank part, and the error of its sum with the quantized part.

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
    """Return the matrix minus a low-rank part, which may be extrapolated along its last change.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        Matrix.
    kept : LowRankStep
        Low-rank part to subtract.
    former : LowRankStep, optional
        Low-rank part one iteration earlier; without it there is no extrapolation.
    extrapolation : float, default 0.0
        Multiple of the last change that is added to the low-rank part; 1 repeats the change.

    Returns
    -------
    array of the same shape and dtype
        Target of the next quantization.
    """
    left, right = -kept.left, kept.right
    if former is not None:
        # W - P - beta * (P - P') with P = B A and P' = B' A' is W + [-(1 + beta) B, beta B'] [A; A']: one product of
        # twice the rank, so that the result is the only dense array.
        xp = namespace(matrix)
        left = xp.concat([left * (1 + extrapolation), former.left * extrapolation], axis=1)
        right = xp.concat([right, former.right], axis=0)
    remainder = left @ right
    remainder += matrix
    return remainder


def residual_of(matrix: Array, quantized: QuantizedArray) -> Array:
    """Return the matrix minus a quantized part, computed in the memory of the decoded part.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        Matrix.
    quantized : QuantizedArray of shape (m, n)
        Quantized part to subtract.

    Returns
    -------
    array of the same shape and dtype as ``matrix``
        Residual, which the low-rank step approximates.
    """
    residual = namespace(matrix).astype(dequantize(quantized), matrix.dtype, copy=False)
    residual *= -1
    residual += matrix
    return residual
