"""Every installed adapter passes the conformance suite of lqlora.testing and avoids the known traps of its solver."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from lqlora.errors import InvalidArgumentError, SolverError
from lqlora.solvers import (
    Budget,
    Problem,
    SolveOptions,
    Status,
    StopReason,
    available,
    check_license,
    evaluate,
    reduce_problem,
    registry,
    solve,
)
from lqlora.solvers.vendors import ortools
from lqlora.testing import SOLVER_PROPERTIES, check_solver
from lqlora.testing.solvers._inputs import larger_problem
from tests.requirements import require_or_skip

#: Names of the library's own solvers, before a test registers another.
SOLVERS = tuple(available())

#: Properties that a solver fails. ``solve`` repairs or refuses such answers.
KNOWN = {
    "highs": ("budget_to_the_unit",),
    # scipy.optimize.milp does not let its tolerance be set.
    "scipy": ("budget_to_the_unit",),
}

#: Options of the suite for solvers that do not take every problem.
OPTIONS = {"mckp": {"several_budgets": False, "lower_limits": False}}

#: Properties to try on CP-SAT, where each call starts a process and takes a second.
FEW = ("version", "feasible", "infeasible", "proof", "several_budgets", "no_budget", "negative_costs", "start")


@pytest.fixture(params=SOLVERS)
def solver(request) -> str:
    require_or_skip(request.param, available()[request.param])
    return request.param


def conforms(name, max_examples, **options):
    report = check_solver(name, max_examples=max_examples, **OPTIONS.get(name, {}), **options)
    assert set(report.failed) <= set(KNOWN.get(name, ())), f"\n{report}"


def test_the_adapter_conforms(solver):
    if solver == "ortools":
        conforms(solver, 1, only=FEW)
    else:
        conforms(solver, 5, exclude=["time_limit"])


@pytest.mark.slow
def test_the_adapter_conforms_on_many_problems(solver):
    if solver == "ortools":
        conforms(solver, 1, only=[name for name in SOLVER_PROPERTIES if name not in FEW])
    else:
        conforms(solver, 50)


def test_costs_of_1e_12_have_the_plan_of_costs_of_one(solver):
    problem = larger_problem(1, rows=24, columns=12)
    tiny = Problem(problem.cost * 1e-12, problem.size, budgets=problem.budgets)
    found = solve(tiny, solver)
    assert found.status is Status.OPTIMAL
    np.testing.assert_allclose(evaluate(problem, found.assignment)[0], solve(problem, "scipy").objective, rtol=2e-6)


def test_a_time_limit_gives_a_valid_bound_with_or_without_an_incumbent(solver):
    problem = larger_problem(0, 60, 24)
    reduced = reduce_problem(problem)
    raw = registry.find(solver).solve(reduced, SolveOptions(time_limit=1e-3, rel_gap=0.0))
    if solver != "mckp":  # which may be done by then
        assert raw.stopped is StopReason.TIME_LIMIT
    best = solve(problem, "scipy").objective / reduced.unit
    assert raw.bound <= best * (1 + 1e-6)
    if raw.x is not None:
        assert evaluate(problem, reduced.assignment(raw.x))[2] == []


def test_no_time_limit_makes_a_problem_infeasible(solver):
    problem = larger_problem(0, 60, 24)
    reduced = reduce_problem(problem)
    for limit in np.geomspace(5e-4, 1e-2, 12):  # from before the first phase of a solver to after its preprocessing
        raw = registry.find(solver).solve(reduced, SolveOptions(time_limit=float(limit), rel_gap=0.0))
        assert raw.stopped in (StopReason.TIME_LIMIT, StopReason.GAP), limit
        assert raw.bound < np.inf, limit


def test_the_solution_names_solver_version_and_message(solver):
    found = solve(Problem([[1.0]], [[1]], budgets=[Budget(upper=1)]), solver)
    assert (found.solver.split("+")[0], found.stopped) == (solver, StopReason.GAP)
    assert found.version[0].isdigit()
    assert found.message


def test_a_budget_that_no_sum_of_sizes_meets_is_infeasible(solver):
    if solver == "mckp":
        pytest.skip("mckp takes no lower limits.")
    problem = Problem([[1.0, 2.0]] * 2, [[2, 4]] * 2, budgets=[Budget(lower=5, upper=5)])
    raw = registry.find(solver).solve(reduce_problem(problem), SolveOptions())
    assert (raw.x, raw.stopped) == (None, StopReason.INFEASIBLE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_refused_before_the_adapter_runs(bad, solver, monkeypatch):
    monkeypatch.setattr(registry.find(solver), "solve", lambda *_: pytest.fail("it was called"))
    with pytest.raises(InvalidArgumentError, match=r"cost.*(nan|inf) at row 0"):
        solve(Problem([[bad, 1.0]], [[1, 2]], budgets=[Budget(upper=3)]), solver)


def test_a_budget_that_counts_no_row_changes_nothing(solver):
    # CBC infers the number of rows from the entries: it loses a last row without entries.
    nothing = np.array([False, False])
    problem = Problem([[3.0, 1.0]] * 2, [[1, 2]] * 2, budgets=[Budget(upper=3), Budget(upper=0, members=nothing)])
    assert (solve(problem, solver).objective, solve(problem, solver).used) == (4.0, (3, 0))


# --- Gurobi: the limited license of the package


def _more_than_2000_variables() -> Problem:
    size = np.tile(np.arange(1, 12), (200, 1))
    return Problem(1.0 / size, size, budgets=[Budget(upper=1000)])


def _require_limited_license() -> None:
    require_or_skip("gurobi", available()["gurobi"])
    if "2000" not in check_license("gurobi").message:
        pytest.skip("Gurobi has a full license here.")


def test_a_model_larger_than_the_license_stops_at_a_limit_and_names_a_free_solver():
    _require_limited_license()
    found = registry.find("gurobi").solve(reduce_problem(_more_than_2000_variables()), SolveOptions())
    assert (found.x, found.bound, found.stopped) == (None, -np.inf, StopReason.LIMIT)
    for part in ("2200 variables", "201 constraints", "'highs'"):
        assert part in found.message


def test_gurobi_without_a_license_is_an_error(monkeypatch, tmp_path):
    require_or_skip("gurobi", available()["gurobi"])
    monkeypatch.setenv("GRB_LICENSE_FILE", str(tmp_path / "none.lic"))
    assert not check_license("gurobi").ok
    with pytest.raises(SolverError, match="gurobi"):
        solve(Problem([[1.0]], [[1]]), "gurobi")


# --- OR-tools: a process of its own


def _require_ortools() -> None:
    require_or_skip("ortools", available()["ortools"])


@pytest.mark.parametrize("order", [("highs", "ortools", "highs"), ("ortools", "highs")], ids="-".join)
def test_highs_and_ortools_work_in_one_program(order):
    # Loaded into one process, the second of them raises ImportError.
    _require_ortools()
    require_or_skip("highs", available()["highs"])
    code = f"""
from lqlora.solvers import Budget, Problem, solve
problem = Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)])
print([solve(problem, name).objective for name in {order!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[-2] == str([5.0] * len(order))


def test_ortools_is_never_loaded_into_this_process():
    _require_ortools()
    solve(Problem([[1.0, 2.0]], [[1, 2]], budgets=[Budget(upper=1)]), "ortools")
    assert "ortools" not in sys.modules


def test_a_process_that_hangs_is_ended_at_the_time_limit(monkeypatch, tmp_path):
    _require_ortools()
    (tmp_path / "hangs.py").write_text("import time; time.sleep(100)")
    monkeypatch.syspath_prepend(tmp_path)
    reduced = reduce_problem(larger_problem(0, 5, 3))
    start = time.perf_counter()
    found = ortools.solve(reduced, SolveOptions(time_limit=0.5), module="hangs", grace=0.0)
    assert time.perf_counter() - start < 30
    assert (found.x, found.stopped) == (None, StopReason.TIME_LIMIT)


def test_a_process_that_fails_is_an_error_with_its_last_line_of_output():
    _require_ortools()
    with pytest.raises(SolverError, match=r"ortools.*no_such_module"):
        ortools.solve(reduce_problem(larger_problem(0, 5, 3)), SolveOptions(), module="no_such_module")


def test_costs_over_many_powers_of_ten_leave_the_bound_of_ortools_a_bound():
    _require_ortools()
    rng = np.random.default_rng(0)
    size = np.sort(rng.integers(1, 100, (8, 6)), axis=1)
    cost = np.sort(10.0 ** rng.uniform(-6, 6, (8, 6)), axis=1)[:, ::-1]
    problem = Problem(cost, size, budgets=[Budget(upper=int(size.sum(axis=0)[3]))])
    found, right = solve(problem, "ortools"), solve(problem, "scipy")
    np.testing.assert_allclose(found.objective, right.objective, rtol=2e-6)
    assert found.bound <= right.objective * (1 + 1e-9)
