"""Solve a problem: reduce it, find a first assignment, call one or two solvers, and check their answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lqlora._annotations import annotated
from lqlora.errors import MissingDependencyError, SolverError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.heuristics import lagrangian_start, repair
from lqlora.solvers.mckp.fixing import fix_variables
from lqlora.solvers.mckp.knapsack import split
from lqlora.solvers.presolve import Reduced, reduce_problem
from lqlora.solvers.problem import Problem, Solution, SolveOptions, Status, StopReason, evaluate
from lqlora.solvers.registry import available, find, finisher

__all__ = ["select", "solve"]

_NO_GENERAL_SOLVER = "budgets that overlap or have lower limits need a general solver: pip install highspy."

#: Share of the time limit that ``mckp`` gets if another solver can take over.
_MCKP_SHARE = 0.3


def select(problem: Problem) -> str:
    """Return the name of the solver that ``solver="auto"`` selects.

    Parameters
    ----------
    problem : Problem
        The problem.

    Returns
    -------
    str
        ``"mckp"`` if no budget has a lower limit and no two budgets count the same matrix or tie; otherwise the first
        other solver that is installed.

    Raises
    ------
    MissingDependencyError
        If the problem needs another solver and none is installed.

    Examples
    --------
    >>> from lqlora.solvers import Budget
    >>> select(Problem([[3.0, 1.0]], [[2, 4]], budgets=[Budget(upper=3)]))
    'mckp'
    """
    budgets = [np.ones(len(problem.ties), dtype=np.bool_) if b.members is None else b.members for b in problem.budgets]
    counted = np.zeros(len(problem.ties), dtype=np.int64)
    _, group = np.unique(problem.ties, return_inverse=True)
    for members in budgets:
        counted += np.bincount(group, np.asarray(members, dtype=np.bool_))[group] > 0
    if counted.max() <= 1 and not any(budget.lower for budget in problem.budgets):
        return "mckp"
    for name, installed in available().items():
        if installed and name != "mckp":
            return name
    raise MissingDependencyError(_NO_GENERAL_SOLVER)


@dataclass(frozen=True)
class _Held:
    """Incumbent: the best assignment so far, with the best lower bound."""

    assignment: npt.NDArray[np.int64] | None = None
    objective: float = np.inf
    used: tuple[int, ...] = ()
    bound: float = -np.inf

    def better(self, problem: Problem, assignment: npt.NDArray[np.int64]) -> _Held:
        """Return the incumbent after a feasible assignment, which replaces it if it is cheaper."""
        objective, used, faults = evaluate(problem, assignment)
        if faults:
            raise SolverError(f"assignment is not feasible: {'; '.join(faults)}.")
        if objective >= self.objective:
            return self
        return replace(self, assignment=assignment, objective=objective, used=used)

    def is_closed(self, rel_gap: float, unit: float) -> bool:
        """Return whether the relative gap is reached, up to rounding."""
        # Bounds are computed in units of the reduced problem, and objectives are sums of up to 1e5 float64 costs.
        rounding = 1e-12 * (unit + abs(self.objective))
        return self.objective - self.bound <= rel_gap * abs(self.objective) * (1 + 1e-9) + rounding


@annotated
def solve(problem: Problem, solver: str = "auto", options: SolveOptions | None = None) -> Solution:
    """Solve an allocation problem and check the answer.

    Parameters
    ----------
    problem : Problem
        The problem.
    solver : str, default "auto"
        Name of a registered solver.
    options : SolveOptions, optional
        Limits, seed, threads and a start.

    Returns
    -------
    Solution
        Its assignment, if any, meets every constraint in exact integers. Problems that ``"mckp"`` does not take or
        close go to another exact solver if one is installed; ``Solution.solver`` then names that one too.

    Raises
    ------
    InvalidArgumentError
        If the solver is unknown.
    MissingDependencyError
        If the solver is not installed.
    SolverError
        If the solver fails, or returns an assignment that breaks a constraint and cannot be repaired.

    Examples
    --------
    >>> from lqlora.solvers import Budget
    >>> found = solve(Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)]))
    >>> found.assignment.tolist(), found.objective, found.used
    ([0, 1], 5.0, (6,))
    """
    options = options or SolveOptions()
    name = select(problem) if isinstance(solver, str) and solver == "auto" else solver
    find(name)  # raises on an unknown name before any work is done
    begin = time.perf_counter()
    reduced = reduce_problem(problem)
    reason = _contradiction(reduced)
    if reason:
        raw, held, names = RawResult(None, np.inf, reason, StopReason.INFEASIBLE), _Held(bound=np.inf), [name]
    else:
        raw, held, names = _search(problem, reduced, name, options, begin)
    status = Status.OPTIMAL if held.is_closed(options.rel_gap, reduced.unit) else Status.FEASIBLE
    if held.assignment is None:
        status = Status.INFEASIBLE if raw.stopped is StopReason.INFEASIBLE else Status.NO_SOLUTION
    bound = min(held.bound, held.objective)  # the scaled bound may exceed the optimum by rounding
    versions, seconds = "+".join(find(name).version() for name in names), time.perf_counter() - begin
    answer = held.assignment, held.objective, bound, held.used
    return Solution(status, raw.stopped, *answer, "+".join(names), versions, seconds, raw.message)


def _search(
    problem: Problem, reduced: Reduced, name: str, options: SolveOptions, begin: float
) -> tuple[RawResult, _Held, list[str]]:
    """Run the solver. If it is ``mckp`` and leaves a gap, run a second solver for the rest of the time."""
    reduced, held = _first(problem, reduced, options)
    if name != "mckp":
        return *_run(problem, reduced, held, name, _rest(options, begin)), [name]
    second = finisher()
    if split(reduced) is None:
        if second is None:
            raise MissingDependencyError(_NO_GENERAL_SOLVER)
        return *_run(problem, reduced, held, second, _rest(options, begin)), [second]
    share = 1.0 if second is None else _MCKP_SHARE
    raw, held = _run(problem, reduced, held, name, _rest(options, begin, share))
    late = options.time_limit is not None and time.perf_counter() - begin >= options.time_limit
    if second is None or late or held.is_closed(options.rel_gap, reduced.unit):
        return raw, held, [name]
    reduced, held = _first(problem, reduced, replace(options, start=held.assignment), held.bound)
    return *_run(problem, reduced, held, second, _rest(options, begin)), [name, second]


def _contradiction(reduced: Reduced) -> str:
    """Return a reason why no assignment is feasible, if ties or extreme choices show one."""
    if len(reduced.first) < int(reduced.group_of_row.max()) + 1:
        return "tied rows have no choice in common"
    for k in np.flatnonzero(reduced.upper < 0):
        return f"the smallest choices exceed the upper limit of budget {k}"
    for k in np.flatnonzero(np.isfinite(reduced.lower)):
        if np.maximum.reduceat(reduced.use[[k]].toarray()[0], reduced.first).sum() < reduced.lower[k]:
            return f"the largest choices are below the lower limit of budget {k}"
    return ""


def _rest(options: SolveOptions, begin: float, share: float = 1.0) -> SolveOptions:
    """Return the options with a share of the remaining time as their limit."""
    if options.time_limit is None:
        return options
    left = options.time_limit - (time.perf_counter() - begin)
    return replace(options, time_limit=max(share * left, 1e-3))


def _first(problem: Problem, reduced: Reduced, options: SolveOptions, bound: float = -np.inf) -> tuple[Reduced, _Held]:
    """Find an assignment before any solver runs, and remove choices that no better one can contain."""
    held = _Held(bound=bound)
    if options.start is not None and not evaluate(problem, options.start)[2]:
        start = np.asarray(options.start, dtype=np.int64)
        held = held.better(problem, start)
        chosen = np.empty(len(reduced.first), dtype=np.int64)
        chosen[reduced.group_of_row] = start
        x = (reduced.column == chosen[reduced.group]).astype(np.float64)
        if x.sum() == len(chosen):  # otherwise the start contains a dominated choice, which the presolve removed
            reduced = replace(reduced, start=x)
    parts = split(reduced)
    if parts is not None:
        reduced, least = fix_variables(reduced, parts)
        held = replace(held, bound=max(bound, least * reduced.unit))
    elif reduced.start is None:
        found = lagrangian_start(reduced)
        if found is not None:
            reduced = replace(reduced, start=reduced.vector(found))
    return reduced, held if reduced.start is None else held.better(problem, reduced.assignment(reduced.start))


def _run(problem: Problem, reduced: Reduced, held: _Held, name: str, options: SolveOptions) -> tuple[RawResult, _Held]:
    """Run one solver, and check its answer in exact integers before it becomes the incumbent."""
    raw = find(name).solve(reduced, options)
    if raw.stopped is StopReason.INFEASIBLE and held.assignment is not None:
        raise SolverError(f"solver {name!r} reports a problem with a solution as infeasible: {raw.message}.")
    if not np.isnan(raw.bound):
        held = replace(held, bound=max(held.bound, raw.bound * reduced.unit))
    if raw.x is None:
        return raw, held
    assignment = reduced.assignment(raw.x)
    faults = evaluate(problem, assignment)[2]
    if faults:
        mended = repair(reduced, reduced.chosen(raw.x))
        if mended is None:
            raise SolverError(f"solver {name!r} returned an infeasible assignment: {'; '.join(faults)}.")
        assignment = reduced.column[mended][reduced.group_of_row]
    return raw, held.better(problem, assignment)
