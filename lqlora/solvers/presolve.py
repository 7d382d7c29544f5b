"""Reduction to a small, well-scaled integer program, shared by all adapters; and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import sparse

if TYPE_CHECKING:
    from lqlora.solvers.problem import Problem

__all__ = ["Reduced", "reduce_problem"]


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

    def assignment(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Turn a solver's vector into a column per row: the largest entry of each group, whatever dust there is."""
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
    _, group_of_row = np.unique(problem.ties, return_inverse=True)  # type: ignore[arg-type]
    groups = int(group_of_row.max()) + 1
    cost = _sum_rows(problem.cost, group_of_row, groups)
    allowed = ~_sum_rows(~problem.allowed, group_of_row, groups).astype(bool)  # type: ignore[operator]
    members = [np.ones(len(problem.cost), dtype=bool) if b.members is None else b.members for b in problem.budgets]
    sizes = np.stack(
        [_sum_rows(problem.size * m[:, None], group_of_row, groups) for m in members]
        or [np.zeros_like(cost, dtype=np.int64)]
    )
    if not any(budget.lower is not None for budget in problem.budgets):
        allowed = allowed & _undominated(cost, sizes, allowed)
    floor = np.where(allowed, cost, np.inf).min(axis=1)
    group, column = np.nonzero(allowed)
    shifted = cost[group, column] - floor[group]
    positive = shifted[shifted > 0]
    unit = float(np.median(positive)) if positive.size else 1.0
    upper = [np.inf if budget.upper is None else budget.upper for budget in problem.budgets]
    lower = [-np.inf if budget.lower is None else budget.lower for budget in problem.budgets]
    use, lower, upper = _scale_sizes(sizes[: len(problem.budgets), group, column], lower, upper)
    index = np.arange(len(group))
    choose = sparse.csc_array((np.ones(len(group)), (group, index)), shape=(groups, len(group)))
    return Reduced(
        shifted / unit,
        choose,
        sparse.csc_array(use),
        lower,
        upper,
        unit,
        float(floor.sum()),
        group,
        column,
        group_of_row,
    )


def _sum_rows(
    table: npt.NDArray[np.generic], group_of_row: npt.NDArray[np.int64], groups: int
) -> npt.NDArray[np.generic]:
    total = np.zeros((groups, table.shape[1]), dtype=np.int64 if table.dtype.kind in "bi" else np.float64)
    np.add.at(total, group_of_row, table)
    return total


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
    sizes: npt.NDArray[np.int64], lower: list[float], upper: list[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Divide each budget's row by its greatest common divisor; limits round inwards, which loses nothing."""
    divisors = [max(int(np.gcd.reduce(row)), 1) for row in sizes]
    use = np.array([row // d for row, d in zip(sizes, divisors, strict=True)], dtype=np.float64).reshape(sizes.shape)
    low = [x if np.isinf(x) else float(-(-int(x) // d)) for x, d in zip(lower, divisors, strict=True)]
    high = [x if np.isinf(x) else float(int(x) // d) for x, d in zip(upper, divisors, strict=True)]
    return use, np.array(low), np.array(high)
