"""Allocation problems and their solutions: costs, sizes and budgets; options, statuses and exact evaluation.

The arrays are NumPy's, and nothing here depends on weights or formats.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora._annotations import annotated, annotated_class
from lqlora._messages import given
from lqlora._options import require_integer, require_number
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Budget", "Problem", "Solution", "SolveOptions", "Status", "StopReason", "evaluate", "relative_gap"]


class Status(enum.Enum):
    """Quality of the assignment that was found. See :class:`StopReason` for why the solver stopped.

    The value of each member is a sentence that says what to do next.
    """

    OPTIMAL = "The assignment is optimal within the requested relative gap."
    FEASIBLE = "The assignment is valid, but its gap is larger than requested: allow more time, or use an exact solver."
    INFEASIBLE = "No assignment meets the budgets: raise a budget or allow smaller formats."
    NO_SOLUTION = "The solver stopped before it found an assignment: allow more time, or use another solver."


class StopReason(enum.Enum):
    """Reason why a solver stopped. See :class:`Status` for the quality of the assignment."""

    GAP = "The solver reached the requested gap."
    INFEASIBLE = "The solver proved that no assignment meets the budgets."
    TIME_LIMIT = "The solver reached the time limit."
    LIMIT = "The solver reached another limit, such as memory or the size that its license allows."
    INTERRUPTED = "The solver was interrupted."


@dataclass(frozen=True, eq=False)
class Budget:
    """Limits on the total size of some matrices.

    Parameters
    ----------
    upper, lower : int, optional
        Largest and smallest total size in bits. At least one is required.
    members : ndarray of bool, shape (n_matrices,), optional
        Matrices that the budget counts; all by default.

    Raises
    ------
    InvalidArgumentError
        If neither limit is given, or a limit is not an integer of at least 0.

    Examples
    --------
    >>> Budget(upper=1000).upper
    1000
    """

    upper: int | None = None
    lower: int | None = None
    members: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.upper is None and self.lower is None:
            raise InvalidArgumentError("upper or lower must be given for a Budget, got None for both.")
        for name in ("upper", "lower"):
            limit = getattr(self, name)
            if limit is not None:
                require_integer(limit, f"{name} of a Budget")


@annotated_class
@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """Allocation problem: choose one column in each row of a cost table, at least total cost within the budgets.

    Parameters
    ----------
    cost : array of float64, shape (n, m)
        Cost of storing matrix ``i`` in format ``j``; finite where allowed.
    size : array of int64, shape (n, m)
        Its size in bits, not negative.
    allowed : array of bool, shape (n, m), optional
        Allowed choices; all by default. Every row needs at least one.
    ties : array of int, shape (n,), optional
        Rows with equal values take the same column. By default no rows are tied.
    budgets : sequence of Budget
        Limits, which hold all at once.

    Raises
    ------
    InvalidArgumentError
        If shapes differ, an allowed cost is not finite, an allowed size is negative, or a row has no allowed choice.

    Examples
    --------
    >>> Problem([[3.0, 1.0]], [[2, 4]], budgets=[Budget(upper=3)]).cost.shape
    (1, 2)
    """

    cost: npt.NDArray[np.float64]
    size: npt.NDArray[np.int64]
    allowed: npt.NDArray[np.bool_]
    ties: npt.NDArray[np.int64]
    budgets: tuple[Budget, ...]

    def __init__(
        self,
        cost: npt.ArrayLike,
        size: npt.ArrayLike,
        allowed: npt.ArrayLike | None = None,
        ties: npt.ArrayLike | None = None,
        budgets: Sequence[Budget] = (),
    ) -> None:
        try:
            costs = np.atleast_1d(np.array(cost, dtype=np.float64))
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"cost must be a matrix of numbers that float64 holds, got {given(cost)}."
            ) from error
        sizes = np.asarray(size)
        mask = np.ones(costs.shape, dtype=np.bool_) if allowed is None else np.array(allowed, dtype=np.bool_)
        groups = np.arange(len(costs)) if ties is None else np.array(ties)
        _check(costs, sizes, mask, groups, budgets)
        values = {"cost": costs, "size": np.array(sizes, dtype=np.int64), "allowed": mask, "ties": groups}
        for name, value in {**values, "budgets": tuple(budgets)}.items():
            object.__setattr__(self, name, value)


def _check(
    cost: npt.NDArray[np.float64],
    size: npt.NDArray[np.generic],
    allowed: npt.NDArray[np.bool_],
    ties: npt.NDArray[np.generic],
    budgets: Sequence[Budget],
) -> None:
    if size.dtype.kind not in "iu" or ties.dtype.kind not in "iu":
        raise InvalidArgumentError(f"size and ties must be integers, got dtypes {size.dtype} and {ties.dtype}.")
    if cost.ndim != 2 or cost.size == 0 or not cost.shape == size.shape == allowed.shape:
        shapes = cost.shape, size.shape, allowed.shape
        raise InvalidArgumentError(f"cost, size and allowed must have one non-empty shape (n, m), got {shapes}.")
    if ties.shape != (len(cost),):
        raise InvalidArgumentError(f"ties must have one entry for each of {len(cost)} rows, got shape {ties.shape}.")
    if not allowed.any(axis=1).all():
        row = int((~allowed.any(axis=1)).argmax())
        raise InvalidArgumentError(f"allowed must be True for at least one choice of each row, got none for row {row}.")
    for name, table, wrong, rule in (
        ("cost", cost, ~np.isfinite(cost), "finite"),
        ("size", size, size < 0, "at least 0 bits"),  # type: ignore[operator]
    ):
        if (wrong & allowed).any():
            row, column = (int(i[0]) for i in np.nonzero(wrong & allowed))
            value = f"{table[row, column]} at row {row}, column {column}"
            raise InvalidArgumentError(f"{name} must be {rule} where a choice is allowed, got {value}.")
    if size.sum(dtype=np.float64) >= 2.0**62:
        raise InvalidArgumentError(
            f"size must add up to less than 2**62 bits, got {size.sum(dtype=np.float64):.6g}. Use a larger unit."
        )
    for k, budget in enumerate(budgets):
        if budget.members is not None and np.shape(budget.members) != (len(cost),):
            got = np.shape(budget.members)
            raise InvalidArgumentError(f"members of budget {k} must have shape ({len(cost)},), one per row, got {got}.")


@dataclass(frozen=True)
class SolveOptions:
    """Options of :func:`solve`: limits, seed, threads and a start.

    Parameters
    ----------
    time_limit : float, optional
        Time limit in seconds; none by default.
    rel_gap : float, default 1e-6
        The solver stops when ``objective - bound`` is at most this fraction of the objective.
    seed : int, default 0
        Seed for solvers that take one.
    threads : int, default 1
        Number of threads, for solvers that take one. With more than one thread the answer may depend on timing.
    start : array of int, shape (n,), optional
        An assignment to start from. It is ignored if it breaks a constraint.

    Raises
    ------
    InvalidArgumentError
        If the time limit is not positive, the gap is not in [0, 1), or the number of threads is not at least 1.

    Examples
    --------
    >>> SolveOptions(time_limit=10.0).rel_gap
    1e-06
    """

    time_limit: float | None = None
    rel_gap: float = 1e-6
    seed: int = 0
    threads: int = 1
    start: npt.ArrayLike | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_integer(self.threads, "threads", 1)
        if self.time_limit is not None:
            require_number(self.time_limit, "time_limit", "positive", lambda own: own > 0)
        require_number(self.rel_gap, "rel_gap", "at least 0 and below 1", lambda own: 0 <= own < 1)


@dataclass(frozen=True, eq=False)
class Solution:
    """A checked assignment with its proven lower bound.

    Parameters
    ----------
    status : Status
        Quality of the assignment.
    stopped : StopReason
        Reason why the solver stopped.
    assignment : ndarray of int64, shape (n,), or None
        Column chosen in each row; None without a solution.
    objective : float
        Sum of the chosen costs; infinite without a solution.
    bound : float
        Proven lower bound on the cost of every feasible assignment.
    used : tuple of int
        Bits used under each budget.
    solver, version : str
        Names and versions of the solvers that ran, joined by ``+``.
    seconds : float
        Wall time in seconds.
    message : str
        The solver's own status message.
    """

    status: Status
    stopped: StopReason
    assignment: npt.NDArray[np.int64] | None
    objective: float
    bound: float
    used: tuple[int, ...]
    solver: str
    version: str
    seconds: float
    message: str = ""

    @property
    def gap(self) -> float:
        """Relative gap ``(objective - bound) / |objective|``: 0 if both are equal, infinite without a solution."""
        return relative_gap(self.objective, self.bound)


def relative_gap(objective: float, bound: float) -> float:
    """Return the gap between an objective and a lower bound, relative to the objective.

    Parameters
    ----------
    objective, bound : float
        Cost of an assignment, which may be infinite, and the lower bound.

    Returns
    -------
    float
        0 if both are equal. Infinite if the objective is infinite, or if it is zero and the bound is not.

    Examples
    --------
    >>> relative_gap(2.0, 1.5), relative_gap(0.0, -1.0)
    (0.25, inf)
    """
    if objective == bound:
        return 0.0
    return math.inf if objective == 0.0 or math.isinf(objective) else max(0.0, objective - bound) / abs(objective)


@annotated
def evaluate(problem: Problem, assignment: npt.ArrayLike) -> tuple[float, tuple[int, ...], list[str]]:
    """Compute objective and bits used of an assignment, and list every constraint it breaks.

    Bits are added and compared as integers.

    Parameters
    ----------
    problem : Problem
        The problem.
    assignment : array of int, shape (n,)
        Column of each row.

    Returns
    -------
    objective : float
        Sum of costs in float64, in the order of the rows.
    used : tuple of int
        Bits used under each budget.
    faults : list of str
        Empty if the assignment is feasible.

    Raises
    ------
    InvalidArgumentError
        If the assignment is not one valid column index for each row.

    Examples
    --------
    >>> evaluate(Problem([[3.0, 1.0]], [[2, 4]], budgets=[Budget(upper=3)]), [1])
    (1.0, (4,), ['budget 0: 4 bits are above the limit of 3'])
    """
    n, m = problem.cost.shape
    chosen = np.asarray(assignment)
    if chosen.shape != (n,) or chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= m).any():
        raise InvalidArgumentError(
            f"assignment must be {n} integers between 0 and {m - 1}, one column for each row, got {assignment!r:.200}."
        )
    rows = np.arange(n)
    faults = [f"row {i}: choice {chosen[i]} is not allowed" for i in rows[~problem.allowed[rows, chosen]]]
    _, first, group = np.unique(problem.ties, return_index=True, return_inverse=True)
    differing = problem.ties[chosen != chosen[first][group]]
    faults += [f"tie {tie}: its rows differ" for tie in np.unique(differing)]
    sizes = problem.size[rows, chosen]
    used = []
    for k, budget in enumerate(problem.budgets):
        use = int(sizes.sum() if budget.members is None else sizes[np.asarray(budget.members, dtype=bool)].sum())
        used.append(use)
        if budget.upper is not None and use > budget.upper:
            faults.append(f"budget {k}: {use} bits are above the limit of {budget.upper}")
        if budget.lower is not None and use < budget.lower:
            faults.append(f"budget {k}: {use} bits are below the limit of {budget.lower}")
    return float(problem.cost[rows, chosen].sum()), tuple(used), faults
