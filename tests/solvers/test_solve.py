"""solve(): answers equal brute force and are checked, repaired or refused, with real and fake solvers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import _optional, solvers
from lqlora.errors import InvalidArgumentError, MissingDependencyError, SolverError
from lqlora.solvers import Budget, Problem, RawResult, SolveOptions, Status, StopReason, evaluate, registry, solve
from tests.requirements import require_or_skip
from tests.solvers.oracle import brute_force, check_against_brute_force

SOLVERS = ("mckp", "highs", "scipy")
SMALL = Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)])
#: The lower limit rules out mckp, and equal rows make the Lagrangian start infeasible.
EVEN = Problem([[3.0, 1.0], [3.0, 1.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6, lower=5)])


@pytest.fixture(params=SOLVERS)
def solver(request) -> str:
    require_or_skip(request.param, solvers.available()[request.param])
    return request.param


@st.composite
def tiny_problems(draw) -> Problem:
    """Draw problems small enough for brute force: masks, ties, several budgets, lower limits, equal costs."""
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


def _random_problem(seed: int, rows: int, columns: int, share: float) -> Problem:
    """Return costs that fall with size, as errors of formats do, and a budget between the extremes."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.uniform(2, 8, columns))
    weights = rng.integers(1, 9, (rows, 1)) * 4096
    size = (weights * bits).astype(np.int64) // 8 * 8
    cost = rng.lognormal(sigma=1.5, size=(rows, 1)) * 4.0**-bits * rng.uniform(0.8, 1.25, (rows, columns))
    low, high = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    return Problem(cost, size, budgets=[Budget(upper=low + int(share * (high - low)))])


@settings(max_examples=40, deadline=None)
@given(problem=tiny_problems())
@pytest.mark.parametrize("name", SOLVERS)
def test_the_optimum_is_that_of_brute_force(name, problem):
    require_or_skip(name, solvers.available()[name])
    check_against_brute_force(problem, solve(problem, name))


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
    assert found.stopped is StopReason.GAP


def test_costs_of_1e_12_give_the_same_plan_as_costs_of_one(solver):
    # Solvers have absolute tolerances. Without scaling, every one of them returned wrong optima for such costs.
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
    np.testing.assert_allclose(solve(problem, solver).objective, brute_force(problem), rtol=1e-6)


@pytest.mark.parametrize("spare", [0, 8, 3072])
def test_a_tight_budget_of_1e10_bits_is_met_to_the_bit(solver, spare):
    # A relative feasibility tolerance of 1e-6 would allow thousands of bits more than this budget.
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
    """Adapter that returns a given assignment for every problem."""

    REQUIRES = "numpy"

    def __init__(self, assignment=None, bound=0.0, stopped=StopReason.GAP, dust=0.0):
        self._assignment, self._bound, self._stopped, self._dust = assignment, bound, stopped, dust
        self.seen = None

    def version(self) -> str:
        return "1"

    def solve(self, reduced, _) -> RawResult:
        self.seen = reduced
        x = None
        if self._assignment is not None:
            group_values = np.empty(len(reduced.first), dtype=int)
            group_values[reduced.group_of_row] = self._assignment
            x = (reduced.column == group_values[reduced.group]) + self._dust * np.cos(np.arange(len(reduced.cost)))
        return RawResult(x, self._bound / reduced.unit, "fake", self._stopped)


@pytest.fixture
def registered(monkeypatch):
    """Register an adapter under the name ``fake`` for one test."""
    monkeypatch.setattr(registry, "ADAPTERS", dict(registry.ADAPTERS))

    def add(adapter) -> str:
        solvers.register("fake", adapter)
        return "fake"

    return add


def test_an_answer_over_budget_is_repaired(registered):
    found = solve(EVEN, registered(FakeAdapter([1, 1], bound=4.0)))
    assert (sorted(found.assignment), found.objective, found.used) == ([0, 1], 4.0, (6,))
    assert found.status is Status.OPTIMAL


def test_an_answer_that_cannot_be_repaired_is_an_error(registered):
    # No single change helps: from 8 bits to 6 and 5 the limits leave nothing.
    problem = Problem([[3.0, 1.0], [3.0, 1.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=7, lower=7)])
    with pytest.raises(SolverError, match=r"fake.*8 bits.*limit of 7"):
        solve(problem, registered(FakeAdapter([1, 1])))


def test_an_answer_with_rounding_errors_is_accepted(registered):
    found = solve(EVEN, registered(FakeAdapter([1, 0], bound=4.0, dust=1e-6)))
    assert (found.assignment.tolist(), found.objective, found.used) == ([1, 0], 4.0, (6,))


def test_a_bound_above_the_objective_is_lowered_to_it(registered):
    assert solve(EVEN, registered(FakeAdapter([1, 0], bound=1e9))).bound == 4.0


def test_a_bound_of_nan_is_ignored(registered):
    assert solve(EVEN, registered(FakeAdapter([1, 0], bound=np.nan))).bound == -np.inf


def test_an_answer_with_a_weak_bound_is_feasible_not_optimal(registered):
    found = solve(EVEN, registered(FakeAdapter([1, 0], bound=1.0)))
    assert (found.status, found.stopped, found.gap) == (Status.FEASIBLE, StopReason.GAP, 0.75)


def test_a_weak_bound_on_an_objective_of_zero_is_an_infinite_gap(registered):
    problem = Problem([[1.0, 0.0]], [[2, 4]], budgets=[Budget(upper=4, lower=3)])
    found = solve(problem, registered(FakeAdapter([1], bound=-3.0)))
    assert (found.status, found.gap) == (Status.FEASIBLE, np.inf)


def test_a_time_limit_without_an_answer_leaves_the_first_assignment(registered):
    found = solve(_random_problem(3, 20, 8, 0.4), registered(FakeAdapter(None, -np.inf, StopReason.TIME_LIMIT)))
    assert (found.status, found.stopped) == (Status.FEASIBLE, StopReason.TIME_LIMIT)
    assert 0 < found.gap < 0.5  # the bound is that of the linear relaxation


def test_a_time_limit_without_any_assignment_is_no_solution(registered):
    reduced = solvers.reduce_problem(EVEN)
    assert reduced.unit != 1.0  # else the units of the bound would not be tested
    found = solve(EVEN, registered(FakeAdapter(None, 1.5, StopReason.TIME_LIMIT)), SolveOptions(time_limit=1.0))
    assert (found.status, found.stopped) == (Status.NO_SOLUTION, StopReason.TIME_LIMIT)
    assert (found.assignment, found.gap, found.bound) == (None, np.inf, 1.5)


def test_a_proof_of_infeasibility_is_passed_on(registered):
    found = solve(EVEN, registered(FakeAdapter(None, np.inf, StopReason.INFEASIBLE)))
    assert (found.status, found.stopped, found.used) == (Status.INFEASIBLE, StopReason.INFEASIBLE, ())


def test_a_false_proof_of_infeasibility_is_an_error(registered):
    with pytest.raises(SolverError, match=r"fake.*infeasible"):
        solve(SMALL, registered(FakeAdapter(None, np.inf, StopReason.INFEASIBLE)))


def test_a_start_is_checked_and_handed_on(registered):
    fake = FakeAdapter(None, -np.inf, StopReason.TIME_LIMIT)
    found = solve(EVEN, registered(fake), SolveOptions(start=[1, 0]))
    assert (found.assignment.tolist(), found.status) == ([1, 0], Status.FEASIBLE)
    assert fake.seen.assignment(fake.seen.start).tolist() == [1, 0]


@pytest.mark.parametrize("start", [[1, 1], [0, 0]])
def test_a_start_that_breaks_a_limit_is_not_used(registered, start):
    fake = FakeAdapter(None, -np.inf, StopReason.TIME_LIMIT)
    found = solve(EVEN, registered(fake), SolveOptions(start=start))
    assert (found.status, fake.seen.start) == (Status.NO_SOLUTION, None)


def test_a_start_of_another_length_is_refused(solver):
    with pytest.raises(InvalidArgumentError, match="assignment"):
        solve(SMALL, solver, SolveOptions(start=[0]))


def test_a_start_that_is_optimal_is_kept(solver):
    problem = _random_problem(8, 40, 12, 0.3)
    best = solve(problem, solver, SolveOptions(rel_gap=1e-9))
    again = solve(problem, solver, SolveOptions(rel_gap=1e-9, start=best.assignment))
    assert again.objective <= best.objective * (1 + 1e-9)


def test_a_registered_solver_is_listed_and_does_not_become_the_default(registered):
    registered(FakeAdapter(None))
    assert solvers.available()["fake"] is True
    assert solvers.select(SMALL) == "mckp"
    assert solvers.select(EVEN) in {"highs", "scipy"}


def test_the_fake_solver_is_gone_after_its_test():
    assert "fake" not in solvers.available()


def test_reserved_names_and_incomplete_adapters_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"name.*auto"):
        solvers.register("auto", FakeAdapter(None))
    with pytest.raises(InvalidArgumentError, match=r"broken.*version"):
        solvers.register("broken", object())
    assert "broken" not in solvers.available()


def test_an_unknown_solver_is_named_with_those_that_exist():
    with pytest.raises(InvalidArgumentError, match=r"solver.*highs, scipy.*'abacus'"):
        solve(SMALL, "abacus")


def test_a_missing_package_is_named_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(_optional, "is_installed", lambda _: False)
    with pytest.raises(MissingDependencyError, match=r"'highs'.*pip install highspy"):
        solve(SMALL, "highs")


def test_the_default_for_lower_limits_falls_back_to_what_is_installed(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda module: module in ("numpy", "scipy"))
    assert [name for name, installed in solvers.available().items() if installed] == ["mckp", "scipy"]
    assert solvers.select(EVEN) == "scipy"


def test_lower_limits_without_any_other_solver_are_an_error(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda module: module == "numpy")
    assert solve(SMALL).solver == "mckp"
    for solver in ("auto", "mckp"):
        with pytest.raises(MissingDependencyError, match="pip install"):
            solve(EVEN, solver)
