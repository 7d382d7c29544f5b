"""Errors of rounding: weighted squared errors in float64, which separate candidates that are equal in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import FLOATS, fitting, namespace, op
from lqlora.ops.coding import normalize
from lqlora.ops.search import nearest_values
from lqlora.ops.sums import row_sums

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._dispatch.examples import BlocksProblem
    from lqlora._typing import Array

__all__ = ["rounding_errors", "wide_errors"]


def _rounding(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return example arguments: rows and scales, with nonzero importance or none, since zero times infinity is NaN."""
    rows = np.nan_to_num(problem.rows(problem.wide), posinf=1, neginf=-1)
    weights = np.random.default_rng(problem.seed + 5).uniform(0.5, 1, rows.shape) if problem.seed % 2 else None
    zeros = None if problem.zeros is None else problem.zeros[: len(rows)]
    return rows, weights, problem.scales[: len(rows)], zeros, problem.codebook.levels, problem.codebook.boundaries


@op(examples=_rounding)
def rounding_errors(
    rows: Array,
    weights: Array | None,
    scales: Array,
    zero_points: Array | None,
    levels: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.float32],
) -> Array:
    """Return the weighted squared error that each block has under a scale, when it is encoded and decoded.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, k)
        One block per row.
    weights : array of float32 or float64, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    scales : array of float32, shape (m,)
        Decoded scales of either sign. A block whose scale is zero decodes to zeros.
    zero_points : array of uint8, shape (m,), optional
        Zero points of an affine format: what decodes to zero in each block.
    levels : ndarray of float32, shape (n,)
        Levels of the codebook.
    boundaries : ndarray of float32, shape (n - 1,)
        Boundaries between the levels.

    Returns
    -------
    array of float64, shape (m,)
        Sums of ``weights * (rows - values)**2``. The values are the float32 result of :func:`lqlora.ops.decode`
        for the codes of :func:`lqlora.ops.encode`. Terms are added in the order of :func:`lqlora.ops.row_sums`.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.2, weights the error of each entry.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> rows, scales = np.array([[1.0, 0.5], [1.0, 0.5]], dtype=np.float32), np.array([1.0, 0.0], dtype=np.float32)
    >>> rounding_errors(rows, None, scales, None, lq.uniform(2).levels, lq.uniform(2).boundaries).tolist()
    [0.25, 1.25]
    """
    xp = namespace(rows, weights, scales, zero_points)
    # The values repeat the arithmetic of decode, rounding of the product included. So the error is that of the stored
    # array, and not that of an ideal one with exact products. Zero points are added inside nearest_values, not here.
    normalized = normalize(rows, xp.astype(scales, rows.dtype))
    zeros = None if zero_points is None else xp.astype(zero_points, xp.float32)[:, None]
    return wide_errors(rows, weights, nearest_values(normalized, levels, boundaries, zeros) * scales[:, None])


@fitting
def wide_errors(rows: Array, weights: Array | None, values: Array) -> Array:
    """Return the weighted squared difference between rows and the values they were rounded to.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, k)
        Rows.
    weights : array of float32 or float64, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    values : array of float32, shape (m, k)
        Values the rows were rounded to.

    Returns
    -------
    array of float64, shape (m,)
        Sums of ``weights * (rows - values)**2``, computed in float64.

    Examples
    --------
    >>> import numpy as np
    >>> wide_errors(np.ones((1, 2)), np.array([[1.0, 3.0]]), np.array([[1.0, 0.5]], dtype=np.float32)).tolist()
    [0.75]
    """
    xp = namespace(rows, weights, values, dtypes=FLOATS)
    # Two scales that differ by one step of their quantizer may give errors that agree to seven digits. Float32 would
    # call them equal, or rank them by rounding errors. In float64 the difference of two float32 numbers of similar size
    # is exact.
    difference = xp.astype(rows, xp.float64) - xp.astype(values, xp.float64)
    squares = difference * difference
    return row_sums(squares if weights is None else squares * xp.astype(weights, xp.float64))
