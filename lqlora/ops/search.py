"""Search for the scale of least squared error of each row: a grid of ratios to a first scale, then least squares.

A row ``x`` with importance ``h`` has the error ``E(r) = sum_i h_i (x_i - r v_i)**2`` under the ratio ``r``, where ``v_i`` is the
level nearest to ``x_i / r``. ``E`` has many local minima, since the ``v_i`` jump as ``r`` moves. So a grid is tried first.
With the ``v_i`` held fixed, ``dE/dr = 0`` gives ``r = sum_i h_i x_i v_i / sum_i h_i v_i**2``. That never raises the error,
and neither does rounding to the nearest levels under the new ratio, but for rounding errors: so each step is compared.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import FLOATS, device_of, fitting, namespace, op
from lqlora.ops.coding import nearest_codes
from lqlora.ops.sums import row_sums
from lqlora.ops.tables import pick, table_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from lqlora._dispatch.examples import BlocksProblem
    from lqlora._typing import Array

__all__ = ["best_ratios", "least_squares", "search_ratios", "squared_errors"]


def _searching(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return example arguments: rows to search ratios for, with importance or without."""
    rows = problem.rows(np.clip(problem.normalized, -4, 4).astype(np.float32))
    weights = np.random.default_rng(problem.seed).random(rows.shape, dtype=np.float32) if problem.seed % 2 else None
    zeros = None if problem.zeros is None else problem.zeros[: len(rows), None].astype(np.float32)
    return rows, weights, problem.codebook.levels, problem.codebook.boundaries, zeros, (1.0, 0.75, 0.875, 1.125), 2


@op(examples=_searching)
def best_ratios(
    rows: Array,
    weights: Array | None,
    levels: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.float32],
    zeros: Array | None,
    grid: Sequence[float],
    refinements: int,
) -> Array:
    """Return the ratio to each row's scale that has the least weighted squared error among those tried.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Blocks as rows, each divided by a first scale.
    weights : array of float32, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    levels : ndarray of float32, shape (n,)
        Levels of the codebook.
    boundaries : ndarray of float32, shape (n - 1,)
        Boundaries between the levels.
    zeros : array of float32, shape (m, 1), optional
        Zero points.
    grid : sequence of float
        Ratios to try, none of them zero.
    refinements : int
        Number of least-squares steps after the grid.

    Returns
    -------
    array of float32, shape (m,)
        Ratios. Among equal errors the ratio that was tried first wins.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> rows = np.array([[1.0, 0.5, 0.5, 0.5]], dtype=np.float32)
    >>> grid = (1.0, 0.5)
    >>> best_ratios(rows, None, lq.uniform(2).levels, lq.uniform(2).boundaries, None, grid, 1).tolist()
    [0.625]
    """
    nearest = partial(nearest_values, levels=levels, boundaries=boundaries, zeros=zeros)
    return search_ratios(rows, weights, nearest, grid, refinements)


def nearest_values(
    rows: Array, levels: npt.NDArray[np.float32], boundaries: npt.NDArray[np.float32], zeros: Array | None
) -> Array:
    """Return the nearest level of each entry. Zero points are added before rounding and subtracted afterwards.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Rows divided by their scales.
    levels, boundaries : ndarray of float32
        Levels of the codebook, and the boundaries between them.
    zeros : array of float32, shape (m, 1), optional
        Zero points.

    Returns
    -------
    array of float32, shape (m, k)
        Values.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> nearest_values(np.array([[0.4]], dtype=np.float32), lq.uniform(2).levels, lq.uniform(2).boundaries, None).tolist()
    [[0.0]]
    """
    xp = namespace(rows, zeros, dtypes=FLOATS)
    codes = nearest_codes(rows if zeros is None else rows + zeros, boundaries)
    table = table_beside(levels, rows)
    values = xp.reshape(pick(table, xp.astype(xp.reshape(codes, (-1,)), xp.int64)), rows.shape)
    return values if zeros is None else values - zeros


@fitting
def search_ratios(
    rows: Array, weights: Array | None, nearest: Callable[[Array], Array], grid: Sequence[float], refinements: int
) -> Array:
    """Return the best ratio of each row, as :func:`best_ratios` does, for any rounding function.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Blocks as rows, each divided by a first scale.
    weights : array of float32, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    nearest : callable
        Takes rows, and returns the nearest values.
    grid : sequence of float
        Ratios to try.
    refinements : int
        Number of least-squares steps after the grid.

    Returns
    -------
    array of float32, shape (m,)
        Ratios.

    Examples
    --------
    >>> import numpy as np
    >>> search_ratios(np.array([[0.5, 0.5]], dtype=np.float32), None, np.round, (1.0, 0.5), 0).tolist()
    [0.5]
    """
    xp = namespace(rows, weights, dtypes=FLOATS)
    # The grid comes first, because least squares only descends into the nearest of many local minima. The comparison is
    # strict, so among equal errors the earlier ratio stays, on every library alike. A NaN error compares as false, so a
    # later candidate with one is never taken.
    tried = _constants(grid, rows)
    best = xp.broadcast_to(next(tried), (rows.shape[0],))
    error = squared_errors(rows, weights, best, nearest(_over(rows, best)))
    for ratio in tried:
        own = squared_errors(rows, weights, ratio, nearest(_over(rows, ratio)))
        better = own < error
        best, error = xp.where(better, ratio, best), xp.where(better, own, error)
    for _ in range(refinements):
        # Lloyd's algorithm with one parameter: round to the nearest v under r, then solve for r with these v. Neither
        # half raises E in exact arithmetic. In float32 either may, so the refined ratio is taken only if its error is
        # smaller.
        refined = least_squares(rows, weights, nearest(_over(rows, best)), best)
        own = squared_errors(rows, weights, refined, nearest(_over(rows, refined)))
        better = own < error
        best, error = xp.where(better, refined, best), xp.where(better, own, error)
    return best


def _over(rows: Array, ratios: Array) -> Array:
    """Return rows divided by their ratios. Under a subnormal ratio they overflow, and round to an outermost level."""
    with np.errstate(over="ignore"):
        # If |x / r| exceeds the range of float32, infinity falls into the same outermost cell as the exact quotient
        # would. No 0 / 0 occurs: the grid has no zero, and least_squares returns only ratios of the sign of the present
        # one.
        return rows / ratios[:, None]


def _constants(grid: Sequence[float], rows: Array) -> Iterator[Array]:
    """Yield each ratio as an array of one number, since libraries may replace x / number by x * (1 / number)."""
    xp = namespace(rows, dtypes=FLOATS)
    for ratio in grid:
        yield xp.full((1,), ratio, dtype=xp.float32, device=device_of(rows))


@fitting
def squared_errors(rows: Array, weights: Array | None, ratios: Array, values: Array) -> Array:
    """Return the weighted squared error of each row under its ratio.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Rows.
    weights : array of float32, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    ratios : array of float32, shape (m,) or (1,)
        Ratios.
    values : array of float32, shape (m, k)
        Values that the rows were rounded to.

    Returns
    -------
    array of float32, shape (m,)
        Sums of ``weights * (rows - ratios * values)**2``.

    Examples
    --------
    >>> import numpy as np
    >>> squared_errors(np.ones((1, 2)), None, np.array([0.5]), np.ones((1, 2))).tolist()
    [0.5]
    """
    # The expansion sum h x**2 - 2 r sum h x v + r**2 sum h v**2 would share sums between ratios. It cancels where the
    # fit is good: float32 would lose the digits that separate the candidates. So the differences are formed first.
    namespace(rows, weights, ratios, values, dtypes=FLOATS)
    difference = rows - ratios[:, None] * values
    squares = difference * difference
    return row_sums(squares if weights is None else weights * squares)


@fitting
def least_squares(rows: Array, weights: Array | None, values: Array, ratios: Array) -> Array:
    """Return the least-squares ratio of each row; rows without a solution of the same sign keep their ratio.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Rows.
    weights : array of float32, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    values : array of float32, shape (m, k)
        Values that the rows were rounded to.
    ratios : array of float32, shape (m,)
        Present ratios.

    Returns
    -------
    array of float32, shape (m,)
        Ratios.

    Examples
    --------
    >>> import numpy as np
    >>> least_squares(np.array([[1.0, 0.5]]), None, np.array([[1.0, 1.0]]), np.array([1.0])).tolist()
    [0.75]
    """
    xp = namespace(rows, weights, values, ratios, dtypes=FLOATS)
    weighted = values if weights is None else weights * values
    above, below = row_sums(weighted * rows), row_sums(weighted * values)
    # The denominator is zero if every entry that counts has the value 0: the error is then the same for every r. A
    # quotient of the other sign would turn a block around, and zero cannot be divided by: such rows keep their ratio.
    solvable = below > 0
    with np.errstate(over="ignore"):  # an infinite quotient does not solve it
        refined = above / xp.where(solvable, below, xp.ones_like(below))
    return xp.where(solvable & (refined * ratios > 0) & xp.isfinite(refined), refined, ratios)
