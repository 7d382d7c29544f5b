"""Strategies for cost tables, and optimal answers found by trying every assignment."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import strategies as st

import lqlora as lq
from tests.costs.cases import FORMATS, make_table


@st.composite
def tables(draw, ranks=(0,), formats=None, max_rows=4) -> lq.CostTable:
    """Draw tables of some formats, with costs that differ by many orders of magnitude and are sometimes equal."""
    formats = FORMATS if formats is None else formats
    rows = draw(st.integers(1, max_rows))
    shapes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(rows)]
    configurations = [lq.Configuration(fmt, rank) for fmt in formats for rank in ranks]
    cells = st.builds(lambda x, e: x * 10.0**e, st.integers(0, 99), st.integers(-15, -9))
    count = rows * len(configurations)
    costs = np.array(draw(st.lists(cells, min_size=count, max_size=count))).reshape(rows, -1)
    return make_table(shapes, configurations, costs)


class Everything:
    """Every assignment of a table, with its sum of costs and its bits, to compare plans with.

    Parameters
    ----------
    table : CostTable
        Small.
    counts_factors : bool
        Whether the bits of the factors count.
    """

    def __init__(self, table: lq.CostTable, *, counts_factors: bool = False) -> None:
        rows, columns = table.costs.shape
        self.columns = np.array(list(itertools.product(range(columns), repeat=rows)))
        self.size = table.sizes + table.factor_sizes if counts_factors else table.sizes
        self.costs = np.array([math.fsum(row) for row in table.costs[np.arange(rows), self.columns]])
        self.valid = np.ones(len(self.columns), dtype=bool)
        self._rows = np.arange(rows)

    def bits(self, rows=None) -> np.ndarray:
        """Return the bits of some rows in every assignment."""
        each = self.size[self._rows, self.columns]
        return each.sum(axis=1) if rows is None else each[:, rows].sum(axis=1)

    def keep(self, valid) -> Everything:
        """Remove assignments."""
        self.valid &= valid
        return self

    @property
    def least_cost(self) -> float:
        return float(self.costs[self.valid].min())

    @property
    def fewest_bits(self) -> int:
        return int(self.bits()[self.valid].min())
