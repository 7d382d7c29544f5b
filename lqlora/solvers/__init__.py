"""Integer linear programming behind one function, with solvers that can be swapped.

Every adapter gets the same reduced problem and hands back a raw vector; objective, use and feasibility are computed
here, in exact integers, from the assignment the vector rounds to.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lqlora.errors import MissingDependencyError, SolverError
from lqlora.solvers.adapter import Adapter, License, RawResult
from lqlora.solvers.presolve import Reduced, reduce_problem
from lqlora.solvers.problem import (
    Budget,
    Problem,
    Solution,
    SolveOptions,
    Status,
    StopReason,
    evaluate,
    relative_gap,
)
from lqlora.solvers.registry import available, check_license, find, register

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "Adapter",
    "Budget",
    "License",
    "Problem",
    "RawResult",
    "Reduced",
    "Solution",
    "SolveOptions",
    "Status",
    "StopReason",
    "available",
    "check_license",
    "evaluate",
    "reduce_problem",
    "register",
    "relative_gap",
    "select",
    "solve",
]


def select(problem: Problem) -> str:  # noqa: ARG001 - the choice will depend on the problem once solvers differ
    """Name the solver that ``solver="auto"`` stands for.

    Parameters
    ----------
    problem : Problem
        The problem to be solved.

    Returns
    -------
    str
        The first installed solver in order of preference.

    Raises
    ------
    MissingDependencyError
        If none is installed.
    """
    for name, installed in available().items():
        if installed:
            return name
    raise MissingDependencyError("No solver is installed: pip install highspy or scipy.")


def solve(problem: Problem, solver: str = "auto", options: SolveOptions | None = None) -> Solution:
    """Solve an allocation problem and check the answer.

    Parameters
    ----------
    problem : Problem
        The problem.
    solver : str, default "auto"
        Name of a registered solver.
    options : SolveOptions, optional
        Limits.

    Returns
    -------
    Solution
        Its assignment, if any, breaks no constraint, in exact integers.

    Raises
    ------
    InvalidArgumentError
        If the solver is unknown.
    MissingDependencyError
        If it is not installed.
    SolverError
        If it fails, or returns an assignment that breaks a constraint.

    Examples
    --------
    >>> found = solve(Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)]))
    >>> found.assignment.tolist(), found.objective, found.used
    ([0, 1], 5.0, (6,))
    """
    options = options or SolveOptions()
    name = select(problem) if solver == "auto" else solver
    adapter = find(name)
    start = time.perf_counter()
    reduced = _with_start(reduce_problem(problem), problem, options.start)
    if len(np.unique(reduced.group)) < reduced.choose.shape[0]:
        raw = RawResult(None, np.inf, "Tied rows have no choice in common.", StopReason.INFEASIBLE)
    else:
        raw = adapter.solve(reduced, options)
    seconds = time.perf_counter() - start
    version = adapter.version()
    if raw.x is None:
        status = Status.INFEASIBLE if raw.stopped is StopReason.INFEASIBLE else Status.NO_SOLUTION
        bound = raw.bound * reduced.unit
        return Solution(status, raw.stopped, None, np.inf, bound, (), name, version, seconds, raw.message)
    assignment = reduced.assignment(raw.x)
    objective, used, faults = evaluate(problem, assignment)
    if faults:
        raise SolverError(f"Solver {name!r} returned an assignment that is not valid: {'; '.join(faults)}.")
    bound = min(raw.bound * reduced.unit, objective)  # rounding of the scaled bound must not exceed the true optimum
    rounding = 1e-12 * (reduced.unit + abs(objective))
    within = objective - bound <= options.rel_gap * abs(objective) * (1 + 1e-9) + rounding
    status = Status.OPTIMAL if within else Status.FEASIBLE
    return Solution(status, raw.stopped, assignment, objective, bound, used, name, version, seconds, raw.message)


def _with_start(reduced: Reduced, problem: Problem, start: npt.ArrayLike | None) -> Reduced:
    """Add the caller's start, if it breaks no constraint and consists of choices that are left."""
    if start is None or evaluate(problem, start)[2]:
        return reduced
    chosen = np.asarray(start)[np.unique(reduced.group_of_row, return_index=True)[1]]
    x = (reduced.column == chosen[reduced.group]).astype(np.float64)
    return replace(reduced, start=x) if x.sum() == len(chosen) else reduced
