"""Plans within a budget of bits, bytes or error."""

from __future__ import annotations

import dataclasses
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
from tests.allocation.tables import Everything, tables
from tests.costs.cases import FORMATS, NF2, NF4, NF8, SHAPES, make_table
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


def test_a_budget_of_the_smallest_choice_is_feasible_to_the_bit(table):
    smallest = int(table.sizes.min(axis=1).sum())
    plan = lq.allocate(table, bits_per_weight=Fraction(smallest, table.weight_count))
    assert plan.storage_bits == smallest
    with pytest.raises(InfeasibleBudgetError):
        lq.allocate(table, bits_per_weight=Fraction(smallest - 1, table.weight_count))


@pytest.mark.parametrize("budget", [{"bits_per_weight": 1.5}, {"total_bytes": 384}, {"total_bytes": 0}])
def test_a_budget_below_the_smallest_choice_tells_the_feasible_range(table, budget):
    with pytest.raises(InfeasibleBudgetError, match="infeasible") as caught:
        lq.allocate(table, **budget)
    error = caught.value
    assert error.asked == (Fraction(3, 2) if budget.get("total_bytes") != 0 else 0)
    assert error.minimum == Fraction(int(table.sizes.min(axis=1).sum()), table.weight_count)
    assert error.maximum == Fraction(int(table.sizes.max(axis=1).sum()), table.weight_count)


def test_a_budget_that_does_not_bind_gives_the_best_plan_and_a_note(table):
    plan = lq.allocate(table, bits_per_weight=100)
    assert plan.objective == pytest.approx(table.costs.min(axis=1).sum(), rel=1e-9)
    assert "does not bind" in plan.note
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
    with pytest.raises(InvalidArgumentError, match=r"^(bits_per_weight|total_bytes)"):
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
    """Solver that returns no assignment, as if its time limit had stopped it."""

    REQUIRES = "numpy"

    def version(self) -> str:
        return "1"

    def solve(self, *_) -> RawResult:
        return RawResult(None, -np.inf, "time limit", StopReason.TIME_LIMIT)


@pytest.fixture
def stopped(monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, "stopped", _Stopped())
    return "stopped"


def test_a_time_limit_without_an_answer_still_gives_a_plan_within_the_budget(table, stopped):
    plan = lq.allocate(table, bits_per_weight=4.0, solver=stopped, time_limit=1.0)
    assert plan.status in {"FEASIBLE", "OPTIMAL"}
    assert plan.bits_per_weight <= 4


def test_a_plan_without_a_bound_says_so_and_is_still_standard_json(table):
    plan = dataclasses.replace(lq.allocate(table, bits_per_weight=4.0), bound=-math.inf)
    assert plan.gap == math.inf

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(plan.to_json(), parse_constant=refuse)
    assert lq.Plan.from_json(plan.to_json()) == plan


def test_of_plans_that_stop_early_only_an_optimal_one_may_be_required(table, stopped):
    assert lq.allocate(table, bits_per_weight=3.4, solver=stopped).status == "FEASIBLE"
    with pytest.raises(SolverError, match=r"relative gap"):
        lq.allocate(table, bits_per_weight=3.4, solver=stopped, require_optimal=True)
    assert lq.allocate(table, bits_per_weight=4.0, require_optimal=True).status == "OPTIMAL"


class TestErrors:
    @given(table=tables(), data=st.data())
    def test_a_plan_takes_the_fewest_bits_that_keep_the_error(self, table, data):
        everything = Everything(table)
        cost = data.draw(st.sampled_from(sorted(set(everything.costs.tolist()))))
        limit = data.draw(st.sampled_from([cost, math.nextafter(cost, math.inf), 1.5 * cost]))
        plan = lq.allocate(table, max_error=limit)
        assert plan.error <= limit
        assert plan.objective == plan.counted_bits == everything.keep(everything.costs <= limit).fewest_bits
        assert plan.bound <= plan.objective
        assert (plan.goal, plan.status) == ("bits", "OPTIMAL")

    @given(table=tables(), data=st.data())
    def test_the_error_of_a_plan_is_had_for_its_budget(self, table, data):
        everything = Everything(table)
        budget = data.draw(st.integers(int(everything.bits().min()), int(everything.bits().max())))
        plan = lq.allocate(table, bits_per_weight=Fraction(budget, table.weight_count))
        assert lq.allocate(table, max_error=plan.error).counted_bits <= budget

    @given(table=tables())
    def test_an_error_below_the_least_is_refused_with_the_range(self, table):
        everything = Everything(table)
        assert lq.allocate(table, max_error=everything.least_cost).error == everything.least_cost
        if everything.least_cost > 0:
            with pytest.raises(InfeasibleBudgetError, match=r"^max_error .* the least") as caught:
                lq.allocate(table, max_error=math.nextafter(everything.least_cost, 0.0))
            assert (float(caught.value.minimum), float(caught.value.maximum)) == (
                everything.least_cost,
                everything.costs.max(),
            )

    def test_errors_that_units_cannot_tell_apart_are_still_told_apart(self):
        costs = [[1.0, 1.0 + 2.0**-52, 3.0], [1e-30, 1e-30, 1e-30]]
        table = make_table([(8, 8), (8, 8)], [lq.Configuration(fmt, 0) for fmt in (NF8, NF4, NF2)], costs)
        assert lq.allocate(table, max_error=1.0).formats["m0"] == NF8
        assert lq.allocate(table, max_error=1.0 + 2.0**-52).formats["m0"] == NF4

    def test_beside_an_error_that_is_just_too_large_the_next_smaller_plan_is_found(self):
        table = make_table([(8, 8)], [lq.Configuration(fmt, 0) for fmt in (NF8, NF4, NF2)], [[0.0, 1.0, 2.0]])
        plan = lq.allocate(table, max_error=math.nextafter(2.0, 0.0))
        assert plan.formats["m0"] == NF4
        # In the integer units of the solver NF2 might be valid, so the proven bound is not above its bits.
        assert (plan.status, plan.bound) == ("FEASIBLE", NF2.storage_bits((8, 8)))

    @pytest.mark.parametrize("scale", [1e-300, 5e-324, 1e300])
    def test_errors_of_any_magnitude_are_limits(self, scale):
        table = make_table([(8, 8)], [lq.Configuration(fmt, 0) for fmt in (NF8, NF2)], [[scale, 3 * scale]])
        assert lq.allocate(table, max_error=scale).formats["m0"] == NF8
        assert lq.allocate(table, max_error=3 * scale).formats["m0"] == NF2

    @pytest.mark.parametrize("number", [-1.0, math.nan, math.inf, "small", None])
    def test_what_is_no_error_is_refused(self, table, number):
        with pytest.raises(InvalidArgumentError, match=r"max_error"):
            lq.allocate(table, max_error=number)

    def test_a_search_that_finds_nothing_in_time_still_keeps_the_error(self, table, stopped):
        assert lq.allocate(table, max_error=1e9, solver=stopped).error <= 1e9


class TestRanks:
    RANKS = (0, 1, 3)

    @given(table=tables(ranks=RANKS, formats=FORMATS[1:4], max_rows=3), data=st.data())
    def test_several_ranks_count_with_their_factors(self, table, data):
        everything = Everything(table, counts_factors=True)
        budget = data.draw(st.integers(int(everything.bits().min()), int(everything.bits().max())))
        plan = lq.allocate(table, bits_per_weight=Fraction(budget, table.weight_count))
        assert plan.counts_factors
        assert plan.counted_bits == plan.storage_bits + sum(plan.factor_bits.values()) <= budget
        best = everything.keep(everything.bits() <= budget).least_cost
        np.testing.assert_allclose(plan.objective, best, rtol=1e-6, atol=1e-300)

    @given(table=tables(ranks=RANKS, formats=FORMATS[1:4], max_rows=3), data=st.data())
    def test_choosing_ranks_is_never_worse_than_any_one_of_them(self, table, data):
        rank = data.draw(st.sampled_from(self.RANKS))
        columns = [j for j, own in enumerate(table.configurations) if own.rank == rank]
        one = dataclasses.replace(
            table,
            configurations=tuple(table.configurations[j] for j in columns),
            **{name: getattr(table, name)[:, columns] for name in ("costs", "sizes", "factor_sizes")},
        )
        low, high = (int(f(one.sizes + one.factor_sizes, axis=1).sum()) for f in (np.min, np.max))
        budget = {"total_bytes": data.draw(st.integers(-(-low // 8), -(-high // 8)))}
        joint, fixed = lq.allocate(table, **budget), lq.allocate(one, **budget, count_factors=True)
        assert joint.objective <= fixed.objective * (1 + 1e-6)
        assert max(joint.counted_bits, fixed.counted_bits) <= 8 * budget["total_bytes"]

    def test_factors_of_a_single_rank_count_only_if_asked(self, table):
        smallest = int(table.sizes.min(axis=1).sum())
        with_factors = smallest + int(table.factor_sizes[:, 0].sum())
        plan = lq.allocate(table, total_bytes=smallest // 8)
        assert (plan.counts_factors, plan.counted_bits) == (False, smallest)
        assert sum(plan.factor_bits.values()) == with_factors - smallest
        plan = lq.allocate(table, total_bytes=with_factors // 8, count_factors=True)
        assert (plan.counts_factors, plan.counted_bits) == (True, with_factors)
        with pytest.raises(InfeasibleBudgetError):
            lq.allocate(table, total_bytes=with_factors // 8 - 1, count_factors=True)

    def test_ranks_cost_nothing_if_their_factors_do_not_count(self):
        configurations = [lq.Configuration(NF4, rank) for rank in (0, 8)]
        table = make_table([(16, 16)], configurations, [[2.0, 1.0]])
        free = lq.allocate(table, bits_per_weight=table.sizes[0, 0] / 256, count_factors=False)
        assert (free.ranks, free.counts_factors) == ({"m0": 8}, False)


@given(table=tables(ranks=(0, 2), formats=FORMATS[2:5], max_rows=3), data=st.data())
def test_the_order_of_matrices_and_configurations_does_not_change_the_objective(table, data):
    rows = data.draw(st.permutations(range(len(table.names))))
    columns = data.draw(st.permutations(range(len(table.configurations))))
    other = lq.CostTable(
        tuple(table.names[i] for i in rows),
        tuple(table.shapes[i] for i in rows),
        tuple(table.configurations[j] for j in columns),
        *(getattr(table, name)[np.ix_(rows, columns)] for name in ("costs", "sizes", "factor_sizes")),
    )
    everything = Everything(table, counts_factors=True)
    budget = Fraction(data.draw(st.integers(int(everything.bits().min()), 4000)), table.weight_count)
    first, second = (lq.allocate(one, bits_per_weight=budget) for one in (table, other))
    np.testing.assert_allclose(first.objective, second.objective, rtol=2e-6, atol=1e-300)
    error = max(first.error, second.error)
    assert lq.allocate(table, max_error=error).objective == lq.allocate(other, max_error=error).objective
