"""Dominance: remove choices that another choice of their group beats in cost and in size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["undominated"]

#: Comparisons of pairs to hold in memory at a time.
_PAIRS = 1 << 24


def undominated(
    cost: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], exact: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the choices that no other choice of their group dominates.

    A choice is dominated if another one costs no more and is no larger under any budget. Under a budget with a lower
    limit the other one must be exactly as large, because a large choice can be needed to reach the limit. Among equal
    choices, the first one stays.

    Parameters
    ----------
    cost : ndarray of float64, shape (groups, m)
        Cost of each choice; infinite where it is not allowed.
    sizes : ndarray of int64, shape (budgets, groups, m)
        Size of each choice under each budget.
    exact : ndarray of bool, shape (budgets,)
        True for budgets with a lower limit, which compare sizes for equality.

    Returns
    -------
    group, column : ndarray of int64, shape (k,)
        The choices that stay, sorted by group and, within a group, by the largest of their sizes.

    References
    ----------
    Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11.

    Examples
    --------
    >>> group, column = undominated(np.array([[3.0, 2.0, 1.0]]), np.array([[[4, 2, 9]]]), np.array([False]))
    >>> column.tolist()
    [1, 2]
    """
    # Exchange argument: replace a dominated choice by the dominating one, and the assignment stays feasible and costs
    # no more. So some optimum has no dominated choice. In most groups all budgets that count anything see the same
    # sizes (`alike`). There the choices that stay form a staircase of points (size, cost): sort by size, keep a point
    # if its cost is below all before it. With lower limits (`held`) only points of equal size compare: keep the first,
    # that is the cheapest, of each size. Other groups (tied rows that a budget counts in part) need all pairs.
    size = sizes.max(axis=0, initial=0)
    counted = sizes.max(axis=2) > 0
    alike = ((sizes == size) | ~counted[:, :, None]).all(axis=(0, 2))
    held = alike & (counted & exact[:, None]).any(axis=0)
    order = np.lexsort((cost, size), axis=1) if held.any() else np.argsort(size, axis=1, kind="stable")
    cost, size = np.take_along_axis(cost, order, 1), np.take_along_axis(size, order, 1)
    keep = np.isfinite(cost)
    keep[:, 1:] &= np.where(held[:, None], size[:, 1:] > size[:, :-1], cost[:, 1:] < _least_before(cost))
    mixed = np.flatnonzero(~alike)
    for rows in np.array_split(mixed, -(-len(mixed) * sizes.shape[0] * cost.shape[1] ** 2 // _PAIRS) or 1):
        within = np.take_along_axis(sizes[:, rows], order[None, rows], 2)
        keep[rows] = np.isfinite(cost[rows]) & ~_beaten(cost[rows], within, exact)
    group, place = np.nonzero(keep)
    # A stable sort by size alone leaves choices of one size in order of their columns, and each that is kept is cheaper
    # than the one before: the last is the one to keep.
    last = np.ones(len(group), dtype=np.bool_)
    last[:-1] = (np.diff(group) > 0) | (np.diff(size[group, place]) > 0)
    last |= ~alike[group]
    return group[last], order[group[last], place[last]]


def _least_before(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.minimum.accumulate(cost, axis=1)[:, :-1]


def _beaten(
    cost: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], exact: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return whether some choice i of group g dominates choice j, for all (g, j), by comparing all pairs."""
    beats = cost[:, :, None] <= cost[:, None, :]
    equal = cost[:, :, None] == cost[:, None, :]
    for k, lower in enumerate(exact):
        one, other = sizes[k][:, :, None], sizes[k][:, None, :]
        same = one == other
        beats = beats & (same if lower else one <= other)
        equal &= same
    # Equal choices dominate each other: only the earlier one counts, so that one of them stays.
    earlier = np.tri(cost.shape[1], k=-1, dtype=np.bool_).T
    beaten: npt.NDArray[np.bool_] = (beats & (~equal | earlier)).any(axis=1)
    return beaten
