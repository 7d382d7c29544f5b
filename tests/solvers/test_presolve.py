"""The presolve keeps an optimum, and scales costs and sizes for the absolute tolerances of solvers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError
from lqlora.solvers import Budget, Problem, reduce_problem
from tests.solvers.oracle import brute_force

COSTS = st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 7.25])


def _table(draw, values, rows, columns, dtype):
    cells = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return np.array(cells, dtype=dtype).reshape(rows, columns)


@st.composite
def problems(draw, *, lower_limits: bool) -> Problem:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cost = _table(draw, COSTS, rows, columns, np.float64)
    size = _table(draw, st.integers(0, 6), rows, columns, np.int64) * draw(st.sampled_from([1, 8, 24]))
    lower = draw(st.integers(0, int(size.max()))) if lower_limits else None
    members = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    budgets = [Budget(upper=draw(st.integers(0, int(size.sum()))), lower=lower)]
    budgets.append(Budget(upper=draw(st.integers(0, int(size.sum()))), members=members))
    ties = draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    return Problem(cost, size, ties=ties, budgets=budgets)


def _reduced_optimum(problem: Problem) -> float:
    """Return the least objective of the reduced program by enumeration, in the units of the problem."""
    reduced = reduce_problem(problem)
    groups = [np.flatnonzero(reduced.group == g) for g in range(reduced.choose.shape[0])]
    best = np.inf
    for pick in itertools.product(*groups):
        x = np.zeros(len(reduced.cost))
        x[list(pick)] = 1
        use = reduced.use @ x
        if (reduced.lower <= use).all() and (use <= reduced.upper).all():
            best = min(best, reduced.constant + reduced.unit * float(reduced.cost @ x))
    return best


@settings(max_examples=60, deadline=None)
@given(problems(lower_limits=False))
def test_pruning_loses_no_optimum(problem):
    np.testing.assert_allclose(_reduced_optimum(problem), brute_force(problem), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems(lower_limits=True))
def test_lower_limits_lose_no_optimum(problem):
    np.testing.assert_allclose(_reduced_optimum(problem), brute_force(problem), rtol=1e-12, atol=1e-12)


def test_a_dominated_choice_is_pruned():
    problem = Problem([[3.0, 2.0, 1.0]], [[4, 2, 9]], budgets=[Budget(upper=9)])
    assert reduce_problem(problem).column.tolist() == [1, 2]


def test_of_equal_choices_the_first_stays():
    problem = Problem([[2.0, 2.0]], [[4, 4]], budgets=[Budget(upper=9)])
    assert reduce_problem(problem).column.tolist() == [0]


def test_with_a_lower_limit_nothing_is_pruned():
    problem = Problem([[3.0, 2.0, 1.0]], [[4, 2, 9]], budgets=[Budget(upper=9), Budget(lower=1)])
    assert reduce_problem(problem).column.tolist() == [1, 0, 2]


def test_with_a_lower_limit_the_dearer_of_two_equal_sizes_is_pruned():
    problem = Problem([[3.0, 2.0, 1.0]], [[4, 9, 9]], budgets=[Budget(upper=9, lower=5)])
    assert reduce_problem(problem).column.tolist() == [0, 2]


def test_a_choice_smaller_under_one_budget_only_is_kept():
    # The second row counts under one budget alone, so its larger and dearer choice is still never better; the tied
    # first row makes the sums differ per budget.
    size = [[4, 1], [1, 6]]
    budgets = [Budget(upper=10, members=np.array([True, False])), Budget(upper=10, members=np.array([False, True]))]
    problem = Problem([[1.0, 1.5], [1.0, 1.5]], size, ties=[0, 0], budgets=budgets)
    assert reduce_problem(problem).column.tolist() == [0, 1]


def test_tied_rows_become_one_group():
    problem = Problem([[3.0, 1.0], [5.0, 2.0], [4.0, 1.0]], [[2, 4]] * 3, ties=[9, 3, 9], budgets=[Budget(upper=99)])
    reduced = reduce_problem(problem)
    assert reduced.choose.shape[0] == 2
    assert reduced.group_of_row.tolist() == [1, 0, 1]


def test_sizes_are_divided_by_their_common_divisor_and_limits_round_inwards():
    problem = Problem([[3.0, 1.0]], [[800, 1200]], budgets=[Budget(upper=1199, lower=401)])
    reduced = reduce_problem(problem)
    assert reduced.use.toarray().tolist() == [[0.0, 1.0]]
    assert (reduced.lower.tolist(), reduced.upper.tolist()) == ([-np.inf], [0.0])


def test_limits_that_cannot_bind_are_dropped():
    reduced = reduce_problem(Problem([[3.0, 1.0]], [[800, 1200]], budgets=[Budget(upper=1200, lower=800)]))
    assert (reduced.lower.tolist(), reduced.upper.tolist()) == ([-np.inf], [np.inf])


def test_a_lower_limit_rounds_up():
    reduced = reduce_problem(Problem([[3.0, 1.0, 0.5]], [[0, 400, 800]], budgets=[Budget(lower=401)]))
    assert reduced.lower.tolist() == [2.0]


def test_reduction_in_pieces_equals_reduction_at_once():
    rng = np.random.default_rng(0)
    ties = rng.integers(0, 30, 50)
    members = [rng.random(50) < 0.5 for _ in range(2)]
    budgets = [Budget(upper=5000, members=mask) for mask in members]
    problem = Problem(
        rng.exponential(size=(50, 9)), rng.integers(0, 99, (50, 9)), rng.random((50, 9)) < 0.9, ties, budgets
    )
    whole = reduce_problem(problem)
    pieces = reduce_problem(problem, cells=40)
    for name in ("cost", "group", "column", "lower", "upper"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))
    assert (pieces.use != whole.use).nnz == 0


def test_sizes_that_add_up_to_2_53_units_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"size.*2\*\*53.*budget 0"):
        reduce_problem(Problem([[3.0, 1.0, 0.5]], [[0, 2**60, 2**60 + 1]], budgets=[Budget(upper=2**60)]))


def test_costs_are_of_order_one_whatever_their_scale():
    rng = np.random.default_rng(0)
    cost, size = rng.exponential(size=(6, 5)), rng.integers(1, 50, (6, 5))
    for scale in (1e-30, 1e-12, 1.0, 1e12):
        reduced = reduce_problem(Problem(cost * scale, size, budgets=[Budget(upper=120)]))
        positive = reduced.cost[reduced.cost > 0]
        np.testing.assert_allclose(np.median(positive), 1.0)
        assert reduced.cost.min() == 0.0


def test_a_vector_with_rounding_errors_gives_the_nearest_choice():
    problem = Problem([[3.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6)])
    reduced = reduce_problem(problem)
    clean = np.array([1.0, 0.0, 0.0, 1.0])
    assert reduced.assignment(clean + np.array([-1e-7, 1e-7, 1e-9, -1e-7])).tolist() == [0, 1]
