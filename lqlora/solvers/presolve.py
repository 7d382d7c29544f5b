"""Reduction to a small, well-scaled integer program, shared by all adapters; and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

if TYPE_CHECKING:
    from lqlora.solvers.problem import Problem

__all__ = ["Reduced", "reduce_problem"]

T = TypeVar("T", np.float64, np.int64)


@dataclass(frozen=True, eq=False)
class Reduced:
    """A 0-1 program ``min cost @ x`` with ``choose @ x == 1`` and ``lower <= use @ x <= upper``.

    Parameters
    ----------
    cost : ndarray of float64, shape (k,)
        Costs above each group's cheapest choice, divided by ``unit`` so that they are of order one: solvers' tolerances
        are absolute, and costs of 1e-12 make every one of them return wrong optima.
    choose : sparse array, shape (groups, k)
        One entry per variable, in the row of its group.
    use : sparse array, shape (budgets, k)
        Sizes as multiples of their greatest common divisor: small exact integers.
    lower, upper : ndarray of float64, shape (budgets,)
        Limits in the same multiples, rounded inwards; infinite where there is none.
    unit, constant : float
        ``constant + unit * (cost @ x)`` is the objective of the problem.
    group, column : ndarray of int, shape (k,)
        Which choice a variable stands for.
    group_of_row : ndarray of int, shape (n,)
        Group of each row of the problem.
    start : ndarray of float64, shape (k,), optional
        A feasible point, checked in exact integers: adapters whose solvers take a start hand it on.
    """

    cost: npt.NDArray[np.float64]
    choose: sparse.csc_array
    use: sparse.csc_array
    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    unit: float
    constant: float
    group: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    group_of_row: npt.NDArray[np.int64]
    start: npt.NDArray[np.float64] | None = None

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
        best = np.full(self.choose.shape[0], -np.inf)
        chosen = np.zeros(self.choose.shape[0], dtype=np.int64)
        for value, group, column in zip(x, self.group, self.column, strict=True):
            if value > best[group]:
                best[group], chosen[group] = value, column
        return chosen[self.group_of_row]


def reduce_problem(problem: Problem) -> Reduced:
    """Merge ties, drop what is forbidden or dominated, shift and scale.

    Parameters
    ----------
    problem : Problem
        The problem.

    Returns
    -------
    Reduced
        Has the same optimal assignments (of several equally good ones at least one).

    Notes
    -----
    A choice is dominated if another of its group costs no more and is no larger under any budget. That holds only while
    no budget has a lower limit; with one, nothing is pruned.
    """
    _, group_of_row = np.unique(problem.ties, return_inverse=True)
    groups = int(group_of_row.max()) + 1
    cost = _sum_rows(problem.cost, group_of_row, groups)
    allowed = _sum_rows((~problem.allowed).astype(np.float64), group_of_row, groups) == 0
    sizes = _sizes_by_budget(problem, group_of_row, groups)
    if not any(budget.lower is not None for budget in problem.budgets):
        allowed &= _undominated(cost, sizes, allowed)
    floor = np.where(allowed, cost, np.inf).min(axis=1)
    group, column = np.nonzero(allowed)
    shifted = cost[group, column] - floor[group]
    positive = shifted[shifted > 0]
    unit = float(np.median(positive)) if positive.size else 1.0
    use, lower, upper = _scale_sizes(sizes[:, group, column], problem)
    index = np.arange(len(group))
    choose = sparse.csc_array((np.ones(len(group)), (group, index)), shape=(groups, len(group)))
    constant = float(floor.sum())
    use = sparse.csc_array(use)
    return Reduced(shifted / unit, choose, use, lower, upper, unit, constant, group, column, group_of_row)


def _sum_rows(table: npt.NDArray[T], group_of_row: npt.NDArray[np.int64], groups: int) -> npt.NDArray[T]:
    total = np.zeros((groups, table.shape[1]), dtype=table.dtype)
    np.add.at(total, group_of_row, table)
    return total


def _sizes_by_budget(problem: Problem, group_of_row: npt.NDArray[np.int64], groups: int) -> npt.NDArray[np.int64]:
    """Return the size of each choice of each group as each budget counts it, shape (budgets, groups, m)."""
    sizes = np.zeros((len(problem.budgets), groups, problem.size.shape[1]), dtype=np.int64)
    for k, budget in enumerate(problem.budgets):
        counted = problem.size if budget.members is None else problem.size * np.asarray(budget.members)[:, None]
        sizes[k] = _sum_rows(counted, group_of_row, groups)
    return sizes


def _undominated(
    cost: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], allowed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Mark the choices that no other choice of their group beats; of equal ones the first stays."""
    keep = allowed.copy()
    for g in range(len(cost)):
        columns = np.nonzero(allowed[g])[0]
        # In this order a later choice never dominates an earlier one.
        order = columns[np.lexsort((columns, *sizes[::-1, g, columns], cost[g, columns]))]
        kept: list[int] = []
        for j in order:
            if any((sizes[:, g, i] <= sizes[:, g, j]).all() for i in kept):
                keep[g, j] = False
            else:
                kept.append(int(j))
    return keep


def _scale_sizes(
    sizes: npt.NDArray[np.int64], problem: Problem
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Divide each budget's row by its greatest common divisor; limits round inwards, which loses nothing."""
    use = np.zeros(sizes.shape)
    lower, upper = np.full(len(sizes), -np.inf), np.full(len(sizes), np.inf)
    for k, budget in enumerate(problem.budgets):
        divisor = max(int(np.gcd.reduce(sizes[k])), 1)
        use[k] = sizes[k] // divisor
        if budget.lower is not None:
            lower[k] = -(-budget.lower // divisor)
        if budget.upper is not None:
            upper[k] = budget.upper // divisor
    return use, lower, upper
