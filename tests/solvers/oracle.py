"""Optima by enumeration and by dynamic programming, independent of the library's own evaluation."""

from __future__ import annotations

import numpy as np

from lqlora.solvers import Problem, Solution, Status


def brute_force(problem: Problem) -> float:
    """Return the least cost of all assignments, infinite if none is feasible."""
    rows, columns = problem.cost.shape
    choices = np.indices((columns,) * rows).reshape(rows, -1)
    across = np.arange(rows)[:, None]
    feasible = problem.allowed[across, choices].all(axis=0)
    for tie in set(problem.ties.tolist()):
        tied = choices[problem.ties == tie]
        feasible &= (tied == tied[0]).all(axis=0)
    sizes = problem.size[across, choices]
    for budget in problem.budgets:
        use = (sizes if budget.members is None else sizes[np.asarray(budget.members, dtype=bool)]).sum(axis=0)
        feasible &= use >= (budget.lower or 0)
        if budget.upper is not None:
            feasible &= use <= budget.upper
    costs = np.where(problem.allowed, problem.cost, 0.0)[across, choices].sum(axis=0)
    return float(costs[feasible].min(initial=np.inf))


def check_against_brute_force(problem: Problem, found: Solution) -> None:
    """Assert that a solution is optimal and feasible, and that its bound is a lower bound."""
    expected = brute_force(problem)
    if np.isinf(expected):
        assert found.status is Status.INFEASIBLE
        assert found.assignment is None
        return
    assert found.status is Status.OPTIMAL
    assert found.bound <= expected + 1e-12 * abs(expected)
    np.testing.assert_allclose(found.objective, expected, rtol=1.001e-6, atol=0)
    # With only this assignment allowed, the same enumeration tells whether it is feasible and what it costs.
    only = np.zeros_like(problem.allowed)
    only[np.arange(len(only)), found.assignment] = True
    alone = Problem(problem.cost, problem.size, only & problem.allowed, problem.ties, problem.budgets)
    np.testing.assert_allclose(brute_force(alone), found.objective, rtol=1e-15)


def dynamic_program(problem: Problem) -> float:
    """Return the least cost under one upper limit on all rows, by dynamic programming over capacities."""
    capacity = problem.budgets[0].upper
    best = np.zeros(capacity + 1)
    for cost, size in zip(problem.cost, problem.size, strict=True):
        after = np.full(capacity + 1, np.inf)
        for c, s in zip(cost, size, strict=True):
            if s <= capacity:
                np.minimum(after[s:], best[: capacity + 1 - s] + c, out=after[s:])
        best = after
    return float(best[-1])
