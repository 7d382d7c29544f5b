"""Choices that another choice of their group beats, and that no optimum therefore needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["undominated"]

#: Comparisons of pairs that are held in memory at a time.
_PAIRS = 1 << 24


def undominated(
    cost: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], exact: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """List the choices that no other one of their group beats.

    A choice is beaten by one that costs no more and is no larger under any budget. Under a budget with a lower limit it
    must be exactly as large, since there a large choice has its use. Of equal choices the first stays.

    Parameters
    ----------
    cost : ndarray of float64, shape (groups, m)
        Infinite where a choice is not allowed.
    sizes : ndarray of int64, shape (budgets, groups, m)
        As each budget counts them.
    exact : ndarray of bool, shape (budgets,)
        Budgets that have a lower limit.

    Returns
    -------
    group, column : ndarray of int64, shape (k,)
        Sorted by group and, within a group, by the largest of the sizes.

    References
    ----------
    Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11.

    Examples
    --------
    >>> group, column = undominated(np.array([[3.0, 2.0, 1.0]]), np.array([[[4, 2, 9]]]), np.array([False]))
    >>> column.tolist()
    [1, 2]
    """
    size = sizes.max(axis=0, initial=0)
    counted = sizes.max(axis=2) > 0
    alike = ((sizes == size) | ~counted[:, :, None]).all(axis=(0, 2))  # one budget, or several that count the same
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
    # Of several kept choices of one size the last is the cheapest.
    last = np.ones(len(group), dtype=np.bool_)
    last[:-1] = (np.diff(group) > 0) | (np.diff(size[group, place]) > 0)
    last |= ~alike[group]
    return group[last], order[group[last], place[last]]


def _least_before(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.minimum.accumulate(cost, axis=1)[:, :-1]


def _beaten(
    cost: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], exact: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Compare all pairs: entry (g, j) is true if some choice i of group g beats j."""
    no_dearer = cost[:, :, None] <= cost[:, None, :]
    equal = cost[:, :, None] == cost[:, None, :]
    beats = no_dearer
    for k, lower in enumerate(exact):
        one, other = sizes[k][:, :, None], sizes[k][:, None, :]
        same = one == other
        beats = beats & (same if lower else one <= other)
        equal &= same
    earlier = np.tri(cost.shape[1], k=-1, dtype=np.bool_).T
    beaten: npt.NDArray[np.bool_] = (beats & (~equal | earlier)).any(axis=1)
    return beaten
