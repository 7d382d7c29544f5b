"""``relative_error``: the error of an approximation in a norm of choice, also one that it was not made for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import FLOATS, namespace, plain_array
from lqlora._printable import printable
from lqlora.decomposition._arguments import checked_matrix, checked_norm
from lqlora.decomposition.result import Decomposition
from lqlora.errors import InvalidArgumentError
from lqlora.quantized import QuantizedArray, dequantize
from lqlora.weighting import AbstractWeighting, Uniform

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["relative_error"]


def relative_error(
    w: Array,
    approximation: Array | QuantizedArray | Decomposition,
    weighting: AbstractWeighting | None = None,
    *,
    name: str = "w",
) -> float:
    r"""Return the norm of the error of an approximation, divided by the norm of the matrix.

    Errors on the inputs that an approximation was made with flatter it, most of all with error feedback and few inputs. The second
    moment of other inputs, from text that was kept out, tells how good it is.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, n)
        Matrix.
    approximation : array of the same shape, QuantizedArray or Decomposition
        What stands for the matrix, in the same library and on the same device.
    weighting : AbstractWeighting, optional
        Norm, such as ``lq.weighting.InputGram(gram)`` for errors of a layer's outputs; the Frobenius norm if not given.
    name : str, optional
        Name of the matrix in error messages.

    Returns
    -------
    float
        :math:`\lVert W - \hat W \rVert / \lVert W \rVert`. It is 0 where both norms are 0, and infinite where only that of the matrix
        is.

    Raises
    ------
    InvalidArgumentError
        If the shapes differ, or the weighting does not suit the matrix.
    NonFiniteError
        If the matrix or the approximation holds NaN or infinity, or the squared norm of the error is beyond float64.
    MixedArraysError
        If the arrays belong to different libraries or devices.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> rng = np.random.default_rng(0)
    >>> w, x, held_out = (rng.standard_normal(shape) for shape in ((32, 64), (80, 64), (1000, 64)))
    >>> q = lq.gptq(w, lq.BlockFormat.parse("nf2/32:float32"), x.T @ x)
    >>> norms = [lq.weighting.InputGram(rows.T @ rows) for rows in (x, held_out)]
    >>> [round(relative_error(w, q, norm), 2) for norm in norms]
    [0.28, 0.51]
    """
    matrix = checked_matrix(w, name)
    if isinstance(approximation, Decomposition):
        approximation = approximation.reconstruct()
    dense = dequantize(approximation) if isinstance(approximation, QuantizedArray) else approximation
    dense = ops.widen(plain_array(dense, f"approximation of {name}", FLOATS), f"approximation of {name}")
    if tuple(dense.shape) != tuple(matrix.shape):
        raise InvalidArgumentError(
            f"approximation must have the shape of {printable(name)}, {tuple(matrix.shape)}, got {tuple(dense.shape)}."
        )
    weighting = Uniform() if weighting is None else weighting
    if not isinstance(weighting, AbstractWeighting):
        raise InvalidArgumentError(f"weighting must be a norm of lqlora.weighting, got {type(weighting).__name__}.")
    weighting.check(tuple(matrix.shape))
    ops.require_finite(dense, f"approximation of {name}")
    # In a unit in which the squared norm of the matrix is about one, as in decompose.
    found = checked_norm(weighting, matrix, name)
    xp = namespace(matrix, dense)
    wide = xp.float64 if xp.float64 in (matrix.dtype, dense.dtype) else matrix.dtype
    squared = found.weighting.squared_norm(xp.astype(matrix, wide) - xp.astype(dense, wide))
    if found.squared_norm > 0:
        return math.sqrt(squared / found.squared_norm)
    return math.inf if squared else 0.0
