"""Pareto frontiers: plans for several budgets."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.solvers import RawResult, StopReason, registry
from tests.allocation.tables import Everything, tables


@given(table=tables(), data=st.data())
def test_every_plan_is_the_best_of_its_budget_and_errors_never_rise(table, data):
    everything = Everything(table)
    bits = st.integers(int(everything.bits().min()), int(everything.bits().max()))
    budgets = data.draw(st.lists(bits, min_size=1, max_size=5))
    plans = lq.pareto(table, [Fraction(budget, table.weight_count) for budget in budgets])
    for budget, plan in zip(budgets, plans, strict=True):
        assert plan.counted_bits <= budget
        best = everything.costs[everything.bits() <= budget].min()
        np.testing.assert_allclose(plan.objective, best, rtol=1e-6, atol=1e-300)
    for (before, smaller), (after, larger) in itertools.combinations(zip(budgets, plans, strict=True), 2):
        if before != after:
            low, high = (smaller, larger) if before < after else (larger, smaller)
            assert high.objective <= low.objective
        else:
            assert smaller == larger


def test_plans_come_in_the_order_of_the_budgets_and_the_same_every_time(table):
    budgets = [5.5, 3.1, 4.4, 3.1]
    plans = lq.pareto(table, budgets)
    assert all(plan.bits_per_weight <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert plans[0].objective < plans[2].objective < plans[1].objective
    assert plans[1] == plans[3]
    assert lq.pareto(table, budgets) == plans
    assert [lq.pareto(table, [budgets[i] for i in order])[0] for order in ((1, 0), (2, 1, 0))] == [plans[1], plans[2]]
    assert lq.pareto(table, []) == []


def test_options_are_those_of_allocate(table):
    options = {
        "limits": [lq.Limit("layers.1.*", bits_per_weight=6, at_least=True)],
        "ties": ["*.q"],
        "minimum_bits": {"*.up": 3.5},
        "count_factors": True,
        "solver": "scipy",
    }
    for budget, plan in zip((9.0, 10.0), lq.pareto(table, (9.0, 10.0), **options), strict=True):
        assert plan.objective == pytest.approx(lq.allocate(table, bits_per_weight=budget, **options).objective)
        assert plan.formats["layers.0.q"] == plan.formats["layers.1.q"]
        assert plan.counts_factors
    with pytest.raises(InvalidArgumentError, match=r"^ties "):
        lq.pareto(table, [4], ties=["*.k"])


def test_a_budget_that_does_not_bind_has_a_note(table):
    assert ["does not bind" in plan.note for plan in lq.pareto(table, [100, 4])] == [True, False]


def test_one_budget_that_cannot_be_met_is_refused(table):
    with pytest.raises(InfeasibleBudgetError, match=r"at most 1 for all matrices"):
        lq.pareto(table, [4, 1, 5])


class _GivesUp:
    """Solver that records the given start and returns no assignment."""

    REQUIRES = "numpy"

    def __init__(self):
        self.starts = []

    def version(self) -> str:
        return "1"

    def solve(self, reduced, _) -> RawResult:
        self.starts.append(reduced.start)
        return RawResult(None, -np.inf, "gave up", StopReason.TIME_LIMIT)


@pytest.fixture
def gives_up(monkeypatch) -> _GivesUp:
    adapter = _GivesUp()
    monkeypatch.setitem(registry.ADAPTERS, "gives up", adapter)
    return adapter


def test_a_search_that_gives_up_starts_from_the_plan_of_the_smaller_budget_and_never_ends_above_it(table, gives_up):
    budgets = [3.1, 3.4, 3.8, 4.4]
    plans = lq.pareto(table, budgets, solver="gives up")
    assert [plan.objective for plan in plans] == sorted((plan.objective for plan in plans), reverse=True)
    assert "FEASIBLE" in {plan.status for plan in plans}
    assert all(start is not None for start in gives_up.starts)


def test_optimal_plans_may_be_required_of_every_budget(table, gives_up):
    with pytest.raises(SolverError, match="relative gap"):
        lq.pareto(table, [3.1, 3.4], solver="gives up", require_optimal=True)
