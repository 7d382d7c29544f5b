"""Multiple-choice knapsack: one item of each group within a capacity. A problem splits into one for each budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lqlora.solvers.presolve import Reduced

__all__ = ["Knapsack", "split"]


@dataclass(frozen=True, eq=False)
class Knapsack:
    """Multiple-choice knapsack: choose one item of each group at least cost, within a capacity.

    Parameters
    ----------
    cost : ndarray of float64, shape (k,)
        Costs, not negative. Within a group they fall as sizes grow.
    size : ndarray of int64, shape (k,)
        Sizes, not negative. They grow within a group.
    first : ndarray of int64, shape (groups,)
        Index of the first item of each group.
    capacity : int
        Capacity, at least the sum of the smallest sizes of all groups.
    """

    cost: npt.NDArray[np.float64]
    size: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    capacity: int

    @cached_property
    def group(self) -> npt.NDArray[np.int64]:
        """Group of each item, ndarray of int64 of shape (k,)."""
        return np.repeat(np.arange(len(self.first)), np.diff(self.first, append=len(self.cost)))

    def value(self, chosen: npt.NDArray[np.int64]) -> float:
        """Return the cost of a choice.

        Parameters
        ----------
        chosen : ndarray of int64, shape (groups,)
            An item of each group.

        Returns
        -------
        float
            The exact sum, rounded once.
        """
        return math.fsum(self.cost[chosen].tolist())

    def slack(self, chosen: npt.NDArray[np.int64]) -> int:
        """Return the capacity that a choice leaves.

        Parameters
        ----------
        chosen : ndarray of int64, shape (groups,)
            An item of each group.

        Returns
        -------
        int
            Capacity minus the total size; negative if the choice is infeasible.
        """
        return self.capacity - int(self.size[chosen].sum())


def split(reduced: Reduced) -> list[tuple[npt.NDArray[np.int64], Knapsack]] | None:
    """Split a problem into one knapsack for each budget.

    This works if no budget has a lower limit and no two budgets share a group.

    Parameters
    ----------
    reduced : Reduced
        The problem. Every group has a choice, and the smallest choices are within the limits.

    Returns
    -------
    list of (ndarray of int64, Knapsack), or None
        The variables that are the items of each knapsack. Groups without a budget form one knapsack of capacity 0, in
        which all sizes are 0. None if the problem does not split.
    """
    if np.isfinite(reduced.lower).any():
        return None
    owner = np.full(len(reduced.first), -1)
    for k in np.flatnonzero(np.isfinite(reduced.upper)):
        touched = np.unique(reduced.group[reduced.use[[k]].indices])
        if (owner[touched] >= 0).any():
            return None
        owner[touched] = k
    size = np.zeros(len(reduced.cost), dtype=np.int64)
    parts = []
    for k in np.unique(owner):
        items = np.flatnonzero((owner == k)[reduced.group])
        if k >= 0:
            row = reduced.use[[k]]
            size[row.indices] = row.data.astype(np.int64)
        items = _staircase(items, reduced.group, size, reduced.cost)
        first = np.flatnonzero(np.diff(reduced.group[items], prepend=-1))
        capacity = 0 if k < 0 else int(reduced.upper[k])
        parts.append((items, Knapsack(reduced.cost[items], size[items], first, capacity)))
    return parts


def _staircase(
    items: npt.NDArray[np.int64],
    group: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
    cost: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """Sort items by group and size, and keep those that cost less than every smaller one of their group."""
    # The presolve sorts by the largest size under any budget. Another order is possible only where tied rows count in
    # part, so most calls find everything sorted.
    if ((np.diff(group[items]) == 0) & (np.diff(size[items]) <= 0)).any():
        items = items[np.lexsort((cost[items], size[items], group[items]))]
    while True:
        beaten = (np.diff(group[items]) == 0) & (np.diff(cost[items]) >= 0)
        if not beaten.any():
            return items
        items = items[np.concatenate([[True], ~beaten])]
