"""Properties of solvers. The docstring of each check is its statement in reports."""

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

_GAP = SolveOptions().rel_gap


@_promise(inputs.nothing)
def version(subject: SolverSubject) -> None:
    """The call version() returns a string that is not empty."""
    found = subject.version()
    if not isinstance(found, str) or not found:
        raise ViolationError(f"version() returned {found!r}")


@_promise(inputs.easy)
def result(subject: SolverSubject, problem: Problem) -> None:
    """The call solve() returns a RawResult: a vector or None, a float, a string and a StopReason."""
    raw = cast("object", subject.run(reduce_problem(problem), SolveOptions()))
    if not isinstance(raw, RawResult):
        raise ViolationError(f"solve() returned a {type(raw).__name__}")
    types = {"bound": float | np.floating, "message": str, "stopped": StopReason}
    for name, kind in types.items():
        value = getattr(raw, name)
        if not isinstance(value, kind):
            raise ViolationError(f"{name} is {value!r}")
    if np.isnan(raw.bound):
        raise ViolationError("bound is nan")


@_promise(inputs.easy)
def feasible(subject: SolverSubject, problem: Problem) -> None:
    """A feasible problem gets an assignment that meets every constraint."""
    answer = subject.answer(problem)
    if answer.objective is None:
        raise ViolationError(f"no vector, stopped with {answer.raw.stopped.name}: {answer.raw.message}")


@_promise(inputs.infeasible, "lower_limits")
def infeasible(subject: SolverSubject, problem: Problem) -> None:
    """An infeasible problem gets no vector, and the solver stops with INFEASIBLE."""
    raw = subject.answer(problem).raw
    if raw.x is not None or raw.stopped is not StopReason.INFEASIBLE:
        raise ViolationError(f"it stopped with {raw.stopped.name} and {'no' if raw.x is None else 'a'} vector")


@_promise(inputs.to_the_unit)
def budget_to_the_unit(subject: SolverSubject, problem: Problem) -> None:
    """Limits of some million units are met to the unit."""
    _expect_right(subject, problem)


@_promise(inputs.easy, "exact")
def cheapest(subject: SolverSubject, problem: Problem) -> None:
    """No assignment is cheaper by more than the requested gap."""
    _expect_right(subject, problem)


@_promise(inputs.easy)
def bound(subject: SolverSubject, problem: Problem) -> None:
    """The bound does not exceed the least cost."""
    _expect_bound(subject.answer(problem), optimum(problem))


@_promise(inputs.easy, "exact")
def proof(subject: SolverSubject, problem: Problem) -> None:
    """The bound proves the requested gap."""
    answer = subject.answer(problem)
    if answer.objective is None:
        raise ViolationError("solve() returned no vector")
    if answer.objective - answer.bound > _GAP * abs(answer.objective) + answer.rounding(answer.objective):
        raise ViolationError(f"the bound {answer.bound:.9g} leaves a larger gap to the cost {answer.objective:.9g}")


@_promise(inputs.masks)
def masks(subject: SolverSubject, problem: Problem) -> None:
    """Forbidden choices are never made."""
    _expect_right(subject, problem)


@_promise(inputs.ties)
def ties(subject: SolverSubject, problem: Problem) -> None:
    """Tied rows make the same choice."""
    _expect_right(subject, problem)


@_promise(inputs.no_budget)
def no_budget(subject: SolverSubject, problem: Problem) -> None:
    """Without budgets each row makes its cheapest choice."""
    _expect_right(subject, problem)


@_promise(inputs.several_budgets, "several_budgets")
def several_budgets(subject: SolverSubject, problem: Problem) -> None:
    """Budgets on some rows and a budget on all rows are met together."""
    _expect_right(subject, problem, may_be_infeasible=True)


@_promise(inputs.lower_limits, "lower_limits")
def lower_limits(subject: SolverSubject, problem: Problem) -> None:
    """Lower limits are met."""
    _expect_right(subject, problem, may_be_infeasible=True)


@_promise(inputs.equal_costs)
def equal_costs(subject: SolverSubject, problem: Problem) -> None:
    """Equal costs and costs of zero are solved like others."""
    _expect_right(subject, problem)


@_promise(inputs.negative_costs)
def negative_costs(subject: SolverSubject, problem: Problem) -> None:
    """Negative costs are solved like others."""
    _expect_right(subject, problem)


@_promise(inputs.tiny_costs)
def tiny_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs of 1e-12 are solved like others."""
    _expect_right(subject, problem)


@_promise(inputs.huge_costs)
def huge_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs of 1e12 are solved like others."""
    _expect_right(subject, problem)


@_promise(inputs.wide_costs)
def wide_costs(subject: SolverSubject, problem: Problem) -> None:
    """Costs that span nine powers of ten are solved like others."""
    _expect_right(subject, problem)


@_promise(inputs.seeds)
def time_limit(subject: SolverSubject, seed: int) -> None:
    """The solver keeps its time limit, with or without an answer."""
    problem = inputs.larger_problem(seed)
    start = time.perf_counter()
    # A gap of zero keeps the solver from ending early with an answer that is good enough.
    answer = subject.answer(problem, SolveOptions(time_limit=subject.time_limit, rel_gap=0.0))
    seconds = time.perf_counter() - start
    if seconds > subject.time_limit + subject.overrun:
        raise ViolationError(f"it took {seconds:.1f} s with a time limit of {subject.time_limit} s")
    if answer.raw.stopped is StopReason.INFEASIBLE:
        raise ViolationError("it reported a feasible problem as infeasible")


@_promise(inputs.easy)
def deterministic(subject: SolverSubject, problem: Problem) -> None:
    """Solving the same problem twice gives the same answer."""
    first, second = subject.answer(problem), subject.answer(problem)
    same = first.objective == second.objective and first.bound == second.bound
    x = (first.raw.x, second.raw.x)
    if not same or (x[0] is not None and x[1] is not None and not np.array_equal(x[0], x[1])):
        answers = [f"cost {answer.objective}, bound {answer.bound}" for answer in (first, second)]
        raise ViolationError(f"the first answer has {answers[0]}, the second {answers[1]}")


@_promise(inputs.easy)
def input_unchanged(subject: SolverSubject, problem: Problem) -> None:
    """The adapter does not modify the reduced problem."""
    reduced, untouched = reduce_problem(problem), reduce_problem(problem)
    subject.run(reduced, SolveOptions())
    for name in ("cost", "lower", "upper", "group", "column"):
        if not np.array_equal(getattr(reduced, name), getattr(untouched, name)):
            raise ViolationError(f"{name} differs after the call")
    for name in ("choose", "use"):
        if not np.array_equal(getattr(reduced, name).toarray(), getattr(untouched, name).toarray()):
            raise ViolationError(f"{name} differs after the call")


@_promise(inputs.easy)
def start(subject: SolverSubject, problem: Problem) -> None:
    """Started from its own answer, the solver returns one that costs no more."""
    first = subject.answer(problem)
    second = subject.answer(problem, start=first.raw.x)
    if first.objective is not None and (
        second.objective is None or second.objective > first.objective + first.rounding(first.objective)
    ):
        raise ViolationError(f"the answer costs {first.objective}, and {second.objective} when started from it")


@_promise(inputs.easy)
def threads(subject: SolverSubject, problem: Problem) -> None:
    """The solver accepts two threads after a solve with one."""
    _expect_right(subject, problem)
    _expect_right(subject, problem, SolveOptions(threads=2))


def _expect_right(
    subject: SolverSubject, problem: Problem, options: SolveOptions | None = None, *, may_be_infeasible: bool = False
) -> None:
    """Compare with the optimum. A solver that is not exact only needs a feasible assignment and a valid bound."""
    least, answer = optimum(problem), subject.answer(problem, options)
    if np.isinf(least) and may_be_infeasible:
        if answer.raw.stopped is not StopReason.INFEASIBLE:
            raise ViolationError(f"the problem is infeasible, but it stopped with {answer.raw.stopped.name}")
        return
    if answer.objective is None:
        raise ViolationError(f"no vector, stopped with {answer.raw.stopped.name}: {answer.raw.message}")
    _expect_bound(answer, least)
    if subject.exact and answer.objective > least + _GAP * abs(least) + answer.rounding(least):
        raise ViolationError(f"the answer costs {answer.objective:.9g}, the optimum {least:.9g}")


def _expect_bound(answer: Answer, least: float) -> None:
    if answer.bound > least + answer.rounding(least):
        raise ViolationError(f"the bound {answer.bound:.9g} exceeds the least cost {least:.9g}")
