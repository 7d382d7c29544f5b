"""Assignments without a search: one to hold before any solver runs, and the repair of one that a solver got wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.presolve import Reduced

__all__ = ["price_out", "repair"]

#: Halvings of the price, after which the next halving changes nothing.
_HALVINGS = 40

#: Moves of a repair: an answer that needs more was not a rounding error.
_MOVES = 100


def price_out(reduced: Reduced) -> npt.NDArray[np.int64] | None:
    """Put one price on the use of all budgets, and lower it as long as the choices that are then cheapest fit.

    Parameters
    ----------
    reduced : Reduced
        The problem.

    Returns
    -------
    ndarray of int64, shape (groups,), or None
        A variable of each group that meets all limits; None if no price that was tried gives one.
    """
    weights = np.where(np.isfinite(reduced.upper), 1 / np.maximum(reduced.upper, 1), 0.0)
    lacking = np.isfinite(reduced.lower) & ~np.isfinite(reduced.upper)
    weights[lacking] = -1 / np.maximum(reduced.lower[lacking], 1)
    load = weights @ reduced.use
    low, high, best = 0.0, None, None
    price = 0.0
    for _ in range(_HALVINGS):
        chosen = _cheapest(reduced, reduced.cost + price * load)
        if _excess(reduced, chosen).any():
            low = price
        else:
            high, best = price, chosen
            if price == 0.0:
                break
        price = max(1.0, 8 * low) if high is None else (low + high) / 2
    return best


def repair(reduced: Reduced, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """Change one choice after another until all limits are met, each time at the least cost for what it mends.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    chosen : ndarray of int64, shape (groups,)
        A variable of each group.

    Returns
    -------
    ndarray of int64, shape (groups,), or None
        A choice that meets all limits; None if this did not find one.
    """
    chosen = chosen.copy()
    columns = reduced.use.tocsc()
    for _ in range(_MOVES):
        wrong = _excess(reduced, chosen)
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
        dearer = np.maximum(reduced.cost - reduced.cost[taken], 0)
        np.divide(dearer, mended, out=price, where=mended > 0)
        best = int(price.argmin())
        chosen[reduced.group[best]] = best
    return None


def _cheapest(reduced: Reduced, cost: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return reduced.chosen(-cost)


def _excess(reduced: Reduced, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return by how much a choice misses each budget."""
    x = np.zeros(len(reduced.cost))
    x[chosen] = 1.0
    use = reduced.use @ x
    missed: npt.NDArray[np.float64] = np.maximum(use - reduced.upper, 0) + np.maximum(reduced.lower - use, 0)
    return missed
