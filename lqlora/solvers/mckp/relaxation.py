"""Linear relaxation of a multiple-choice knapsack: price, lower bound, reduced costs and a feasible choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lqlora.solvers.mckp.knapsack import Knapsack

__all__ = ["Relaxation", "first_incumbent", "relax"]

#: Relative error allowed for a sum of terms that were each rounded two or three times: eight units of 2**-53.
_ROUNDING = 2.0**-50


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Optimum of the linear relaxation.

    Parameters
    ----------
    price : float
        Cost of one unit of size: the Lagrange multiplier of the capacity.
    bound : float
        Lower bound on the cost of every feasible choice, rounded down.
    excess : ndarray of float64, shape (k,)
        Reduced costs: every feasible choice that contains the item costs at least ``bound + excess``, up to rounding.
    hull : ndarray of int64
        Items on the lower convex hulls of their groups, in order.
    chosen : ndarray of int64, shape (groups,)
        A feasible choice: the optimum of the relaxation, with its one fractional group rounded down.
    """

    price: float
    bound: float
    excess: npt.NDArray[np.float64]
    hull: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]


# Write c_j and s_j for the cost and size of item j, C for the capacity, p for a price of one unit of size. For p >= 0
#
#     L(p) = sum over groups of min_j (c_j + p s_j)  -  p C
#
# is a lower bound on the cost of every feasible choice (Lagrange), and its maximum over p is the optimum of the linear
# relaxation. The minimum of a group is attained on the lower convex hull of its points (s_j, c_j). As p falls from
# infinity to 0, the minimum walks along the hull from the smallest item to the cheapest, and takes the step from item a
# to item b where p = (c_a - c_b) / (s_b - s_a). These slopes fall along each hull. So one sort of the steps of all
# groups, steepest first, is the walk of all of them. The first step that exceeds the capacity is the fractional item of
# Dantzig's rule, and its slope is the best price. With the reduced costs e_j = c_j + p s_j - min of its group,
#
#     cost of a choice  =  L(p)  +  sum of its e_j  +  p * (capacity it leaves)                                     (1)
#
# exactly. All three terms are bounds: fixing.py, open_choices.py and beam.py rest on this identity.
def relax(knapsack: Knapsack) -> Relaxation:
    """Solve the linear relaxation by one sort of the slopes of all hulls.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.

    Returns
    -------
    Relaxation
        The optimum, the lower bound and the reduced costs.

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
    order = np.argsort(-slope, kind="stable")  # equal slopes of one hull stay in the order of its walk
    total = np.cumsum(grown[order])
    room = knapsack.slack(hull[start])
    count = int(np.searchsorted(total, room, side="right"))
    price = float(slope[order[count]]) if count < len(order) else 0.0
    jumps = np.bincount(knapsack.group[hull[before[order[:count]]]], minlength=len(start))
    chosen = hull[start + jumps]
    # L(p) is a lower bound for any p >= 0, so a rounded price or a hull that lacks a point does no harm: only the sum
    # itself has to be rounded down. All terms but the last are not negative, so their sum bounds the rounding errors.
    priced = knapsack.cost + price * knapsack.size
    least = np.minimum.reduceat(priced, knapsack.first)
    bound = math.fsum([*least.tolist(), -price * knapsack.capacity])
    bound -= _ROUNDING * (float(least.sum()) + price * knapsack.capacity)
    priced -= least[knapsack.group]
    return Relaxation(price, bound, priced, hull, chosen)


def _hull(knapsack: Knapsack) -> npt.NDArray[np.int64]:
    """Return the items on the lower convex hull of each group, by passes over all groups at once."""
    kept = np.arange(len(knapsack.cost))
    while len(kept) > 2:
        # A point on or above the segment between two others of its group is not a vertex, whether or not these stay.
        # So all such points can go in one pass, and passes end when there is none.
        group, cost, size = knapsack.group[kept], knapsack.cost[kept], knapsack.size[kept]
        grown, saved = np.diff(size).astype(np.float64), -np.diff(cost)
        above = (group[:-2] == group[2:]) & (saved[:-1] * grown[1:] <= saved[1:] * grown[:-1])
        if not above.any():
            break
        kept = kept[np.concatenate([[True], ~above, [True]])]
    return kept


def first_incumbent(knapsack: Knapsack, lp: Relaxation, start: npt.NDArray[np.float64] | None) -> npt.NDArray[np.int64]:
    """Return the best choice known before any search: the relaxation's, filled up greedily, or the start.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.
    lp : Relaxation
        Its relaxation.
    start : ndarray of float64, shape (k,), optional
        A feasible point: 1 for the items of a choice, 0 for the others. It is ignored if it lacks an item of a group,
        because the knapsack has no dominated items and a start may contain one.

    Returns
    -------
    ndarray of int64, shape (groups,)
        A feasible choice.
    """
    chosen = _fill(knapsack, lp)
    if start is not None:
        items = np.flatnonzero(start)
        if len(items) == len(chosen) and knapsack.value(items) < knapsack.value(chosen):
            return items
    return chosen


def _fill(knapsack: Knapsack, lp: Relaxation) -> npt.NDArray[np.int64]:
    """Spend the capacity that the relaxation leaves, each time on the item that saves most among those that fit."""
    chosen = lp.chosen.copy()
    items = np.arange(len(knapsack.cost))
    while True:
        # By (1) an item whose reduced cost exceeds the gap is in no better choice.
        items = items[lp.excess[items] <= knapsack.value(chosen) - lp.bound]
        taken = chosen[knapsack.group[items]]
        fits = knapsack.size[items] - knapsack.size[taken] <= knapsack.slack(chosen)
        saved = np.where(fits, knapsack.cost[taken] - knapsack.cost[items], 0.0)
        if not (saved > 0).any():
            return chosen
        best = items[int(saved.argmax())]
        chosen[knapsack.group[best]] = best
