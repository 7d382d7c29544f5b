"""Primal heuristics: a feasible assignment before any solver runs, and the repair of an infeasible answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.presolve import Reduced

__all__ = ["lagrangian_start", "repair"]

#: Steps of the bisection of the price; further ones change nothing.
_HALVINGS = 40

#: Largest number of choices that a repair changes. An answer that needs more is wrong by more than rounding.
_MOVES = 100


# Lagrangian relaxation with a single multiplier. The load of a choice is the sum of its shares of all budgets; a budget
# with a lower limit only counts negatively. For a price p each group takes the choice that minimizes cost + p * load.
# The cost of these choices rises with p and their load falls, so bisection finds the least price that is feasible. One
# price need not meet several budgets at once, so there may be no answer although the problem is feasible.
def lagrangian_start(reduced: Reduced) -> npt.NDArray[np.int64] | None:
    """Return a feasible choice by Lagrangian relaxation, with a single price on the use of all budgets.

    Parameters
    ----------
    reduced : Reduced
        The problem.

    Returns
    -------
    ndarray of int64, shape (groups,), or None
        A variable of each group; together they meet all limits. None if no price leads to such a choice.
    """
    share = np.where(np.isfinite(reduced.upper), 1 / np.maximum(reduced.upper, 1), 0.0)
    lower_only = np.isfinite(reduced.lower) & ~np.isfinite(reduced.upper)
    share[lower_only] = -1 / np.maximum(reduced.lower[lower_only], 1)
    load = share @ reduced.use
    low, high, best = 0.0, None, None
    price = 0.0
    for _ in range(_HALVINGS):
        chosen = reduced.chosen(-(reduced.cost + price * load))
        if _violation(reduced, chosen).any():
            low = price
        else:
            high, best = price, chosen
            if price == 0.0:
                break
        price = max(1.0, 8 * low) if high is None else (low + high) / 2
    return best


def repair(reduced: Reduced, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """Change one choice at a time until all limits are met, each time at the least cost per unit of violation removed.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    chosen : ndarray of int64, shape (groups,)
        A variable of each group.

    Returns
    -------
    ndarray of int64, shape (groups,), or None
        A choice that meets all limits; None if none was found.
    """
    chosen = chosen.copy()
    columns = reduced.use.tocsc()
    for _ in range(_MOVES):
        wrong = _violation(reduced, chosen)
        if not wrong.any():
            return chosen
        taken = chosen[reduced.group]
        use = np.asarray(columns[:, chosen].sum(axis=1)).ravel()
        after = use[:, None] + (columns - columns[:, taken]).toarray()
        left = np.maximum(after - reduced.upper[:, None], 0) + np.maximum(reduced.lower[:, None] - after, 0)
        mended = wrong.sum() - left.sum(axis=0)
        if not (mended > 0).any():
            return None
        price = np.full(len(mended), np.inf)
        extra = np.maximum(reduced.cost - reduced.cost[taken], 0)
        np.divide(extra, mended, out=price, where=mended > 0)
        best = int(price.argmin())
        chosen[reduced.group[best]] = best
    return None


def _violation(reduced: Reduced, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the violation of each budget: the amount above its upper or below its lower limit."""
    use = reduced.use @ reduced.vector(chosen)
    missed: npt.NDArray[np.float64] = np.maximum(use - reduced.upper, 0) + np.maximum(reduced.lower - use, 0)
    return missed
