"""check_solver: each property fails a solver with the fault it is named for, and passes one without faults."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora.errors import ConformanceError, InvalidArgumentError, MissingDependencyError
from lqlora.solvers import Budget, Problem
from lqlora.testing import SOLVER_PROPERTIES, assert_solver_conforms, check_solver
from lqlora.testing.solvers._subject import optimum
from tests.testing import broken_solvers as broken

#: Faults, and the properties that find them.
FAULTS = [
    (broken.HasNoVersion, ["version"]),
    (broken.ReturnsATuple, ["result"]),
    (broken.ReturnsTheRelaxation, ["feasible"]),
    (broken.ForgetsTheBudget, ["feasible", "infeasible", "budget_to_the_unit"]),
    (broken.AllowsATolerance, ["budget_to_the_unit"]),
    (broken.GivesUpInsteadOfProving, ["infeasible"]),
    (broken.IsContentWithAnything, ["cheapest", "proof", "ties"]),
    (broken.ProvesItsOwnAnswer, ["bound"]),
    (broken.ForgetsTheConstant, ["proof", "negative_costs"]),
    (broken.ExpectsEqualGroups, ["masks"]),
    (broken.NeedsABudget, ["no_budget"]),
    (broken.KnowsOneBudget, ["several_budgets"]),
    (broken.KnowsNoLowerLimits, ["lower_limits"]),
    (broken.DividesByTheSpread, ["equal_costs"]),
    (broken.RefusesNegativeCosts, ["negative_costs"]),
    (broken.UndoesTheScaling, ["tiny_costs", "huge_costs"]),
    (broken.RoundsCosts, ["wide_costs"]),
    (broken.Alternates, ["deterministic"]),
    (broken.WritesToTheProblem, ["input_unchanged"]),
    (broken.TripsOverTheStart, ["start"]),
    (broken.HasOneThread, ["threads"]),
]


def test_a_solver_without_a_fault_passes_everything():
    report = assert_solver_conforms(broken.Correct(), max_examples=4)
    assert {finding.result for finding in report.findings} == {"passed"}


@pytest.mark.parametrize(("fault", "names"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fault_is_found_by_the_properties_named_for_it(fault, names):
    assert check_solver(fault(), only=names, shrink=False).failed == tuple(
        name for name in SOLVER_PROPERTIES if name in names
    )


def test_a_solver_that_exceeds_its_time_limit_is_found():
    report = check_solver(broken.IsLate(), only=["time_limit"], time_limit=0.1, overrun=0.15)
    assert report.failed == ("time_limit",)
    assert "time limit of 0.1 s" in report["time_limit"].message


def test_every_property_has_a_fault_of_its_own():
    assert {name for _, names in FAULTS for name in names} | {"time_limit"} == set(SOLVER_PROPERTIES)


def test_the_counterexample_is_small_and_can_be_replayed():
    finding = check_solver(broken.ForgetsTheBudget(), only=["feasible"])["feasible"]
    problem = finding.counterexample["problem"]
    assert problem.cost.size <= 3
    assert finding.message.startswith("problem = cost [[")
    assert "the answer breaks a constraint: budget 0" in finding.message
    assert np.isfinite(optimum(problem))


def test_exceptions_of_the_solver_are_findings():
    assert "solve() raised IndexError: no budget." in check_solver(broken.NeedsABudget(), only=["no_budget"])[
        "no_budget"
    ].message  # fmt: skip


def test_a_heuristic_needs_feasible_answers_and_valid_bounds_only():
    names = ["feasible", "budget_to_the_unit", "cheapest", "bound", "proof", "tiny_costs"]
    report = check_solver(broken.IsContentWithAnything(), exact=False, only=names, max_examples=20)
    assert {finding.name for finding in report.findings if finding.result == "skipped"} == {"cheapest", "proof"}
    assert report.passed


@pytest.mark.parametrize("name", ["several_budgets", "lower_limits"])
def test_properties_about_budgets_that_a_solver_does_not_take_are_skipped(name):
    report = check_solver(broken.KnowsOneBudget(), only=[name], **{name: False})
    assert report[name].result == "skipped"
    assert report[name].message == f"needs {name}"


def test_a_failure_is_an_assertion_that_shows_the_report():
    with pytest.raises(ConformanceError, match=r"^solver fails version\.\nversion +FAILED"):
        assert_solver_conforms(broken.HasNoVersion(), only=["version"])


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidArgumentError, match="abacus"):
        check_solver("abacus")
    with pytest.raises(InvalidArgumentError, match=r"only.*abacus"):
        check_solver("scipy", only=["abacus"])
    with pytest.raises(InvalidArgumentError, match=r"time_limit.*0\.0"):
        check_solver("scipy", time_limit=0.0)


def test_a_solver_that_is_not_installed_is_not_tried():
    class Absent(broken.Correct):
        REQUIRES = "no_such_package"

    with pytest.raises(MissingDependencyError, match="no_such_package"):
        check_solver(Absent())


def test_the_oracle_agrees_with_a_count_by_hand():
    sizes = [[2, 4], [2, 4]]
    assert optimum(Problem([[3.0, 1.0], [5.0, 2.0]], sizes, budgets=[Budget(upper=6)])) == 5.0
    assert optimum(Problem([[3.0, 1.0], [5.0, 2.0]], sizes, budgets=[Budget(upper=3)])) == np.inf
    assert optimum(Problem([[3.0, 1.0], [5.0, 2.0]], sizes, ties=[4, 4], budgets=[Budget(upper=6)])) == 8.0
    masked = Problem([[3.0, 1.0], [5.0, 2.0]], sizes, [[True, False], [True, True]], budgets=[Budget(upper=8)])
    assert optimum(masked) == 5.0
    some = Budget(lower=4, members=np.array([True, False]))
    assert optimum(Problem([[1.0, 3.0], [5.0, 2.0]], sizes, budgets=[Budget(upper=8), some])) == 5.0
