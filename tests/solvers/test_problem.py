"""Problems, budgets and options: refused arguments, and exact evaluation of assignments."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora.errors import InvalidArgumentError
from lqlora.solvers import Budget, Problem, Solution, SolveOptions, Status, StopReason, evaluate

COST = [[3.0, 1.0], [5.0, 2.0]]
SIZE = [[2, 4], [2, 4]]


@pytest.mark.parametrize("cost", [[[np.nan, 1.0], [5.0, 2.0]], [[np.inf, 1.0], [5.0, 2.0]]])
def test_costs_that_are_not_finite_are_refused(cost):
    with pytest.raises(InvalidArgumentError, match=r"cost.*(nan|inf) at row 0, column 0"):
        Problem(cost, SIZE)


def test_a_cost_that_is_not_finite_is_accepted_where_the_choice_is_not_allowed():
    problem = Problem([[np.nan, 1.0], [5.0, np.inf]], SIZE, allowed=[[False, True], [True, False]])
    assert evaluate(problem, [1, 0])[0] == 6.0


def test_negative_sizes_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"size.*got -4 at row 0"):
        Problem(COST, [[2, -4], [2, 4]])


def test_sizes_that_are_not_integers_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"size.*float64"):
        Problem(COST, [[2.0, 4.0], [2.0, 4.0]])


@pytest.mark.parametrize(
    ("cost", "size"),
    [
        (np.zeros((0, 2)), np.zeros((0, 2), dtype=int)),
        (np.zeros((2, 0)), np.zeros((2, 0), dtype=int)),
        (np.zeros(2), np.zeros(2, dtype=int)),
        (COST, [[2, 4]]),
    ],
    ids=["no rows", "no columns", "one dimension", "shapes differ"],
)
def test_shapes_other_than_one_table_are_refused(cost, size):
    with pytest.raises(InvalidArgumentError, match=r"cost, size.*shape"):
        Problem(cost, size)


def test_scalars_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"cost, size.*shape"):
        Problem(3.0, 3)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"allowed.*shape"):
        Problem(COST, SIZE, allowed=[[True, True]])


def test_a_row_that_allows_nothing_is_named():
    with pytest.raises(InvalidArgumentError, match=r"allowed.*row 1"):
        Problem(COST, SIZE, allowed=[[True, True], [False, False]])


def test_ties_of_another_length_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"ties.*2 rows.*\(3,\)"):
        Problem(COST, SIZE, ties=[0, 0, 1])


def test_members_of_another_length_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"members of budget 0.*\(1,\)"):
        Problem(COST, SIZE, budgets=[Budget(upper=3, members=np.array([True]))])


def test_sizes_beyond_64_bits_are_refused():
    # Cast to int64 they would turn negative, and so pass any budget.
    with pytest.raises(InvalidArgumentError, match=r"size.*2\*\*62"):
        Problem([[1.0]], np.array([[2**63]], dtype=np.uint64))


@pytest.mark.parametrize("limits", [{}, {"upper": -1}, {"lower": -1}, {"upper": 3.5}, {"upper": float("nan")}])
def test_budgets_without_an_integer_limit_are_refused(limits):
    with pytest.raises(InvalidArgumentError, match="|".join(limits) or "upper or lower"):
        Budget(**limits)


def test_a_numpy_integer_is_a_limit():
    assert Budget(upper=np.int64(7)).upper == 7


@pytest.mark.parametrize(
    "options", [{"time_limit": 0.0}, {"time_limit": -1.0}, {"time_limit": float("nan")}, {"rel_gap": -1e-9}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidArgumentError, match="|".join(options)):
        SolveOptions(**options)


def test_the_problem_does_not_alias_the_callers_arrays():
    cost = np.array(COST)
    problem = Problem(cost, SIZE)
    cost[0, 0] = np.nan
    assert problem.cost[0, 0] == 3.0


def test_evaluate_adds_costs_and_sizes_of_members():
    mask = np.array([False, True])
    problem = Problem(COST, SIZE, budgets=[Budget(upper=100), Budget(lower=0, members=mask)])
    assert evaluate(problem, [0, 1]) == (5.0, (6, 4), [])


def test_evaluate_lists_every_broken_constraint():
    allowed = [[True, False], [True, True]]
    problem = Problem(COST, SIZE, allowed, ties=[7, 7], budgets=[Budget(upper=5), Budget(lower=7)])
    _, used, faults = evaluate(problem, [1, 0])
    assert used == (6, 6)
    assert len(faults) == 4
    assert [fault.split(":")[0] for fault in faults] == ["row 0", "tie 7", "budget 0", "budget 1"]


def test_evaluate_is_exact_where_floats_are_not():
    huge = 2**60 + 1
    problem = Problem([[1.0], [1.0]], [[huge], [huge]], budgets=[Budget(upper=2 * huge - 1)])
    _, used, faults = evaluate(problem, [0, 0])
    assert used == (2 * huge,)
    assert len(faults) == 1


@pytest.mark.parametrize("assignment", [[0], [0, 2], [0, -1], [0.0, 1.0], [[0, 1]]])
def test_evaluate_refuses_other_than_one_column_per_row(assignment):
    with pytest.raises(InvalidArgumentError, match=r"assignment.*2 integers.* 1,"):
        evaluate(Problem(COST, SIZE), assignment)


def _solution(objective: float, bound: float, assignment: object) -> Solution:
    return Solution(Status.FEASIBLE, StopReason.TIME_LIMIT, assignment, objective, bound, (), "none", "0", 0.0)


def test_the_gap_is_relative_to_the_objective():
    assert _solution(4.0, 3.0, np.zeros(1, dtype=int)).gap == 0.25
    assert _solution(4.0, 4.0, np.zeros(1, dtype=int)).gap == 0.0
    assert _solution(np.inf, 1.0, None).gap == np.inf


def test_the_gap_of_an_objective_of_zero_is_infinite_if_the_bound_is_below():
    assert _solution(0.0, -1.0, np.zeros(1, dtype=int)).gap == np.inf


@pytest.mark.parametrize("threads", [0, -1, 1.5])
def test_a_number_of_threads_is_a_positive_integer(threads):
    with pytest.raises(InvalidArgumentError, match=rf"threads.*{threads}"):
        SolveOptions(threads=threads)
