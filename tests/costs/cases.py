"""Shared cases of cost tables: a few matrices of different scales, formats, a table of them, and equality of tables."""

from __future__ import annotations

import numpy as np

import lqlora as lq

FORMATS = tuple(
    lq.BlockFormat.parse(text)
    for text in ("nf2/16:float16", "nf3/64:u8/256:float32", "nf3/16:float16", "nf4/32:float16", "nf8/64:float32")
)
NF2, NF4, NF8 = FORMATS[0], FORMATS[3], FORMATS[4]
SHAPES = {"layers.0.q": (16, 24), "layers.0.up": (40, 16), "layers.1.q": (16, 24), "layers.1.up": (40, 16)}


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    scales = [1.0, 0.3, 5.0, 0.05]
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for (name, shape), scale in zip(SHAPES.items(), scales, strict=True)
    }


def small_table() -> lq.CostTable:
    """Return the table of four matrices in five formats, computed by decompositions."""
    return lq.cost_table(matrices(), FORMATS, rank=2)


def make_table(shapes, configurations, costs) -> lq.CostTable:
    """Return a table of given costs with true sizes. Factors take 16 bits an entry."""
    names = tuple(f"m{i}" for i in range(len(shapes)))
    sizes = np.array([[own.format.storage_bits(shape) for own in configurations] for shape in shapes])
    factors = np.array([[16 * own.rank * sum(shape) for own in configurations] for shape in shapes])
    return lq.CostTable(names, tuple(shapes), tuple(configurations), np.array(costs, dtype=np.float64), sizes, factors)


def same(first: lq.CostTable, second: lq.CostTable) -> bool:
    return (
        (first.names, first.shapes, first.configurations) == (second.names, second.shapes, second.configurations)
        and first.costs.tobytes() == second.costs.tobytes()
        and first.sizes.tobytes() == second.sizes.tobytes()
        and first.factor_sizes.tobytes() == second.factor_sizes.tobytes()
    )
