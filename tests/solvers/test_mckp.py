"""The knapsack solver mckp: optima equal dynamic programming, bounds hold under any limit, the rest is handed over."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora.errors import InvalidArgumentError
from lqlora.solvers import (
    Budget,
    Problem,
    SolveOptions,
    Status,
    StopReason,
    evaluate,
    reduce_problem,
    registry,
    solve,
)
from lqlora.solvers.mckp import solver as mckp
from lqlora.solvers.mckp.beam import Effort
from tests.solvers.oracle import check_against_brute_force, dynamic_program

EXACT = SolveOptions(rel_gap=0.0)


def _problem(seed: int, rows: int = 14, columns: int = 9, scale: float = 1.0) -> Problem:
    """Return a problem with small sizes, for a small table over capacities; odd seeds have strongly correlated costs."""
    rng = np.random.default_rng(seed)
    size = rng.integers(0, 60, (rows, columns))
    noise = rng.uniform(0.9, 1.1, (rows, columns)) if seed % 2 else rng.lognormal(0, 1, (rows, columns))
    cost = scale * (70 - size) * noise
    low, high = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    return Problem(cost, size, budgets=[Budget(upper=int(low + rng.uniform(0, 0.9) * (high - low)))])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_optimum_is_that_of_dynamic_programming(scale):
    for seed in range(30):
        problem = _problem(seed, scale=scale)
        found = solve(problem, "mckp", EXACT)
        assert (found.solver, found.status, found.stopped) == ("mckp", Status.OPTIMAL, StopReason.GAP)
        np.testing.assert_allclose(found.objective, dynamic_program(problem), rtol=1e-12)


@pytest.mark.parametrize(
    "effort",
    [Effort(widths=()), Effort(widths=(1, 2)), Effort(work=0), Effort(states=30), Effort(items=0)],
    ids=["no search", "two states", "no work", "few states", "no items"],
)
def test_bounds_hold_and_answers_are_feasible_under_any_limit_of_effort(effort):
    unproven = 0
    for seed in range(30):
        problem = _problem(seed)
        optimum = dynamic_program(problem)
        reduced = reduce_problem(problem)
        raw = mckp.solve(reduced, EXACT, effort)
        objective, _, faults = evaluate(problem, reduced.assignment(raw.x))
        assert faults == []
        assert raw.bound * reduced.unit <= optimum * (1 + 1e-14)
        assert objective >= optimum * (1 - 1e-14)
        if raw.stopped is not StopReason.GAP:
            unproven += 1
            assert raw.stopped is StopReason.LIMIT
    assert unproven > 0


def test_more_effort_raises_the_bound():
    reduced = reduce_problem(_problem(7, rows=40))
    bounds = [mckp.solve(reduced, EXACT, Effort(widths=widths)).bound for widths in ((), (3,), (3, 30))]
    assert bounds[0] < bounds[1] < bounds[2]


class WithoutSearch:
    """mckp without its search, which leaves a gap in most problems."""

    REQUIRES = mckp.REQUIRES
    version = staticmethod(mckp.version)

    def solve(self, reduced, options):
        return mckp.solve(reduced, options, Effort(widths=()))


def test_a_gap_that_mckp_leaves_is_closed_by_another_solver_which_is_named(monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, "mckp", WithoutSearch())
    both = f"mckp+{registry.finisher()}"
    for seed in range(8):
        problem = _problem(seed)
        found = solve(problem, options=EXACT)
        assert found.status is Status.OPTIMAL
        assert found.solver in {"mckp", both}
        np.testing.assert_allclose(found.objective, dynamic_program(problem), rtol=1e-12)
    assert found.solver == both
    assert found.version.startswith("1+")


def test_without_another_solver_the_gap_stays_open(monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, "mckp", WithoutSearch())
    monkeypatch.setattr(registry, "is_installed", lambda module: module == "numpy")
    found = solve(_problem(7), options=EXACT)
    assert (found.solver, found.status, found.stopped) == ("mckp", Status.FEASIBLE, StopReason.LIMIT)


@pytest.mark.parametrize(
    "budgets",
    [
        [Budget(upper=60), Budget(upper=20, members=np.array([True, True, False, False]))],
        [Budget(upper=70, lower=50)],
    ],
    ids=["nested", "lower"],
)
def test_overlapping_budgets_and_lower_limits_go_to_another_solver_which_is_named(budgets):
    problem = _problem(1, rows=4, columns=5)
    problem = Problem(problem.cost, problem.size, budgets=budgets)
    for solver in ("auto", "mckp"):
        found = solve(problem, solver)
        assert found.solver in registry.FINISHERS
        check_against_brute_force(problem, found)
    with pytest.raises(InvalidArgumentError, match=r"budgets.*overlap"):
        mckp.solve(reduce_problem(problem), SolveOptions())


def test_budgets_that_do_not_overlap_are_solved_one_by_one():
    one, other = _problem(2), _problem(4)
    members = np.arange(28) < 14
    budgets = [
        Budget(upper=one.budgets[0].upper, members=members),
        Budget(upper=other.budgets[0].upper, members=~members),
    ]
    both = Problem(np.vstack([one.cost, other.cost]), np.vstack([one.size, other.size]), budgets=budgets)
    found = solve(both, options=EXACT)
    assert found.solver == "mckp"
    np.testing.assert_allclose(found.objective, dynamic_program(one) + dynamic_program(other), rtol=1e-12)


def test_rows_without_a_budget_take_their_cheapest_choice():
    problem = _problem(3)
    members = np.arange(14) < 10
    found = solve(Problem(problem.cost, problem.size, budgets=[Budget(upper=150, members=members)]), options=EXACT)
    assert found.solver == "mckp"
    np.testing.assert_array_equal(found.assignment[10:], problem.cost[10:].argmin(axis=1))


def test_tied_rows_that_a_budget_counts_in_part_are_a_knapsack():
    # The presolve sorts choices by their size under the budget that counts them in full, which does not bind here.
    rng = np.random.default_rng(5)
    cost, size, ties = rng.lognormal(size=(6, 5)), rng.integers(0, 30, (6, 5)), np.array([0, 0, 1, 1, 2, 2])
    budgets = [Budget(upper=1000), Budget(upper=25, members=ties != np.arange(6) / 2)]
    problem = Problem(cost, size, ties=ties, budgets=budgets)
    found = solve(problem, "mckp")
    assert found.solver == "mckp"
    check_against_brute_force(problem, found)


@pytest.mark.parametrize(
    ("cost", "size", "upper"),
    [
        ([[0.0, 0.0]] * 3, [[1, 2]] * 3, 4),
        ([[5.0]], [[7]], 7),
        ([[2.0, 1.0]] * 4, [[0, 0]] * 4, 0),
        ([[1.0, 1.0], [1.0, 1.0]], [[3, 2], [1, 4]], 3),
        ([[-3.0, -5.0], [-1.0, 2.0]], [[1, 3], [2, 1]], 4),
        ([[1.0, 0.0], [-1.0, 0.0]], [[1, 3], [2, 1]], 4),
        ([[1e300, 1.0], [1e300, 2.0]], [[1, 3], [1, 4]], 5),
        ([[1.0, 1e-300], [3e-310, 2e-310], [3e-310, 1e-310]], [[1, 3], [1, 4], [1, 4]], 8),
        ([[1e12 + 1, 1e12], [1e12 + 3, 1e12]], [[1, 3], [1, 4]], 5),
    ],
    ids=[
        "zero costs",
        "one choice",
        "zero sizes",
        "equal costs",
        "negative",
        "objective 0",
        "huge",
        "tiny",
        "large offset",
    ],
)
def test_extreme_costs_and_sizes_equal_brute_force(cost, size, upper):
    problem = Problem(cost, size, budgets=[Budget(upper=upper)])
    check_against_brute_force(problem, solve(problem, "mckp", EXACT))


def test_a_budget_one_bit_short_of_a_choice_never_gets_it():
    # All sizes share a factor of 2**40, and the budgets are a bit off its multiples.
    unit = 2**40
    size = np.array([[1, 2, 4], [1, 3, 6]]) * unit
    cost = [[9.0, 5.0, 1.0], [9.0, 4.0, 0.0]]
    for upper, objective in [(2 * unit, 18.0), (3 * unit - 1, 18.0), (3 * unit, 14.0), (7 * unit - 1, 5.0 + 4.0)]:
        found = solve(Problem(cost, size, budgets=[Budget(upper=upper)]), "mckp", EXACT)
        assert (found.objective, found.used[0] <= upper) == (objective, True)


def test_a_time_limit_of_a_nanosecond_gives_a_feasible_assignment():
    problem = _problem(7, rows=40)
    reduced = reduce_problem(problem)
    raw = mckp.solve(reduced, SolveOptions(time_limit=1e-9, rel_gap=0.0))
    assert raw.stopped is StopReason.TIME_LIMIT
    objective, _, faults = evaluate(problem, reduced.assignment(raw.x))
    assert faults == []
    assert 0 < raw.bound * reduced.unit < objective < 1.1 * raw.bound * reduced.unit


def test_the_answer_does_not_depend_on_the_order_of_the_rows():
    problem = _problem(9)
    order = np.random.default_rng(0).permutation(14)
    turned = Problem(problem.cost[order], problem.size[order], budgets=problem.budgets)
    np.testing.assert_allclose(
        solve(turned, options=EXACT).objective, solve(problem, options=EXACT).objective, rtol=1e-14
    )
