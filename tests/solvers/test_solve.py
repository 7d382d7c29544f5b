"""Every installed solver against brute force, against each other, and against the traps that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import _optional, solvers
from lqlora.errors import InvalidArgumentError, MissingDependencyError, SolverError
from lqlora.solvers import Budget, Problem, RawResult, SolveOptions, Status, StopReason, evaluate, registry, solve
from tests.requirements import require_or_skip

SOLVERS = ("highs", "scipy")
SMALL = Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)])


@pytest.fixture(params=SOLVERS)
def solver(request) -> str:
    require_or_skip(request.param, solvers.available()[request.param])
    return request.param


@st.composite
def tiny_problems(draw) -> Problem:
    """Instances that brute force can solve: masks, ties, several budgets, lower limits, equal costs."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape, count = (rows, columns), rows * columns
    costs = st.sampled_from([0.0, 0.5, 1.0, 1.25, 4.0, 100.0])
    cost = np.array(draw(st.lists(costs, min_size=count, max_size=count))).reshape(shape)
    size = np.array(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))).reshape(shape) * 16
    allowed = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(shape)
    allowed[~allowed.any(axis=1)] = True
    ties = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    return Problem(cost, size, allowed, ties, draw(_budgets(rows, int(size.max()) * rows)))


@st.composite
def _budgets(draw, rows: int, most: int) -> list[Budget]:
    budgets = []
    for _ in range(draw(st.integers(0, 3))):
        lower = draw(st.none() | st.integers(0, most // 2))
        members = draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows).map(np.array))
        budgets.append(Budget(upper=draw(st.integers(lower or 0, most)), lower=lower, members=members))
    return budgets


def _optimum(problem: Problem) -> float:
    """Best objective by trying everything, infinite if nothing is feasible."""
    rows, columns = problem.cost.shape
    tried = (evaluate(problem, np.array(choice)) for choice in itertools.product(range(columns), repeat=rows))
    return min((objective for objective, _, faults in tried if not faults), default=np.inf)


def _random_problem(seed: int, rows: int, columns: int, share: float) -> Problem:
    """Costs that fall with size, as errors of formats do; a budget between the extremes."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.uniform(2, 8, columns))
    weights = rng.integers(1, 9, (rows, 1)) * 4096
    size = (weights * bits).astype(np.int64) // 8 * 8
    cost = rng.lognormal(sigma=1.5, size=(rows, 1)) * 4.0**-bits * rng.uniform(0.8, 1.25, (rows, columns))
    low, high = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    return Problem(cost, size, budgets=[Budget(upper=low + int(share * (high - low)))])


@settings(max_examples=60, deadline=None)
@given(problem=tiny_problems())
@pytest.mark.parametrize("name", SOLVERS)
def test_the_optimum_is_that_of_brute_force(name, problem):
    require_or_skip(name, solvers.available()[name])
    expected = _optimum(problem)
    found = solve(problem, name)
    if np.isinf(expected):
        assert found.status is Status.INFEASIBLE
        assert found.assignment is None
        assert found.objective == np.inf
    else:
        assert found.status is Status.OPTIMAL
        assert evaluate(problem, found.assignment) == (found.objective, found.used, [])
        np.testing.assert_allclose(found.objective, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_solvers_agree_within_the_gap(seed, share):
    for name in SOLVERS:
        require_or_skip(name, solvers.available()[name])
    problem = _random_problem(seed, 60, 24, share)
    first, second = (solve(problem, name) for name in SOLVERS)
    np.testing.assert_allclose(first.objective, second.objective, rtol=2.1e-6)
    # A proven bound of one solver is a bound for the other's answer too.
    assert first.bound <= second.objective * (1 + 1e-9)
    assert second.bound <= first.objective * (1 + 1e-9)


def test_objective_use_bound_and_gap_are_consistent(solver):
    problem = _random_problem(5, 40, 12, 0.3)
    found = solve(problem, solver, SolveOptions(rel_gap=1e-4))
    rows = np.arange(40)
    assert found.used == (sum(int(problem.size[i, found.assignment[i]]) for i in rows),)
    assert found.used[0] <= problem.budgets[0].upper
    assert found.objective == problem.cost[rows, found.assignment].sum()
    assert found.bound <= found.objective
    assert 0 <= found.gap <= 1.001e-4
    assert found.status is Status.OPTIMAL
    assert (found.solver, bool(found.version), found.seconds > 0) == (solver, True, True)


def test_costs_of_1e_12_give_the_same_plan_as_costs_of_one(solver):
    # Tolerances of solvers are absolute: unscaled, costs of this size made every one of them return wrong optima.
    problem = _random_problem(1, 24, 12, 0.3)
    plain = solve(problem, solver)
    tiny = Problem(problem.cost * (1e-12 / np.median(problem.cost)), problem.size, budgets=problem.budgets)
    found = solve(tiny, solver)
    assert found.status is Status.OPTIMAL
    np.testing.assert_allclose(
        problem.cost[np.arange(24), found.assignment].sum(), plain.objective, rtol=2e-6, err_msg="not the optimum"
    )


def test_tiny_costs_are_right_by_brute_force(solver):
    rng = np.random.default_rng(2)
    cost, size = 1e-12 * rng.lognormal(size=(6, 4)), rng.integers(1, 40, (6, 4)) * 8
    problem = Problem(cost, size, budgets=[Budget(upper=int(size.min(axis=1).sum()) + 100)])
    np.testing.assert_allclose(solve(problem, solver).objective, _optimum(problem), rtol=1e-6)


@pytest.mark.parametrize("spare", [0, 8, 3072])
def test_a_tight_budget_of_1e10_bits_is_met_to_the_bit(solver, spare):
    # In floats with a feasibility tolerance of 1e-6 such a budget is overrun by thousands of bits.
    rng = np.random.default_rng(3)
    size = np.sort(rng.integers(2**26, 2**29, (30, 6)), axis=1) * 8
    cost = np.sort(rng.lognormal(size=(30, 6)), axis=1)[:, ::-1]
    target = rng.integers(0, 6, 30)
    budget = int(size[np.arange(30), target].sum()) + spare
    assert budget > 10**10
    problem = Problem(cost, size, budgets=[Budget(upper=budget)])
    found = solve(problem, solver)
    assert found.used[0] <= budget
    assert found.objective <= cost[np.arange(30), target].sum() * (1 + 1e-6)
    assert found.status is Status.OPTIMAL


def test_a_budget_one_bit_below_the_cheapest_is_infeasible_and_the_cheapest_is_feasible(solver):
    size = np.array([[2**33 + 1, 2**34], [2**32 + 3, 2**35]])
    cheapest = int(size.min(axis=1).sum())
    cost = [[2.0, 1.0], [2.0, 1.0]]
    assert solve(Problem(cost, size, budgets=[Budget(upper=cheapest - 1)]), solver).status is Status.INFEASIBLE
    found = solve(Problem(cost, size, budgets=[Budget(upper=cheapest)]), solver)
    assert (found.status, found.used) == (Status.OPTIMAL, (cheapest,))


def test_ties_without_a_common_choice_are_infeasible(solver):
    problem = Problem([[1.0, 2.0]] * 2, [[1, 2]] * 2, [[True, False], [False, True]], [0, 0], [Budget(upper=9)])
    assert solve(problem, solver).status is Status.INFEASIBLE


def test_without_budgets_each_row_takes_its_cheapest(solver):
    problem = Problem([[3.0, 1.0], [5.0, 7.0]], [[2, 4], [2, 4]])
    found = solve(problem, solver)
    assert (found.assignment.tolist(), found.used) == ([1, 0], ())


def test_negative_costs_are_allowed(solver):
    problem = Problem([[-3.0, -1.0], [5.0, -2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)])
    found = solve(problem, solver)
    assert (found.assignment.tolist(), found.objective, found.status) == ([0, 1], -5.0, Status.OPTIMAL)


def test_costs_of_zero_are_solved_with_no_gap(solver):
    found = solve(Problem(np.zeros((3, 2)), [[2, 4]] * 3, budgets=[Budget(upper=8)]), solver)
    assert (found.objective, found.gap, found.status) == (0.0, 0.0, Status.OPTIMAL)


def test_the_same_problem_gives_the_same_assignment(solver):
    problem = _random_problem(9, 30, 10, 0.5)
    assert solve(problem, solver).assignment.tolist() == solve(problem, solver).assignment.tolist()


def test_a_time_limit_never_yields_an_invalid_answer(solver):
    problem = _random_problem(4, 60, 24, 0.3)
    found = solve(problem, solver, SolveOptions(time_limit=1e-3, rel_gap=0.0))
    if found.assignment is None:
        assert found.status is Status.NO_SOLUTION
    else:
        assert evaluate(problem, found.assignment)[2] == []
        assert found.bound <= found.objective


class FakeAdapter:
    """Returns what it is told to, whatever the problem is."""

    REQUIRES = "numpy"

    def __init__(self, x, bound=0.0, stopped=StopReason.GAP):
        self._raw = RawResult(x, bound, "fake", stopped)

    def version(self) -> str:
        return "1"

    def solve(self, *_) -> RawResult:
        return self._raw


@pytest.fixture
def registered(monkeypatch):
    """Register an adapter under the name ``fake`` for one test."""
    monkeypatch.setattr(registry, "ADAPTERS", dict(registry.ADAPTERS))

    def add(adapter) -> str:
        solvers.register("fake", adapter)
        return "fake"

    return add


def test_an_over_budget_answer_is_an_error(registered):
    name = registered(FakeAdapter(np.array([0.0, 1.0, 0.0, 1.0])))
    with pytest.raises(SolverError, match="8 bits are above the limit of 6"):
        solve(SMALL, name)


def test_an_answer_with_the_dust_of_a_tolerance_is_accepted(registered):
    dust = np.array([1e-6, -1e-7, 1e-9, -1e-6])
    name = registered(FakeAdapter(np.array([1.0, 0.0, 0.0, 1.0]) + dust, bound=4.0))
    found = solve(SMALL, name)
    assert (found.assignment.tolist(), found.objective, found.used) == ([0, 1], 5.0, (6,))


def test_a_bound_above_the_objective_is_not_believed(registered):
    name = registered(FakeAdapter(np.array([1.0, 0.0, 0.0, 1.0]), bound=1e9))
    assert solve(SMALL, name).bound == 5.0


def test_an_answer_with_a_weak_bound_is_feasible_not_optimal(registered):
    name = registered(FakeAdapter(np.array([1.0, 0.0, 0.0, 1.0]), bound=0.0))
    found = solve(SMALL, name)
    assert (found.status, found.gap) == (Status.FEASIBLE, 1.0)


def test_a_weak_bound_on_an_objective_of_zero_is_an_infinite_gap(registered):
    problem = Problem([[0.0, 1.0]], [[2, 1]], budgets=[Budget(upper=2)])
    found = solve(problem, registered(FakeAdapter(np.array([1.0, 0.0]), bound=-3.0)))
    assert (found.status, found.gap) == (Status.FEASIBLE, np.inf)


def test_a_time_limit_without_an_incumbent_is_no_solution(registered):
    reduced = solvers.reduce_problem(SMALL)
    assert reduced.unit != 1.0  # else the units of the bound would not be tested
    found = solve(SMALL, registered(FakeAdapter(None, bound=1.5)), SolveOptions(time_limit=1.0))
    assert (found.status, found.assignment, found.gap) == (Status.NO_SOLUTION, None, np.inf)
    assert found.bound == 1.5 * reduced.unit


def test_a_proof_of_infeasibility_is_passed_on(registered):
    found = solve(SMALL, registered(FakeAdapter(None, bound=np.inf, stopped=StopReason.INFEASIBLE)))
    assert (found.status, found.used) == (Status.INFEASIBLE, ())


def test_a_registered_solver_is_listed_and_does_not_become_the_default(registered):
    registered(FakeAdapter(None))
    assert solvers.available()["fake"] is True
    assert solvers.select(SMALL) in SOLVERS


def test_the_fake_solver_is_gone_after_its_test():
    assert "fake" not in solvers.available()


def test_reserved_names_and_incomplete_adapters_are_refused():
    with pytest.raises(InvalidArgumentError, match="auto"):
        solvers.register("auto", FakeAdapter(None))
    with pytest.raises(InvalidArgumentError, match="version"):
        solvers.register("broken", object())
    assert "broken" not in solvers.available()


def test_an_unknown_solver_is_named_with_those_that_exist():
    with pytest.raises(InvalidArgumentError, match=r"'gurobi'.*highs, scipy"):
        solve(SMALL, "gurobi")


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr(_optional, "is_installed", lambda _: False)
    with pytest.raises(MissingDependencyError, match="Solver 'highs' needs highspy: pip install highspy"):
        solve(SMALL, "highs")


def test_the_default_falls_back_to_what_is_installed(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda module: module != "highspy")
    assert solvers.available() == {"highs": False, "scipy": True}
    assert solvers.select(SMALL) == "scipy"


def test_without_any_solver_the_default_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda _: False)
    with pytest.raises(MissingDependencyError, match="pip install"):
        solve(SMALL)
