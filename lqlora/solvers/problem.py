"""The allocation problem in integers and floats: one format per matrix, at least cost, within budgets of bits.

Nothing here knows of weights or arrays other than NumPy's. Objective and use are always computed by :func:`evaluate`
from the integer assignment, never taken from a solver.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Budget", "Problem", "Solution", "SolveOptions", "Status", "StopReason", "evaluate", "relative_gap"]


class Status(enum.Enum):
    """What is held at the end. Why the solver stopped is another question: see :class:`StopReason`.

    The values of the members are sentences that say what to do next.
    """

    OPTIMAL = "The assignment is optimal within the relative gap asked for."
    FEASIBLE = "The assignment is valid, but its gap is larger than asked for: allow more time, or an exact solver."
    INFEASIBLE = "No assignment meets the budgets: raise a budget or allow smaller formats."
    NO_SOLUTION = "The solver stopped before any assignment was found: allow more time, or another solver."


class StopReason(enum.Enum):
    """Why a solver stopped. What it holds then is another question: see :class:`Status`."""

    GAP = "The gap asked for was reached."
    INFEASIBLE = "It was proven that no assignment meets the budgets."
    TIME_LIMIT = "The time limit was reached."
    LIMIT = "Another limit of the solver was reached, such as memory or the size that its license allows."
    INTERRUPTED = "The solver was interrupted."


@dataclass(frozen=True, eq=False)
class Budget:
    """Limits on the total size of some matrices.

    Parameters
    ----------
    upper, lower : int, optional
        Largest and smallest total size in bits; at least one is given.
    members : ndarray of bool, shape (n_matrices,), optional
        Matrices that count; all if not given.

    Raises
    ------
    InvalidArgumentError
        If neither limit is given, or a limit is no integer or negative.

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
            raise InvalidArgumentError("A budget needs an upper or a lower limit.")
        for limit in (self.upper, self.lower):
            if limit is not None and (not isinstance(limit, int | np.integer) or limit < 0):
                raise InvalidArgumentError(f"The limits of a budget are integers of at least 0 bits, not {limit!r}.")


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """Choose one column per row of a cost table.

    Parameters
    ----------
    cost : array of float64, shape (n, m)
        Cost of storing matrix ``i`` in format ``j``; finite where allowed.
    size : array of int64, shape (n, m)
        Its size in bits, not negative.
    allowed : array of bool, shape (n, m), optional
        Choices that may be made; all if not given. Every row needs one.
    ties : array of int, shape (n,), optional
        Rows with equal values take the same column; no ties if not given.
    budgets : sequence of Budget
        All hold at once.

    Raises
    ------
    InvalidArgumentError
        If shapes differ, an allowed cost is not finite, a size is negative, or a row allows nothing.

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
        costs, sizes = np.atleast_1d(np.array(cost, dtype=np.float64)), np.asarray(size)
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
        raise InvalidArgumentError(f"Sizes are integers of bits and ties are integers, not {size.dtype}, {ties.dtype}.")
    if cost.ndim != 2 or cost.size == 0 or not cost.shape == size.shape == allowed.shape:
        shapes = cost.shape, size.shape, allowed.shape
        raise InvalidArgumentError(f"Costs, sizes and the mask need one non-empty shape (n, m), not {shapes}.")
    if ties.shape != (len(cost),):
        raise InvalidArgumentError(f"Ties name a group for each of {len(cost)} rows, not {ties.shape}.")
    if not allowed.any(axis=1).all():
        raise InvalidArgumentError(f"Row {int((~allowed.any(axis=1)).argmax())} allows no choice.")
    if not (np.isfinite(cost) | ~allowed).all() or ((size < 0) & allowed).any():  # type: ignore[operator]
        raise InvalidArgumentError("Allowed choices need finite costs and sizes of at least 0 bits.")
    if size.sum(dtype=np.float64) >= 2.0**62:
        raise InvalidArgumentError("The sizes add up to more than 64-bit integers can count.")
    for budget in budgets:
        if budget.members is not None and np.shape(budget.members) != (len(cost),):
            raise InvalidArgumentError(f"The members of a budget are a mask over {len(cost)} rows.")


@dataclass(frozen=True)
class SolveOptions:
    """Limits of a solve.

    Parameters
    ----------
    time_limit : float, optional
        Seconds; no limit if not given.
    rel_gap : float, default 1e-6
        Stop when ``objective - bound`` is at most this fraction of the objective.
    seed : int, default 0
        For solvers that take one.
    threads : int, default 1
        For solvers that take a number. With more than one thread the answer may depend on timing.
    start : array of int, shape (n,), optional
        An assignment to start from. It is checked: one that breaks a constraint is not used.

    Raises
    ------
    InvalidArgumentError
        If the time limit is not positive, the gap is negative, or the number of threads is not at least 1.

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
        if not isinstance(self.threads, int | np.integer) or self.threads < 1:
            raise InvalidArgumentError(f"The number of threads is an integer of at least 1, not {self.threads!r}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise InvalidArgumentError(f"A time limit is positive, not {self.time_limit!r}.")
        if not 0 <= self.rel_gap < 1:
            raise InvalidArgumentError(f"A relative gap is at least 0 and below 1, not {self.rel_gap!r}.")


@dataclass(frozen=True, eq=False)
class Solution:
    """An assignment that was checked, and what is proven about it.

    Parameters
    ----------
    status : Status
        What is held.
    stopped : StopReason
        Why the solver stopped.
    assignment : ndarray of int64, shape (n,), or None
        Column chosen for each row; None without a solution.
    objective : float
        Sum of the chosen costs; infinite without a solution.
    bound : float
        No assignment costs less than this.
    used : tuple of int
        Bits used under each budget.
    solver, version : str
        Who solved it.
    seconds : float
        Wall time.
    message : str
        The solver's own word for why it stopped.
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
        """Relative gap ``(objective - bound) / |objective|``; 0 if both are equal, infinite without a solution."""
        return relative_gap(self.objective, self.bound)


def relative_gap(objective: float, bound: float) -> float:
    """Distance between an objective and a lower bound, relative to the objective.

    Parameters
    ----------
    objective, bound : float
        The two; the objective may be infinite.

    Returns
    -------
    float
        0 if they are equal, infinite if the objective is infinite, or zero with a lower bound.

    Examples
    --------
    >>> relative_gap(2.0, 1.5), relative_gap(0.0, -1.0)
    (0.25, inf)
    """
    if objective == bound:
        return 0.0
    return math.inf if objective == 0.0 or math.isinf(objective) else max(0.0, objective - bound) / abs(objective)


def evaluate(problem: Problem, assignment: npt.ArrayLike) -> tuple[float, tuple[int, ...], list[str]]:
    """Compute objective and use of an assignment in exact integers, and list every constraint it breaks.

    Parameters
    ----------
    problem : Problem
        The problem.
    assignment : array of int, shape (n,)
        A column for each row.

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
        If the assignment is not one column index per row.

    Examples
    --------
    >>> evaluate(Problem([[3.0, 1.0]], [[2, 4]], budgets=[Budget(upper=3)]), [1])
    (1.0, (4,), ['budget 0: 4 bits are above the limit of 3'])
    """
    n, m = problem.cost.shape
    chosen = np.asarray(assignment)
    if chosen.shape != (n,) or chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= m).any():
        raise InvalidArgumentError(f"An assignment is {n} column indices below {m}.")
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
