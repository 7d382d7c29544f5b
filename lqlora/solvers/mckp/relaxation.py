"""One knapsack with a choice per group: its linear relaxation, by one sort, and what the relaxation proves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lqlora.solvers.mckp.knapsack import Knapsack

__all__ = ["Relaxation", "fill", "relax"]

#: Sums of a few rounded terms are off by less than this share of the sum of their magnitudes.
_ROUNDING = 2.0**-50


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Optimum of the linear relaxation.

    Parameters
    ----------
    price : float
        Cost of one unit of size: the multiplier of the capacity.
    bound : float
        Lower bound on the cost of every choice that fits, rounded down.
    excess : ndarray of float64, shape (k,)
        Reduced costs: every choice that contains the item costs at least ``bound + excess``, up to rounding.
    hull : ndarray of int64
        Items on the lower convex hulls of their groups, in order.
    chosen : ndarray of int64, shape (groups,)
        A choice that fits: the optimum of the relaxation without its one split group.
    """

    price: float
    bound: float
    excess: npt.NDArray[np.float64]
    hull: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]


def relax(knapsack: Knapsack) -> Relaxation:
    """Solve the linear relaxation: jumps along all hulls, taken in the order of what they save per unit of size.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.

    Returns
    -------
    Relaxation
        The optimum, and what it proves.

    References
    ----------
    Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979); Kellerer, Pferschy and
    Pisinger, "Knapsack Problems" (2004), chapter 11.

    Examples
    --------
    >>> from lqlora.solvers.mckp.knapsack import Knapsack
    >>> items = Knapsack(np.array([4.0, 1.0, 6.0, 0.0]), np.array([0, 2, 0, 3]), np.array([0, 2]), 4)
    >>> found = relax(items)
    >>> found.price, round(found.bound, 9), found.chosen.tolist()
    (1.5, 2.5, [0, 3])
    """
    hull = _hull(knapsack)
    start = np.searchsorted(hull, knapsack.first)
    last = np.append(start[1:], len(hull)) - 1
    before = np.delete(np.arange(len(hull)), last)
    grown = knapsack.size[hull[before + 1]] - knapsack.size[hull[before]]
    slope = (knapsack.cost[hull[before]] - knapsack.cost[hull[before + 1]]) / grown
    order = np.argsort(-slope, kind="stable")
    total = np.cumsum(grown[order])
    room = knapsack.slack(hull[start])
    count = int(np.searchsorted(total, room, side="right"))
    price = float(slope[order[count]]) if count < len(order) else 0.0
    jumps = np.bincount(knapsack.group[hull[before[order[:count]]]], minlength=len(start))
    chosen = hull[start + jumps]
    priced = knapsack.cost + price * knapsack.size
    least = np.minimum.reduceat(priced, knapsack.first)
    bound = math.fsum([*least.tolist(), -price * knapsack.capacity])
    bound -= _ROUNDING * (float(least.sum()) + price * knapsack.capacity)
    priced -= least[knapsack.group]
    return Relaxation(price, bound, priced, hull, chosen)


def _hull(knapsack: Knapsack) -> npt.NDArray[np.int64]:
    """Return the items on the lower convex hulls: points above the segment between their neighbors go, all at once."""
    kept = np.arange(len(knapsack.cost))
    while len(kept) > 2:
        group, cost, size = knapsack.group[kept], knapsack.cost[kept], knapsack.size[kept]
        grown, saved = np.diff(size).astype(np.float64), -np.diff(cost)
        above = (group[:-2] == group[2:]) & (saved[:-1] * grown[1:] <= saved[1:] * grown[:-1])
        if not above.any():
            break
        kept = kept[np.concatenate([[True], ~above, [True]])]
    return kept


def fill(knapsack: Knapsack, lp: Relaxation) -> npt.NDArray[np.int64]:
    """Spend what the relaxation leaves of the capacity: always on the one item that saves most and fits.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.
    lp : Relaxation
        Its relaxation.

    Returns
    -------
    ndarray of int64, shape (groups,)
        A choice that fits, no dearer than ``lp.chosen``.
    """
    chosen = lp.chosen.copy()
    items = np.arange(len(knapsack.cost))
    while True:
        # An item whose excess is above the gap is in no better choice.
        items = items[lp.excess[items] <= knapsack.value(chosen) - lp.bound]
        taken = chosen[knapsack.group[items]]
        fits = knapsack.size[items] - knapsack.size[taken] <= knapsack.slack(chosen)
        saved = np.where(fits, knapsack.cost[taken] - knapsack.cost[items], 0.0)
        if not (saved > 0).any():
            return chosen
        best = items[int(saved.argmax())]
        chosen[knapsack.group[best]] = best
