"""Primal heuristics: what they return meets every limit, or they return None."""

from __future__ import annotations

import numpy as np

from lqlora.solvers import Budget, Problem, evaluate, heuristics, reduce_problem


def _problem(seed: int, *, lower: bool) -> Problem:
    """Return a problem with a limit on the total and limits on each of four layers."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 9, (24, 1)) * np.array([2, 3, 4, 8]) * 64
    cost = rng.lognormal(size=(24, 1)) * 4.0 ** -np.array([2, 3, 4, 8])
    budgets = [Budget(upper=int(1.6 * size[:, 0].sum()))]
    for layer in range(4):
        members = np.arange(24) // 6 == layer
        least = int(size[members, 0].sum())
        budgets.append(Budget(upper=int(1.9 * least), lower=int(1.2 * least) if lower else None, members=members))
    return Problem(cost, size, budgets=budgets)


def test_one_price_for_all_budgets_gives_a_feasible_assignment():
    for seed in range(20):
        problem = _problem(seed, lower=False)
        reduced = reduce_problem(problem)
        chosen = heuristics.lagrangian_start(reduced)
        objective, _, faults = evaluate(problem, reduced.column[chosen][reduced.group_of_row])
        assert faults == []
        assert objective < problem.cost[:, 0].sum()  # better than the smallest choices


def test_none_if_no_price_gives_a_feasible_assignment():
    # Equal rows change together, from 8 bits to 4.
    problem = Problem([[3.0, 1.0], [3.0, 1.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=6, lower=5)])
    assert heuristics.lagrangian_start(reduce_problem(problem)) is None


def test_random_assignments_are_repaired():
    mended = 0
    for seed in range(20):
        problem = _problem(seed, lower=True)
        reduced = reduce_problem(problem)
        rng = np.random.default_rng(seed)
        chosen = rng.integers(reduced.first, np.append(reduced.first[1:], len(reduced.cost)))
        found = heuristics.repair(reduced, chosen)
        if found is not None:
            mended += 1
            assert evaluate(problem, reduced.column[found][reduced.group_of_row])[2] == []
    assert mended > 15


def test_none_if_no_single_change_reduces_the_violation():
    problem = Problem([[3.0, 1.0], [3.0, 1.0]], [[2, 4], [2, 4]], budgets=[Budget(upper=7, lower=7)])
    assert heuristics.repair(reduce_problem(problem), np.array([1, 3])) is None
