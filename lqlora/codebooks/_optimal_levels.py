"""Levels of least expected absolute or squared error for a density on 0 to 1, by Newton's method on integrals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora.codebooks._block_normal import Density, Reals

_STEPS = 200
_CLOSE = 1e-13  # Newton's method converges quadratically: the next step would be below the spacing of float64

#: Gauss-Legendre rule on the interval from 0 to 1.
_NODES = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2
_QUADRATURE = np.polynomial.legendre.leggauss(16)[1] / 2


class Ends(NamedTuple):
    """Conditions at the two ends of the interval from 0 to 1.

    By default 0 and 1 are fixed levels, and the outermost cells end halfway to them. ``zero_cuts``: the innermost cell
    begins at 0 instead. ``free``: there is no level at 1, and the outermost cell ends at 1.
    """

    zero_cuts: bool = False
    free: bool = False


# Let the levels be l_1 < ... < l_n and the cell of l_i reach from b_i = (l_{i-1} + l_i) / 2 to b_{i+1}. The expected
# error with power p is D = sum_i of the integral of |x - l_i|**p f(x) over cell i. At a border both neighbors have the
# same error, so a moving border does not change D to first order, and
#     g_i = dD/dl_i / p = int_{b_i}^{l_i} (l_i - x)**(p-1) f(x) dx - int_{l_i}^{b_{i+1}} (x - l_i)**(p-1) f(x) dx.
# g = 0 says that each level is the median (p = 1) or the mean (p = 2) of its cell. The Jacobian J of g is tridiagonal.
# With the cells held, dg_i/dl_i is 2 f(l_i) for p = 1 and the probability of the cell for p = 2 ("own"). A border
# moves by half of what either neighbor moves, which subtracts (l_i - b_i)**(p-1) f(b_i) / 2 from J_ii and J_{i,i-1},
# and the mirror image from J_ii and J_{i,i+1}. J is symmetric, as b_i is equally far from both neighbors.


def optimal_levels(density: Density, count: int, power: Literal[1, 2], ends: Ends) -> Reals:
    """Return the levels between 0 and 1 that minimize the expected ``|x - level|**power``.

    The density need not be normalized. Raises InvalidArgumentError if the iteration does not converge.
    """
    if not count:
        return np.empty(0)
    levels = _first_guess(density, count, power, ends)
    for _ in range(_STEPS):
        pull, own, matrix = _conditions(density, levels, power, ends)
        # No entry off the diagonal is positive. With positive row sums the matrix is therefore diagonally dominant,
        # hence positive definite, and Newton's step is a descent direction. Elsewhere the cells are held: for p = 2
        # each level moves to the mean of its cell (Lloyd's method), for p = 1 one Newton step toward the median.
        step = np.linalg.solve(matrix, pull) if (matrix.sum(axis=1) > 0).all() else pull / own
        levels = levels - step
        if np.abs(step).max() < _CLOSE:
            return levels
    raise InvalidArgumentError(
        f"density must be smooth: Newton's method did not find {count} optimal levels in {_STEPS} steps."
    )


def _first_guess(density: Density, count: int, power: int, ends: Ends) -> Reals:
    """Return levels whose spacing is optimal in the limit of many levels.

    In that limit the number of levels per unit length is proportional to ``density ** (1 / (power + 1))`` (Panter and
    Dite, 1951), so the levels are equally spaced quantiles of that density.
    """
    grid = np.linspace(0, 1, 1025)
    crowd = density(grid) ** (1 / (power + 1))
    share = np.concatenate([[0.0], np.cumsum(crowd[1:] + crowd[:-1])])  # trapezoidal rule
    before, after = 0.5 if ends.zero_cuts else 1.0, 0.5 if ends.free else 1.0
    ranks = (before + np.arange(count)) / (before + count - 1 + after)
    guess: Reals = np.interp(ranks, share / share[-1], grid)
    return guess


def _conditions(density: Density, levels: Reals, power: int, ends: Ends) -> tuple[Reals, Reals, Reals]:
    """Return the gradient g, its derivative with the cells held, and its Jacobian J, as derived above."""
    middles = (np.append(levels, 1.0) + np.insert(levels, 0, 0.0)) / 2
    if ends.zero_cuts:
        middles[0] = 0.0
    if ends.free:
        middles[-1] = 1.0
    low, high = middles[:-1], middles[1:]
    below, above = _HalfCell(density, levels, low), _HalfCell(density, levels, high)
    pull = below.moment(power - 1) - above.moment(power - 1)
    own = 2 * density(levels) if power == 1 else below.moment(0) + above.moment(0)
    by_low = (levels - low) ** (power - 1) * density(low) / 2
    by_high = (high - levels) ** (power - 1) * density(high) / 2
    # A border at 0 or 1 that is the end of a cell, not the middle between two levels, does not move.
    moving = np.concatenate([[0.0 if ends.zero_cuts else by_low[0]], by_low[1:]])
    moving += np.concatenate([by_high[:-1], [0.0 if ends.free else by_high[-1]]])
    return pull, own, np.diag(own - moving) - np.diag(by_low[1:], -1) - np.diag(by_high[:-1], 1)


class _HalfCell:
    """Values of the density between each level and one end of its cell, which several integrals share."""

    def __init__(self, density: Density, levels: Reals, ends: Reals) -> None:
        x = levels[:, None] + (ends - levels)[:, None] * _NODES
        self._density, self._distance, self._width = density(x), np.abs(x - levels[:, None]), np.abs(ends - levels)

    def moment(self, power: int) -> Reals:
        """Return the integral of ``|x - level|**power * density(x)`` from each level to the end."""
        values: Reals = (self._density * self._distance**power) @ _QUADRATURE * self._width
        return values
