"""Plans within a budget of bits, of bytes, or of error."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import solvers
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.solvers import RawResult, StopReason, registry
from tests.allocation.tables import SHAPES, Everything, tables
from tests.requirements import require_or_skip


@pytest.mark.parametrize("bits", [3.02, 3.3, 4.0, 5.5, 7.0])
def test_a_plan_is_optimal_and_within_its_budget(table, bits):
    plan = lq.allocate(table, bits_per_weight=bits)
    assert plan.bits_per_weight <= Fraction(bits)
    assert plan.storage_bits == sum(plan.formats[n].storage_bits(s) for n, s in SHAPES.items())
    np.testing.assert_allclose(
        plan.objective,
        Everything(table).keep(Everything(table).bits() <= bits * table.weight_count).least_cost,
        rtol=1e-6,
    )
    assert plan.objective == pytest.approx(sum(plan.costs.values()), rel=1e-12)
    assert plan.bound <= plan.objective
    assert plan.gap <= 1e-6
    assert (plan.status, plan.ranks) == ("OPTIMAL", dict.fromkeys(SHAPES, 2))


def test_costs_fall_as_the_budget_rises(table):
    plans = [lq.allocate(table, bits_per_weight=bits) for bits in np.linspace(3.0, 9, 12)]
    costs = [plan.objective for plan in plans]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


def test_a_budget_of_the_cheapest_choice_is_feasible_to_the_bit(table):
    cheapest = int(table.sizes.min(axis=1).sum())
    plan = lq.allocate(table, bits_per_weight=Fraction(cheapest, table.weight_count))
    assert plan.storage_bits == cheapest
    with pytest.raises(InfeasibleBudgetError):
        lq.allocate(table, bits_per_weight=Fraction(cheapest - 1, table.weight_count))


@pytest.mark.parametrize("budget", [{"bits_per_weight": 1.5}, {"total_bytes": 384}, {"total_bytes": 0}])
def test_a_budget_below_the_cheapest_tells_the_feasible_range(table, budget):
    with pytest.raises(InfeasibleBudgetError, match="infeasible") as caught:
        lq.allocate(table, **budget)
    error = caught.value
    assert error.asked == (Fraction(3, 2) if budget.get("total_bytes") != 0 else 0)
    assert error.minimum == Fraction(int(table.sizes.min(axis=1).sum()), table.weight_count)
    assert error.maximum == Fraction(int(table.sizes.max(axis=1).sum()), table.weight_count)


def test_a_budget_above_the_dearest_gives_the_best_plan_and_a_note(table):
    plan = lq.allocate(table, bits_per_weight=100)
    assert plan.objective == pytest.approx(table.costs.min(axis=1).sum(), rel=1e-9)
    assert "above the dearest" in plan.note
    assert lq.allocate(table, bits_per_weight=4.0).note == ""


def test_bytes_are_the_same_budget_as_bits(table):
    total = 900
    plan = lq.allocate(table, total_bytes=total)
    same = lq.allocate(table, bits_per_weight=Fraction(8 * total, table.weight_count))
    assert plan.nbytes <= total
    assert plan == same


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"bits_per_weight": 3.0, "total_bytes": 1000},
        {"bits_per_weight": -1.0},
        {"total_bytes": -1},
        {"bits_per_weight": float("nan")},
        {"bits_per_weight": float("inf")},
        {"bits_per_weight": "three"},
        {"total_bytes": 10.5},
    ],
    ids=str,
)
def test_what_is_no_budget_is_refused(table, budget):
    with pytest.raises(InvalidArgumentError, match="budget"):
        lq.allocate(table, **budget)


@pytest.mark.parametrize("number", [np.float32(4.0), np.float64(4.0), np.int64(4)])
def test_numbers_of_numpy_are_budgets(table, number):
    assert lq.allocate(table, bits_per_weight=number) == lq.allocate(table, bits_per_weight=4)


@given(table=tables(), data=st.data())
def test_any_table_is_allocated_within_any_feasible_budget(table, data):
    everything = Everything(table)
    budget = data.draw(st.integers(int(everything.bits().min()), int(everything.bits().max())))
    plan = lq.allocate(table, bits_per_weight=Fraction(budget, table.weight_count))
    assert plan.storage_bits == plan.counted_bits <= budget
    best = everything.keep(everything.bits() <= budget).least_cost
    np.testing.assert_allclose(plan.objective, best, rtol=1e-6, atol=1e-300)
    assert plan.bound <= best


@pytest.mark.parametrize("bits", [3.1, 4.4])
def test_plans_of_both_solvers_agree_within_the_gap(table, bits):
    for name in ("highs", "scipy"):
        require_or_skip(name, solvers.available()[name])
    first, second = (lq.allocate(table, bits_per_weight=bits, solver=name) for name in ("highs", "scipy"))
    np.testing.assert_allclose(first.objective, second.objective, rtol=2.1e-6)
    assert first.solver.startswith("highs ")
    assert second.solver.startswith("scipy ")


class _Stopped:
    """A solver that its time limit stopped."""

    REQUIRES = "numpy"

    def __init__(self, *, incumbent: bool):
        self._incumbent = incumbent

    def version(self) -> str:
        return "1"

    def solve(self, reduced, _) -> RawResult:
        x = np.zeros(len(reduced.cost))
        use = reduced.use.toarray()[0]
        for group in np.unique(reduced.group):
            members = np.flatnonzero(reduced.group == group)
            x[members[np.argmin(use[members])]] = 1  # the smallest choices are always feasible
        return RawResult(x if self._incumbent else None, -np.inf, "time limit", StopReason.TIME_LIMIT)


@pytest.fixture
def stopped(monkeypatch):
    monkeypatch.setattr(registry, "ADAPTERS", dict(registry.ADAPTERS))

    def add(*, incumbent: bool) -> str:
        solvers.register("stopped", _Stopped(incumbent=incumbent))
        return "stopped"

    return add


def test_a_time_limit_without_a_plan_is_an_error_that_says_what_to_do(table, stopped):
    with pytest.raises(SolverError, match="allow more time"):
        lq.allocate(table, bits_per_weight=4.0, solver=stopped(incumbent=False), time_limit=1.0)


def test_a_plan_without_a_bound_says_so_and_is_still_standard_json(table, stopped):
    plan = lq.allocate(table, bits_per_weight=4.0, solver=stopped(incumbent=True), time_limit=1.0)
    assert (plan.status, plan.gap) == ("FEASIBLE", math.inf)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(plan.to_json(), parse_constant=refuse)
    assert lq.Plan.from_json(plan.to_json()) == plan
