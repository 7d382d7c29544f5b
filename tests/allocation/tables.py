"""Cost tables to allocate from, and answers found by trying every assignment."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import strategies as st

import lqlora as lq

FORMATS = tuple(
    lq.BlockFormat.parse(text)
    for text in ("nf2/16:float16", "nf3/64:u8/256:float32", "nf3/16:float16", "nf4/32:float16", "nf8/64:float32")
)
NF2, NF4, NF8 = FORMATS[0], FORMATS[3], FORMATS[4]
SHAPES = {"layers.0.q": (16, 24), "layers.0.up": (40, 16), "layers.1.q": (16, 24), "layers.1.up": (40, 16)}


def small_table() -> lq.CostTable:
    """Four matrices in five formats, really decomposed."""
    rng = np.random.default_rng(7)
    scales = [1.0, 0.3, 5.0, 0.05]
    weights = {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for (name, shape), scale in zip(SHAPES.items(), scales, strict=True)
    }
    return lq.cost_table(weights, FORMATS, rank=2)


def make_table(shapes, configurations, costs) -> lq.CostTable:
    """A table of given costs and true sizes; factors take 16 bits an entry."""
    names = tuple(f"m{i}" for i in range(len(shapes)))
    sizes = np.array([[own.format.storage_bits(shape) for own in configurations] for shape in shapes])
    factors = np.array([[16 * own.rank * sum(shape) for own in configurations] for shape in shapes])
    return lq.CostTable(names, tuple(shapes), tuple(configurations), np.array(costs, dtype=np.float64), sizes, factors)


@st.composite
def tables(draw, ranks=(0,), formats=None, max_rows=4) -> lq.CostTable:
    """Tables of some formats, of all by default, whose costs differ by many orders of magnitude and are sometimes equal."""
    formats = FORMATS if formats is None else formats
    rows = draw(st.integers(1, max_rows))
    shapes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(rows)]
    configurations = [lq.Configuration(fmt, rank) for fmt in formats for rank in ranks]
    cells = st.builds(lambda x, e: x * 10.0**e, st.integers(0, 99), st.integers(-15, -9))
    count = rows * len(configurations)
    costs = np.array(draw(st.lists(cells, min_size=count, max_size=count))).reshape(rows, -1)
    return make_table(shapes, configurations, costs)


class Everything:
    """Every assignment of a table, with its sum of costs and its bits: what a plan is compared with.

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
        """Bits of some rows in every assignment."""
        each = self.size[self._rows, self.columns]
        return each.sum(axis=1) if rows is None else each[:, rows].sum(axis=1)

    def keep(self, valid) -> Everything:
        """Rule assignments out."""
        self.valid &= valid
        return self

    @property
    def least_cost(self) -> float:
        return float(self.costs[self.valid].min())

    @property
    def fewest_bits(self) -> int:
        return int(self.bits()[self.valid].min())
