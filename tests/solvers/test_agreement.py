"""All installed exact solvers agree on fifty problems."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import solvers
from lqlora.solvers import Budget, Problem, SolveOptions, Status, solve
from tests.requirements import require_or_skip

#: Exact solvers that need no license for problems of this size. CP-SAT is left out: it starts a process for each.
ALWAYS, WHERE_INSTALLED = ("mckp", "highs", "scipy"), ("cbc", "scip", "gurobi")


def _problem(seed: int) -> Problem:
    """Return costs that fall with bits and sizes with large common factors; every fifth problem has nested budgets."""
    rng = np.random.default_rng(seed)
    rows, columns = 8 if seed % 5 == 0 else 24, 12
    bits = np.sort(rng.integers(2 * 1024, 8 * 1024, columns))
    size = rng.choice([1, 4, 11, 28], (rows, 1)) * bits * 4096
    cost = rng.lognormal(sigma=1.5, size=(rows, 1)) * 4.0 ** (-bits / 1024) * rng.uniform(0.8, 1.25, (rows, columns))
    least, most = size.min(axis=1), size.max(axis=1)
    share, mask = rng.uniform(0.02, 0.8), rng.random(rows) < 0.5
    budgets = [Budget(upper=int((least + share * (most - least)).sum()))]
    if seed % 5 == 0:
        budgets.append(Budget(upper=int((least + 0.8 * share * (most - least))[mask].sum()), members=mask))
    return Problem(cost, size, budgets=budgets)


@pytest.mark.parametrize("group", [0, *(pytest.param(group, marks=pytest.mark.slow) for group in range(1, 5))])
def test_exact_solvers_agree_within_the_gap_on_ten_problems(group):
    installed = solvers.available()
    for name in ALWAYS:
        require_or_skip(name, installed[name])
    names = (*ALWAYS, *(name for name in WHERE_INSTALLED if installed[name]))
    for seed in range(10 * group, 10 * group + 10):
        problem = _problem(seed)
        found = [solve(problem, name, SolveOptions(rel_gap=1e-6)) for name in names]
        assert {one.status for one in found} == {Status.OPTIMAL}
        assert all(one.used[0] <= problem.budgets[0].upper for one in found)
        objectives = np.array([one.objective for one in found])
        np.testing.assert_allclose(objectives, objectives.min(), rtol=1.001e-6)
        # The bound of one solver holds for the answers of the others.
        assert max(one.bound for one in found) <= objectives.min() * (1 + 1e-9)
