"""Reduction to a small, well-scaled integer program, shared by all adapters; and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from lqlora.errors import InvalidArgumentError
from lqlora.solvers.dominance import undominated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora.solvers.problem import Budget, Problem

__all__ = ["Reduced", "reduce_problem"]

T = TypeVar("T", np.float64, np.int64)

#: Cells of the cost table that are worked on at a time: some 100 MB of scratch, whatever the size of the problem.
_CELLS = 1 << 21

#: Totals are counted in float64 by every solver.
_MOST = 2**53


@dataclass(frozen=True, eq=False)
class Reduced:
    """A 0-1 program ``min cost @ x`` with ``choose @ x == 1`` and ``lower <= use @ x <= upper``.

    Parameters
    ----------
    cost : ndarray of float64, shape (k,)
        Costs above each group's cheapest choice, divided by ``unit`` so that they are of order one: solvers' tolerances
        are absolute, and costs of 1e-12 make every one of them return wrong optima.
    use : sparse array, shape (budgets, k)
        Sizes as multiples of their greatest common divisor: integers that float64 adds up exactly.
    lower, upper : ndarray of float64, shape (budgets,)
        Limits in the same multiples, rounded inwards; infinite where there is none.
    unit, constant : float
        ``constant + unit * (cost @ x)`` is the objective of the problem.
    group, column : ndarray of int64, shape (k,)
        Which choice a variable stands for: sorted by group and, within it, by size.
    group_of_row : ndarray of int64, shape (n,)
        Group of each row of the problem.
    start : ndarray of float64, shape (k,), optional
        A feasible point, checked in exact integers: adapters whose solvers take a start hand it on.
    """

    cost: npt.NDArray[np.float64]
    use: sparse.csr_array
    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    unit: float
    constant: float
    group: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    group_of_row: npt.NDArray[np.int64]
    start: npt.NDArray[np.float64] | None = None

    @cached_property
    def first(self) -> npt.NDArray[np.int64]:
        """Index of the first variable of each group, ndarray of int64 of shape (groups,)."""
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    @cached_property
    def choose(self) -> sparse.csr_array:
        """One entry per variable, in the row of its group: sparse array of shape (groups, k)."""
        k = len(self.cost)
        return sparse.csr_array((np.ones(k), np.arange(k), np.append(self.first, k)), shape=(len(self.first), k))

    def assignment(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Turn a solver's vector into a column per row.

        Parameters
        ----------
        x : ndarray of float64, shape (k,)
            Nearly zeros and ones.

        Returns
        -------
        ndarray of int64, shape (n,)
            The column of the largest entry of each group, whatever dust there is.
        """
        return self.column[self.chosen(x)][self.group_of_row]

    def chosen(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Turn a solver's vector into a variable per group.

        Parameters
        ----------
        x : ndarray of float64, shape (k,)
            Nearly zeros and ones.

        Returns
        -------
        ndarray of int64, shape (groups,)
            The first variable with the largest entry of each group.
        """
        largest = np.flatnonzero(x >= np.maximum.reduceat(x, self.first)[self.group])
        return largest[np.unique(self.group[largest], return_index=True)[1]]


def reduce_problem(problem: Problem) -> Reduced:
    """Merge ties, drop what is forbidden or dominated, shift and scale.

    Parameters
    ----------
    problem : Problem
        The problem.

    Returns
    -------
    Reduced
        Has the same optimal assignments (of several equally good ones at least one). If tied rows have no choice in
        common, it has fewer groups than the problem.

    Raises
    ------
    InvalidArgumentError
        If the sizes are too large for solvers, which add in float64.
    """
    groups, group_of_row = np.unique(problem.ties, return_inverse=True)
    exact = np.array([bool(budget.lower) for budget in problem.budgets], dtype=np.bool_)
    parts: list[tuple[npt.NDArray[np.int64], ...]] = []
    costs: list[npt.NDArray[np.float64]] = []
    for before, rows, first in _pieces(group_of_row, len(groups), problem):
        cost = _sum_rows(np.where(problem.allowed[rows], problem.cost[rows], np.inf), first)
        sizes = _sizes_by_budget(problem, rows, first)
        group, column = undominated(cost, sizes, exact)
        parts.append((group + before, column, sizes[:, group, column]))
        costs.append(cost[group, column])
    group, column = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    cost, sizes = np.concatenate(costs), np.concatenate([part[2] for part in parts], axis=1)
    del parts, costs
    first = np.flatnonzero(np.diff(group, prepend=-1))
    floor = np.minimum.reduceat(cost, first) if len(first) else cost
    cost -= np.repeat(floor, np.diff(first, append=len(group)))
    # Not the plain median, where that is so small that costs divided by it are infinite.
    unit = float(max(np.median(cost[cost > 0]), cost.max() * 1e-100)) if (cost > 0).any() else 1.0
    cost /= unit
    use, lower, upper = _scale_sizes(sizes, first, problem.budgets)
    return Reduced(cost, use, lower, upper, unit, float(floor.sum()), group, column, group_of_row)


def _pieces(
    group_of_row: npt.NDArray[np.int64], groups: int, problem: Problem
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield some groups at a time: the number of those before, their rows, and where each group begins in these."""
    order = np.argsort(group_of_row, kind="stable")
    first = np.searchsorted(group_of_row[order], np.arange(groups + 1))
    most = max(1, _CELLS // (problem.cost.shape[1] * max(1, len(problem.budgets))))
    begin = 0
    while begin < groups:
        end = max(begin + 1, int(np.searchsorted(first, first[begin] + most, side="right")) - 1)
        yield begin, order[first[begin] : first[end]], first[begin:end] - first[begin]
        begin = end


def _sum_rows(table: npt.NDArray[T], first: npt.NDArray[np.int64]) -> npt.NDArray[T]:
    return table if len(first) == len(table) else np.add.reduceat(table, first, axis=0)


def _sizes_by_budget(
    problem: Problem, rows: npt.NDArray[np.int64], first: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the size of each choice of each group as each budget counts it, shape (budgets, groups, m)."""
    sizes = np.zeros((len(problem.budgets), len(first), problem.size.shape[1]), dtype=np.int64)
    for k, budget in enumerate(problem.budgets):
        size = problem.size[rows]
        if budget.members is not None:
            size *= np.asarray(budget.members, dtype=np.bool_)[rows, None]
        sizes[k] = _sum_rows(size, first)
    return sizes


def _scale_sizes(
    sizes: npt.NDArray[np.int64], first: npt.NDArray[np.int64], budgets: tuple[Budget, ...]
) -> tuple[sparse.csr_array, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Count sizes from each group's smallest, in multiples of a common divisor; limits round inwards, losing nothing."""
    lower, upper = np.full(len(sizes), -np.inf), np.full(len(sizes), np.inf)
    length = np.diff(first, append=sizes.shape[1])
    use: list[sparse.csr_array] = []
    for k, budget in enumerate(budgets):
        least = np.minimum.reduceat(sizes[k], first) if len(first) else sizes[k]
        size = sizes[k] - np.repeat(least, length)
        divisor = max(int(np.gcd.reduce(size)), 1)
        size //= divisor
        fixed, most = int(least.sum()), int(np.maximum.reduceat(size, first).sum()) if len(first) else 0
        if most >= _MOST:
            raise InvalidArgumentError(f"Sizes of {most} units of {divisor} bits in all are too large for solvers.")
        if budget.lower and int(budget.lower) > fixed:
            lower[k] = -((fixed - int(budget.lower)) // divisor)
        if budget.upper is not None and int(budget.upper) - fixed < most * divisor:
            upper[k] = (int(budget.upper) - fixed) // divisor
        counted = np.flatnonzero(size)
        shape = (1, len(size))
        use.append(sparse.csr_array((size[counted].astype(np.float64), counted, [0, len(counted)]), shape=shape))
    stacked = sparse.vstack(use, format="csr") if use else sparse.csr_array((0, sizes.shape[1]))
    return stacked, lower, upper
