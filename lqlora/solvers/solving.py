"""One problem through everything: reduction, a first assignment, a solver or two, and the judgment of what they say."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lqlora.errors import MissingDependencyError, SolverError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.greedy import price_out, repair
from lqlora.solvers.mckp.fixing import shrink
from lqlora.solvers.mckp.knapsack import split
from lqlora.solvers.presolve import Reduced, reduce_problem
from lqlora.solvers.problem import Problem, Solution, SolveOptions, Status, StopReason, evaluate
from lqlora.solvers.registry import available, find, finisher

__all__ = ["select", "solve"]

#: Share of the time limit that the native solver has, if another one can take over.
_NATIVE_SHARE = 0.3


def select(problem: Problem) -> str:
    """Name the solver that ``solver="auto"`` stands for.

    Parameters
    ----------
    problem : Problem
        The problem to be solved.

    Returns
    -------
    str
        The native solver, if no budget has a lower limit and none count the same matrix; else the first installed one.

    Raises
    ------
    MissingDependencyError
        If none is installed.

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
    raise MissingDependencyError("No solver for such budgets is installed: pip install highspy or scipy.")


@dataclass(frozen=True)
class _Held:
    """The best assignment so far, and the best bound."""

    assignment: npt.NDArray[np.int64] | None = None
    objective: float = np.inf
    used: tuple[int, ...] = ()
    bound: float = -np.inf

    def better(self, problem: Problem, assignment: npt.NDArray[np.int64]) -> _Held:
        """Take an assignment that breaks no constraint, if it is cheaper."""
        objective, used, faults = evaluate(problem, assignment)
        if faults:
            raise SolverError(f"An assignment is not valid: {'; '.join(faults)}.")
        return (
            self
            if objective >= self.objective
            else replace(self, assignment=assignment, objective=objective, used=used)
        )

    def is_closed(self, rel_gap: float, unit: float) -> bool:
        """Tell whether the gap is reached; what rounding may have moved does not count."""
        rounding = 1e-12 * (unit + abs(self.objective))
        return self.objective - self.bound <= rel_gap * abs(self.objective) * (1 + 1e-9) + rounding


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
        Its assignment, if any, breaks no constraint, in exact integers. What the native solver ``"mckp"`` cannot take,
        or cannot close, goes to another exact solver if one is installed: ``solver`` then names it too.

    Raises
    ------
    InvalidArgumentError
        If the solver is unknown.
    MissingDependencyError
        If it is not installed.
    SolverError
        If it fails, or returns an assignment that breaks a constraint and cannot be repaired.

    Examples
    --------
    >>> from lqlora.solvers import Budget
    >>> found = solve(Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)]))
    >>> found.assignment.tolist(), found.objective, found.used
    ([0, 1], 5.0, (6,))
    """
    options = options or SolveOptions()
    name = select(problem) if solver == "auto" else solver
    find(name)  # an unknown name is refused before any work
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
    bound = min(held.bound, held.objective)  # rounding of the scaled bound must not exceed the true optimum
    versions, seconds = "+".join(find(name).version() for name in names), time.perf_counter() - begin
    answer = held.assignment, held.objective, bound, held.used
    return Solution(status, raw.stopped, *answer, "+".join(names), versions, seconds, raw.message)


def _search(
    problem: Problem, reduced: Reduced, name: str, options: SolveOptions, begin: float
) -> tuple[RawResult, _Held, list[str]]:
    """Run the solver; if it is the native one, also whoever takes over what that leaves."""
    reduced, held = _first(problem, reduced, options)
    if name != "mckp":
        return *_run(problem, reduced, held, name, _rest(options, begin)), [name]
    second = finisher()
    if split(reduced) is None:
        if second is None:
            raise MissingDependencyError("Budgets that overlap or have lower limits need highspy: pip install highspy.")
        return *_run(problem, reduced, held, second, _rest(options, begin)), [second]
    share = 1.0 if second is None else _NATIVE_SHARE
    raw, held = _run(problem, reduced, held, name, _rest(options, begin, share))
    late = options.time_limit is not None and time.perf_counter() - begin >= options.time_limit
    if second is None or late or held.is_closed(options.rel_gap, reduced.unit):
        return raw, held, [name]
    reduced, held = _first(problem, reduced, replace(options, start=held.assignment), held.bound)
    return *_run(problem, reduced, held, second, _rest(options, begin)), [name, second]


def _contradiction(reduced: Reduced) -> str:
    """Say why nothing can be feasible, if that is plain to see."""
    if len(reduced.first) < int(reduced.group_of_row.max()) + 1:
        return "Tied rows have no choice in common."
    for k in np.flatnonzero(reduced.upper < 0):
        return f"The smallest choices are above the limit of budget {k}."
    for k in np.flatnonzero(np.isfinite(reduced.lower)):
        if np.maximum.reduceat(reduced.use[[k]].toarray()[0], reduced.first).sum() < reduced.lower[k]:
            return f"The largest choices are below the limit of budget {k}."
    return ""


def _rest(options: SolveOptions, begin: float, share: float = 1.0) -> SolveOptions:
    """Return the options with a share of the time that is left."""
    if options.time_limit is None:
        return options
    left = options.time_limit - (time.perf_counter() - begin)
    return replace(options, time_limit=max(share * left, 1e-3))


def _first(problem: Problem, reduced: Reduced, options: SolveOptions, bound: float = -np.inf) -> tuple[Reduced, _Held]:
    """Hold an assignment before any solver runs, and drop what it shows to be of no use."""
    held = _Held(bound=bound)
    if options.start is not None and not evaluate(problem, options.start)[2]:
        start = np.asarray(options.start, dtype=np.int64)
        held = held.better(problem, start)
        chosen = np.empty(len(reduced.first), dtype=np.int64)
        chosen[reduced.group_of_row] = start
        x = (reduced.column == chosen[reduced.group]).astype(np.float64)
        if x.sum() == len(chosen):  # else it contains a choice that another one beats
            reduced = replace(reduced, start=x)
    parts = split(reduced)
    if parts is not None:
        reduced, least = shrink(reduced, parts)
        held = replace(held, bound=max(bound, least * reduced.unit))
    elif reduced.start is None:
        found = price_out(reduced)
        if found is not None:
            x = np.zeros(len(reduced.cost))
            x[found] = 1.0
            reduced = replace(reduced, start=x)
    return reduced, held if reduced.start is None else held.better(problem, reduced.assignment(reduced.start))


def _run(problem: Problem, reduced: Reduced, held: _Held, name: str, options: SolveOptions) -> tuple[RawResult, _Held]:
    """Let one solver work, and believe nothing of what it says before it is checked."""
    raw = find(name).solve(reduced, options)
    if raw.stopped is StopReason.INFEASIBLE and held.assignment is not None:
        raise SolverError(f"Solver {name!r} calls a problem infeasible that has a solution: {raw.message}.")
    if not np.isnan(raw.bound):
        held = replace(held, bound=max(held.bound, raw.bound * reduced.unit))
    if raw.x is None:
        return raw, held
    assignment = reduced.assignment(raw.x)
    faults = evaluate(problem, assignment)[2]
    if faults:
        mended = repair(reduced, reduced.chosen(raw.x))
        if mended is None:
            raise SolverError(f"Solver {name!r} returned an assignment that is not valid: {'; '.join(faults)}.")
        assignment = reduced.column[mended][reduced.group_of_row]
    return raw, held.better(problem, assignment)
