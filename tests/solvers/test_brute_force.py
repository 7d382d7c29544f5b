"""Five hundred small problems with ties, masks, several budgets and lower limits, against enumeration."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import solvers
from lqlora.solvers import Budget, Problem, solve
from tests.requirements import require_or_skip
from tests.solvers.oracle import check_against_brute_force


def _problem(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 6), rng.integers(1, 6)
    scale = 10.0 ** rng.choice([-12, -3, 0, 6, 12])
    # Few different values make ties between costs; many make the knapsack hard.
    cost = scale * (rng.integers(0, 4, (rows, columns)) if seed % 3 == 0 else rng.lognormal(0, 1.5, (rows, columns)))
    size = rng.integers(0, [5, 40, 1000][seed % 3], (rows, columns)) * rng.choice([1, 8, 2**33])
    allowed = rng.random((rows, columns)) < rng.choice([0.6, 1.0])
    allowed[~allowed.any(axis=1)] = True
    ties = rng.integers(0, rows, rows) if seed % 4 == 0 else np.arange(rows)
    return Problem(cost, size, allowed, ties, _budgets(rng, size, seed % 5))


def _budgets(rng: np.random.Generator, size: np.ndarray, kind: int) -> list[Budget]:
    """Return a total, disjoint budgets, nested budgets, lower limits, or none; some too tight, some not binding."""
    least, most = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())

    def limit(share: float) -> int:
        return max(0, int(least + (most - least) * share))

    mask = rng.random(len(size)) < 0.5
    share = rng.uniform(-0.1, 1.05)
    return [
        [Budget(upper=limit(share))],
        [Budget(upper=limit(share * 0.7), members=mask), Budget(upper=limit(share * 0.7), members=~mask)],
        [Budget(upper=limit(share)), Budget(upper=limit(share * 0.6), members=mask)],
        [Budget(upper=limit(share + 0.2), lower=limit(share))],
        [] if rng.random() < 0.1 else [Budget(upper=limit(share))],
    ][kind]


@pytest.mark.parametrize("name", ["mckp", "highs"])
@pytest.mark.parametrize("group", [0, *(pytest.param(group, marks=pytest.mark.slow) for group in range(1, 5))])
def test_a_hundred_small_problems_equal_brute_force(name, group):
    require_or_skip(name, solvers.available()[name])
    for seed in range(100 * group, 100 * group + 100):
        problem = _problem(seed)
        check_against_brute_force(problem, solve(problem, name))
