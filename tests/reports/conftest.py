from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import lqlora as lq
from tests.costs.cases import FORMATS, make_table, small_table
from tests.reports.cases import EXPERTS


@pytest.fixture(scope="session")
def table() -> lq.CostTable:
    return small_table()


@pytest.fixture(scope="session")
def plan(table) -> lq.Plan:
    return lq.allocate(table, bits_per_weight=4.0, limits=[lq.Limit("*.q", bits_per_weight=2, at_least=True)])


@pytest.fixture
def mixture() -> lq.Plan:
    """Return a plan of two layers with three experts each, with ranks 0 and 4 and matrices of two shapes."""
    shapes = [(32, 64) if "experts" in name else (64, 64) for name in EXPERTS]
    configurations = [lq.Configuration(fmt, rank) for fmt in FORMATS for rank in (0, 4)]
    rng = np.random.default_rng(3)
    costs = [[s / fmt.storage_bits((8, 8)) / (1 + r) for fmt in FORMATS for r in (0, 1)] for s in rng.random(8)]
    table = make_table(shapes, configurations, costs)
    return lq.allocate(dataclasses.replace(table, names=tuple(EXPERTS)), bits_per_weight=5)
