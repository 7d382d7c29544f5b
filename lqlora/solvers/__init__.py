"""Integer linear programming behind one function, with solvers that can be swapped.

Every adapter gets the same reduced problem and hands back a raw vector; objective, use and feasibility are computed
here, in exact integers, from the assignment the vector rounds to.
"""

from __future__ import annotations

import time
from typing import cast

import numpy as np

from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError, MissingDependencyError, SolverError
from lqlora.solvers import highs, scipy_milp
from lqlora.solvers.adapter import Adapter, RawResult
from lqlora.solvers.presolve import Reduced, reduce_problem
from lqlora.solvers.problem import (
    Budget,
    Problem,
    Solution,
    SolveOptions,
    Status,
    evaluate,
    relative_gap,
)

__all__ = [
    "Adapter",
    "Budget",
    "Problem",
    "RawResult",
    "Reduced",
    "Solution",
    "SolveOptions",
    "Status",
    "available",
    "evaluate",
    "reduce_problem",
    "register",
    "relative_gap",
    "select",
    "solve",
]

#: In order of preference.
_ADAPTERS: dict[str, Adapter] = {"highs": cast("Adapter", highs), "scipy": cast("Adapter", scipy_milp)}


def register(name: str, adapter: Adapter) -> None:
    """Add a solver, or replace one.

    Parameters
    ----------
    name : str
        What :func:`solve` will call it; not ``"auto"``.
    adapter : Adapter
        A module or object with ``REQUIRES``, ``version()`` and ``solve(reduced, options)``.

    Raises
    ------
    InvalidArgumentError
        If the name is ``"auto"`` or the adapter lacks a part.
    """
    lacking = [part for part in ("REQUIRES", "version", "solve") if not hasattr(adapter, part)]
    if name == "auto" or lacking:
        raise InvalidArgumentError(f"Solver {name!r} cannot be registered: reserved name, or it lacks {lacking}.")
    _ADAPTERS[name] = adapter


def available() -> dict[str, bool]:
    """Tell which solvers are installed, without importing them.

    Returns
    -------
    dict of str to bool
        By name, in order of preference.

    Examples
    --------
    >>> available()["scipy"]
    True
    """
    return {name: is_installed(adapter.REQUIRES) for name, adapter in _ADAPTERS.items()}


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
    if name not in _ADAPTERS:
        raise InvalidArgumentError(f"Unknown solver {name!r}: there are {', '.join(_ADAPTERS)}.")
    adapter = _ADAPTERS[name]
    start = time.perf_counter()
    reduced = reduce_problem(problem)
    if len(np.unique(reduced.group)) < reduced.choose.shape[0]:
        raw = RawResult(None, np.inf, "Tied rows have no choice in common.", infeasible=True)
    else:
        raw = adapter.solve(reduced, options)
    seconds = time.perf_counter() - start
    version = adapter.version()
    if raw.x is None:
        status = Status.INFEASIBLE if raw.infeasible else Status.NO_SOLUTION
        return Solution(status, None, np.inf, raw.bound * reduced.unit, (), name, version, seconds, raw.message)
    assignment = reduced.assignment(raw.x)
    objective, used, faults = evaluate(problem, assignment)
    if faults:
        raise SolverError(f"Solver {name!r} returned an assignment that is not valid: {'; '.join(faults)}.")
    bound = min(raw.bound * reduced.unit, objective)  # rounding of the scaled bound must not exceed the true optimum
    rounding = 1e-12 * (reduced.unit + abs(objective))
    within = objective - bound <= options.rel_gap * abs(objective) * (1 + 1e-9) + rounding
    status = Status.OPTIMAL if within else Status.FEASIBLE
    return Solution(status, assignment, objective, bound, used, name, version, seconds, raw.message)
