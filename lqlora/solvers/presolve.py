"""Presolve: reduce a problem to a small 0-1 program with well-scaled numbers, and map its solutions back.

Every adapter gets the reduced program.
"""

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

#: Limit of total sizes in units. Every solver adds in float64, which holds integers exactly up to here.
_MOST = 2**53


@dataclass(frozen=True, eq=False)
class Reduced:
    """A 0-1 program ``min cost @ x`` with ``choose @ x == 1`` and ``lower <= use @ x <= upper``.

    Parameters
    ----------
    cost : ndarray of float64, shape (k,)
        Costs above the cheapest choice of each group, divided by ``unit``. They are of order one, because tolerances
        of solvers are absolute: with costs of 1e-12 solvers return wrong optima.
    use : sparse array, shape (budgets, k)
        Sizes above the smallest choice of each group, divided by their greatest common divisor. They are integers
        that float64 adds exactly.
    lower, upper : ndarray of float64, shape (budgets,)
        Limits in the same units, rounded inwards; infinite where there is none.
    unit, constant : float
        ``constant + unit * (cost @ x)`` is the objective of the problem.
    group, column : ndarray of int64, shape (k,)
        Group and column of each variable. Variables are sorted by group and, within a group, by size.
    group_of_row : ndarray of int64, shape (n,)
        Group of each row of the problem.
    start : ndarray of float64, shape (k,), optional
        A feasible point, checked in exact integers. Adapters pass it to solvers that take one.
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

    @property
    def offset(self) -> float:
        """Constant of the scaled objective, ``constant / unit``. Solvers bound ``cost @ x + offset`` from below."""
        return self.constant / self.unit

    @cached_property
    def first(self) -> npt.NDArray[np.int64]:
        """Index of the first variable of each group, ndarray of int64 of shape (groups,)."""
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    @cached_property
    def choose(self) -> sparse.csr_array:
        """Matrix of the constraints ``choose @ x == 1``: sparse array of shape (groups, k), a 1 for each variable."""
        k = len(self.cost)
        return sparse.csr_array((np.ones(k), np.arange(k), np.append(self.first, k)), shape=(len(self.first), k))

    def rows(self) -> tuple[sparse.csr_array, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return all constraints as one system, for solvers that take a matrix with limits on both sides.

        Returns
        -------
        matrix : sparse array, shape (groups + budgets, k)
            ``choose`` above ``use``.
        lower, upper : ndarray of float64, shape (groups + budgets,)
            Limits of the rows; infinite where there is none.
        """
        ones = np.ones(len(self.first))
        matrix = sparse.vstack([self.choose, self.use], format="csr")
        return matrix, np.concatenate([ones, self.lower]), np.concatenate([ones, self.upper])

    def assignment(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return the column that a solver's vector chooses in each row.

        Parameters
        ----------
        x : ndarray of float64, shape (k,)
            Zeros and ones, up to the solver's integrality tolerance.

        Returns
        -------
        ndarray of int64, shape (n,)
            The column of the largest entry of each group.
        """
        return self.column[self.chosen(x)][self.group_of_row]

    def chosen(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return the variable that a solver's vector chooses in each group.

        Parameters
        ----------
        x : ndarray of float64, shape (k,)
            Zeros and ones, up to the solver's integrality tolerance.

        Returns
        -------
        ndarray of int64, shape (groups,)
            The first variable with the largest entry of each group.
        """
        largest = np.flatnonzero(x >= np.maximum.reduceat(x, self.first)[self.group])
        return largest[np.unique(self.group[largest], return_index=True)[1]]

    def vector(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the vector of a choice, the inverse of :meth:`chosen`.

        Parameters
        ----------
        chosen : ndarray of int64, shape (groups,)
            A variable of each group.

        Returns
        -------
        ndarray of float64, shape (k,)
            1 for the chosen variables, 0 for the others.
        """
        x = np.zeros(len(self.cost))
        x[chosen] = 1.0
        return x


# Why shifting and scaling change nothing but the numbers. Let group g have costs c_gj and sizes s_gj, least ones
# m_g = min_j c_gj and t_g = min_j s_gj, u > 0 the unit of costs and d the common divisor of all s_gj - t_g. Then
#
#     sum of costs  =  sum_g m_g  +  u * sum of (c_gj - m_g) / u                 objective = constant + unit * cost @ x
#     sum of sizes <= C   iff   sum of (s_gj - t_g) / d  <=  floor((C - sum_g t_g) / d)
#
# because the left side of the last inequality is an integer; a lower limit rounds up in the same way. Small integers
# matter: a variable of 1 - 1e-6 counts as one for most solvers, and hides ten units of ten million. With u the median
# difference between choices, absolute tolerances on costs are relative to that.
def reduce_problem(problem: Problem, *, cells: int = 1 << 21) -> Reduced:
    """Merge ties, remove forbidden and dominated choices, shift and scale.

    Parameters
    ----------
    problem : Problem
        The problem.
    cells : int, default 2**21
        Cells of the cost table to reduce at a time. It limits the scratch memory, by default to about 100 MB, and does
        not change the result.

    Returns
    -------
    Reduced
        A program with the same optimal assignments; of several equally good ones it keeps at least one. If tied rows
        have no choice in common, it has fewer groups than the problem.

    Raises
    ------
    InvalidArgumentError
        If the sizes in units of their common divisor add up to 2**53 or more.
    """
    groups, group_of_row = np.unique(problem.ties, return_inverse=True)
    exact = np.array([bool(budget.lower) for budget in problem.budgets], dtype=np.bool_)
    parts: list[tuple[npt.NDArray[np.int64], ...]] = []
    costs: list[npt.NDArray[np.float64]] = []
    for before, rows, first in _pieces(group_of_row, len(groups), problem, cells):
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
    # The second term keeps the quotient finite where the median is a subnormal number beside a large cost.
    unit = float(max(np.median(cost[cost > 0]), cost.max() * 1e-100)) if (cost > 0).any() else 1.0
    cost /= unit
    use, lower, upper = _scale_sizes(sizes, first, problem.budgets)
    return Reduced(cost, use, lower, upper, unit, float(floor.sum()), group, column, group_of_row)


def _pieces(
    group_of_row: npt.NDArray[np.int64], groups: int, problem: Problem, cells: int
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield some groups at a time: the number of groups before, their rows, and the first row of each group."""
    order = np.argsort(group_of_row, kind="stable")
    first = np.searchsorted(group_of_row[order], np.arange(groups + 1))
    most = max(1, cells // (problem.cost.shape[1] * max(1, len(problem.budgets))))
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
    """Return the size of each choice of each group under each budget, shape (budgets, groups, m)."""
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
    """Return sizes above the smallest of each group in units of their common divisor, and limits rounded inwards."""
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
            raise InvalidArgumentError(
                f"size must add up to less than 2**53 units for budget {k}, got {most} units of {divisor} bits (their "
                "greatest common divisor). Round sizes to a larger common unit."
            )
        # A limit that no choice can break stays infinite.
        if budget.lower and int(budget.lower) > fixed:
            lower[k] = -((fixed - int(budget.lower)) // divisor)  # floor division of the negative rounds up
        if budget.upper is not None and int(budget.upper) - fixed < most * divisor:
            upper[k] = (int(budget.upper) - fixed) // divisor
        counted = np.flatnonzero(size)
        shape = (1, len(size))
        use.append(sparse.csr_array((size[counted].astype(np.float64), counted, [0, len(counted)]), shape=shape))
    stacked = sparse.vstack(use, format="csr") if use else sparse.csr_array((0, sizes.shape[1]))
    return stacked, lower, upper
