"""Levels between 0 and 1 that minimize an expected error, between levels at 0 and at 1 that are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora.codebooks._block_normal import Density, Reals

_STEPS = 200
_CLOSE = 1e-13  # the step after it is below the spacing of float64

#: Gauss and Legendre's rule on the interval from 0 to 1.
_NODES = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2
_WEIGHTS = np.polynomial.legendre.leggauss(16)[1] / 2


class Ends(NamedTuple):
    """What lies at the ends of the interval from 0 to 1.

    ``zero_cuts``: the innermost cell begins at 0, not halfway to it. ``free``: no level lies at 1.
    """

    zero_cuts: bool = False
    free: bool = False


def optimal_levels(density: Density, count: int, power: Literal[1, 2], ends: Ends) -> Reals:
    """Minimize the expected ``|x - level|**power``.

    Newton's method on the conditions that each level is the median or mean of its cell. The matrix is that of a
    convex problem where all its row sums are positive; where one is not, each level moves to the mean of its cell,
    which is Lloyd's method.
    """
    if not count:
        return np.empty(0)
    levels = _first_guess(density, count, power, ends)
    for _ in range(_STEPS):
        pull, own, matrix = _conditions(density, levels, power, ends)
        step = np.linalg.solve(matrix, pull) if (matrix.sum(axis=1) > 0).all() else pull / own
        levels = levels - step
        if np.abs(step).max() < _CLOSE:
            return levels
    raise InvalidArgumentError(f"No {count} levels were found that are optimal for this density.")


def _first_guess(density: Density, count: int, power: int, ends: Ends) -> Reals:
    """Levels as dense as the root of the density that is best when there are many (Panter and Dite, 1951)."""
    grid = np.linspace(0, 1, 1025)
    crowd = density(grid) ** (1 / (power + 1))
    share = np.concatenate([[0.0], np.cumsum(crowd[1:] + crowd[:-1])])
    before, after = 0.5 if ends.zero_cuts else 1.0, 0.5 if ends.free else 1.0
    ranks = (before + np.arange(count)) / (before + count - 1 + after)
    guess: Reals = np.interp(ranks, share / share[-1], grid)
    return guess


def _conditions(density: Density, levels: Reals, power: int, ends: Ends) -> tuple[Reals, Reals, Reals]:
    """Half the derivative of the error by each level, its derivative with the cells held, and with them moving."""
    middles = (np.append(levels, 1.0) + np.insert(levels, 0, 0.0)) / 2
    if ends.zero_cuts:
        middles[0] = 0.0
    if ends.free:
        middles[-1] = 1.0
    low, high = middles[:-1], middles[1:]
    pull = _half_cell(density, levels, low, power - 1) - _half_cell(density, levels, high, power - 1)
    if power == 1:
        own = 2 * density(levels)
    else:
        own = _half_cell(density, levels, low, 0) + _half_cell(density, levels, high, 0)
    by_low = (levels - low) ** (power - 1) * density(low) / 2
    by_high = (high - levels) ** (power - 1) * density(high) / 2
    moving = np.concatenate([[0.0 if ends.zero_cuts else by_low[0]], by_low[1:]])
    moving += np.concatenate([by_high[:-1], [0.0 if ends.free else by_high[-1]]])
    return pull, own, np.diag(own - moving) - np.diag(by_low[1:], -1) - np.diag(by_high[:-1], 1)


def _half_cell(density: Density, levels: Reals, ends: Reals, power: int) -> Reals:
    """Integral of ``|x - level|**power`` from each level to one end of its cell."""
    x = levels[:, None] + (ends - levels)[:, None] * _NODES
    values: Reals = (density(x) * np.abs(x - levels[:, None]) ** power) @ _WEIGHTS * np.abs(ends - levels)
    return values
