"""The properties of solvers: each a function whose docstring is the promise."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import numpy as np

from lqlora.solvers import RawResult, SolveOptions, StopReason, reduce_problem
from lqlora.testing._promises import Property, promises
from lqlora.testing._verdicts import ViolationError
from lqlora.testing.solvers import _inputs as inputs
from lqlora.testing.solvers._subject import SolverSubject, optimum

if TYPE_CHECKING:
    from lqlora.solvers import Problem
    from lqlora.testing.solvers._subject import Answer

__all__ = ["REGISTRY"]

REGISTRY: dict[str, Property[SolverSubject]] = {}
_promise = promises(REGISTRY)

#: Seconds that a solver may take beyond its time limit: to build its model, and because machines stall.
_OVERRUN = 10.0

_GAP = SolveOptions().rel_gap


@_promise(inputs.nothing)
def version(subject: SolverSubject) -> None:
    """The version is a text."""
    found = subject.version()
    if not isinstance(found, str) or not found:
        raise ViolationError(f"version() is {found!r}")


@_promise(inputs.easy)
def result(subject: SolverSubject, problem: Problem) -> None:
    """What comes back is a RawResult: a vector or None, a number as bound, a text, a StopReason."""
    raw = cast("object", subject.run(reduce_problem(problem), SolveOptions()))
    if not isinstance(raw, RawResult):
        raise ViolationError(f"a {type(raw).__name__} came back")
    types = {"bound": float | np.floating, "message": str, "stopped": StopReason}
    for name, kind in types.items():
        value = getattr(raw, name)
        if not isinstance(value, kind):
            raise ViolationError(f"{name} is {value!r}")
    if np.isnan(raw.bound):
        raise ViolationError("bound is nan")


@_promise(inputs.easy)
def feasible(subject: SolverSubject, problem: Problem) -> None:
    """A problem that has a solution is given one that breaks no constraint."""
    answer = subject.answer(problem)
    if answer.objective is None:
        raise ViolationError(f"no vector came back, stopped by {answer.raw.stopped.name}: {answer.raw.message}")


@_promise(inputs.infeasible, "lower_limits")
def infeasible(subject: SolverSubject, problem: Problem) -> None:
    """A problem without a solution is given none, and the reason is that there is none."""
    raw = subject.answer(problem).raw
    if raw.x is not None or raw.stopped is not StopReason.INFEASIBLE:
        raise ViolationError(f"stopped by {raw.stopped.name}, {'no' if raw.x is None else 'a'} vector came back")


@_promise(inputs.to_the_unit)
def budget_to_the_unit(subject: SolverSubject, problem: Problem) -> None:
    """Limits of some million units are kept to the unit, where another choice is one unit more."""
    _expect_right(subject, problem)


@_promise(inputs.easy, "exact")
def cheapest(subject: SolverSubject, problem: Problem) -> None:
    """No assignment costs less, by more than the gap that was asked for."""
    _expect_right(subject, problem)


@_promise(inputs.easy)
def bound(subject: SolverSubject, problem: Problem) -> None:
    """The bound is not above the least cost."""
    _expect_bound(subject.answer(problem), optimum(problem))


@_promise(inputs.easy, "exact")
def proof(subject: SolverSubject, problem: Problem) -> None:
    """The bound proves the gap that was asked for."""
    answer = subject.answer(problem)
    if answer.objective is None:
        raise ViolationError("no vector came back")
    if answer.objective - answer.bound > _GAP * abs(answer.objective) + answer.rounding(answer.objective):
        raise ViolationError(f"the bound is {answer.bound:.9g}, the answer costs {answer.objective:.9g}")


@_promise(inputs.masks)
def masks(subject: SolverSubject, problem: Problem) -> None:
    """Choices that are forbidden are not made."""
    _expect_right(subject, problem)


@_promise(inputs.ties)
def ties(subject: SolverSubject, problem: Problem) -> None:
    """Rows that are tied make one choice."""
    _expect_right(subject, problem)


@_promise(inputs.no_budget)
def no_budget(subject: SolverSubject, problem: Problem) -> None:
    """Without limits each row makes its cheapest choice."""
    _expect_right(subject, problem)


@_promise(inputs.several_budgets, "several_budgets")
def several_budgets(subject: SolverSubject, problem: Problem) -> None:
    """Limits on some of the rows hold beside one on all."""
    _expect_right(subject, problem, may_be_infeasible=True)


@_promise(inputs.lower_limits, "lower_limits")
def lower_limits(subject: SolverSubject, problem: Problem) -> None:
    """Lower limits hold."""
    _expect_right(subject, problem, may_be_infeasible=True)


@_promise(inputs.equal_costs)
def equal_costs(subject: SolverSubject, problem: Problem) -> None:
    """Choices that cost the same, or nothing, do no harm."""
    _expect_right(subject, problem)


@_promise(inputs.negative_costs)
def negative_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs may be negative."""
    _expect_right(subject, problem)


@_promise(inputs.tiny_costs)
def tiny_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs of 1e-12 are as good as others."""
    _expect_right(subject, problem)


@_promise(inputs.huge_costs)
def huge_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs of 1e12 are as good as others."""
    _expect_right(subject, problem)


@_promise(inputs.wide_costs)
def wide_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs may lie nine powers of ten apart."""
    _expect_right(subject, problem)


@_promise(inputs.seeds)
def time_limit(subject: SolverSubject, seed: int) -> None:
    """A time limit is kept, whether an answer is held by then or not."""
    problem = inputs.larger_problem(seed)
    start = time.perf_counter()
    answer = subject.answer(problem, SolveOptions(time_limit=subject.time_limit, rel_gap=0.0))
    seconds = time.perf_counter() - start
    if seconds > subject.time_limit + _OVERRUN:
        raise ViolationError(f"it took {seconds:.1f} s where {subject.time_limit} s were allowed")
    if answer.raw.stopped is StopReason.INFEASIBLE:
        raise ViolationError("the problem has solutions, and was called infeasible")


@_promise(inputs.easy)
def deterministic(subject: SolverSubject, problem: Problem) -> None:
    """The same problem has the same answer the second time."""
    first, second = subject.answer(problem), subject.answer(problem)
    same = first.objective == second.objective and first.bound == second.bound
    x = (first.raw.x, second.raw.x)
    if not same or (x[0] is not None and x[1] is not None and not np.array_equal(x[0], x[1])):
        raise ViolationError(f"the answer costs {first.objective}, and {second.objective} the second time")


@_promise(inputs.easy)
def input_unchanged(subject: SolverSubject, problem: Problem) -> None:
    """The reduced problem is not written to."""
    reduced, untouched = reduce_problem(problem), reduce_problem(problem)
    subject.run(reduced, SolveOptions())
    for name in ("cost", "lower", "upper", "group", "column"):
        if not np.array_equal(getattr(reduced, name), getattr(untouched, name)):
            raise ViolationError(f"{name} is another afterwards")
    for name in ("choose", "use"):
        if not np.array_equal(getattr(reduced, name).toarray(), getattr(untouched, name).toarray()):
            raise ViolationError(f"{name} is another afterwards")


@_promise(inputs.easy)
def start(subject: SolverSubject, problem: Problem) -> None:
    """Started from its own answer, it gives one that costs no more."""
    first = subject.answer(problem)
    second = subject.answer(problem, start=first.raw.x)
    if first.objective is not None and (
        second.objective is None or second.objective > first.objective + first.rounding(first.objective)
    ):
        raise ViolationError(f"the answer costs {first.objective}, and {second.objective} when it starts from there")


@_promise(inputs.easy)
def threads(subject: SolverSubject, problem: Problem) -> None:
    """Two threads may be asked for, after one was."""
    _expect_right(subject, problem)
    _expect_right(subject, problem, SolveOptions(threads=2))


def _expect_right(
    subject: SolverSubject, problem: Problem, options: SolveOptions | None = None, *, may_be_infeasible: bool = False
) -> None:
    """Compare with the best of all assignments; of a solver that is not exact ask only for one that is valid."""
    least, answer = optimum(problem), subject.answer(problem, options)
    if np.isinf(least) and may_be_infeasible:
        if answer.raw.stopped is not StopReason.INFEASIBLE:
            raise ViolationError(f"there is no solution, but it was stopped by {answer.raw.stopped.name}")
        return
    if answer.objective is None:
        raise ViolationError(f"no vector came back, stopped by {answer.raw.stopped.name}: {answer.raw.message}")
    _expect_bound(answer, least)
    if subject.exact and answer.objective > least + _GAP * abs(least) + answer.rounding(least):
        raise ViolationError(f"the answer costs {answer.objective:.9g}, the cheapest {least:.9g}")


def _expect_bound(answer: Answer, least: float) -> None:
    if answer.bound > least + answer.rounding(least):
        raise ViolationError(f"the bound is {answer.bound:.9g}, and an assignment costs {least:.9g}")
