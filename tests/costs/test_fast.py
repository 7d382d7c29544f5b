"""Fast cost tables: costs near those of separate decompositions, for a fraction of the work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lqlora as lq
from lqlora.costs import _fast
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import Elementwise, InputGram, Kronecker, RowColumn
from tests.costs.cases import FORMATS, matrices, same
from tests.strategies import host
from tests.weighting.cases import gram

#: Codes of 3 and 4 bits in blocks of 32, with half of the scale formats of the grid.
FORMATS_OF_GRID = [
    fmt for fmt in lq.paper_grid("paper") if fmt.block_size == 32 and fmt.bits > 2 and fmt.scales.block_size > 16
]


def matrix(rows=192, columns=160, seed=0):
    """Return a matrix of noise, outliers, and directions that a low-rank part can represent."""
    rng = np.random.default_rng(seed)
    low_rank = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, columns)) / 8
    return ((rng.standard_t(6, (rows, columns)) + low_rank) * 0.02).astype(np.float32)


def near_best(table, row=0, factor=1.5):
    """Mark the configurations whose cost is within a factor of the least at no larger size."""
    costs, sizes = table.costs[row], table.sizes[row]
    return np.array([cost <= factor * costs[sizes <= size].min() for cost, size in zip(costs, sizes, strict=True)])


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", ["uniform", "row-column", "elementwise", "surrogate", "gram", "kronecker"])
@pytest.mark.parametrize("shape", [(192, 160), (160, 224)])
def test_costs_are_near_those_of_decompositions(kind, shape):
    rng = np.random.default_rng(3)
    fisher = (rng.exponential(size=shape) * np.exp(rng.standard_normal((1, shape[1])))).astype(np.float32)
    norm = {
        "uniform": lambda: None,
        "row-column": lambda: RowColumn(fisher[:, 0], fisher[0]),
        "elementwise": lambda: Elementwise(fisher),
        "surrogate": lambda: Elementwise(fisher, sweeps=0),
        "gram": lambda: InputGram(gram(rng, shape[1]).astype(np.float32)),
        "kronecker": lambda: Kronecker(*(gram(rng, size).astype(np.float32) for size in shape)),
    }[kind]()
    options = {"rank": 12, "weighting": None if norm is None else {"a": norm}}
    exact = lq.cost_table({"a": matrix(*shape)}, FORMATS_OF_GRID, **options)
    fast = lq.cost_table({"a": matrix(*shape)}, FORMATS_OF_GRID, mode="fast", **options)
    error = np.abs(fast.costs / exact.costs - 1)[0, near_best(exact)]
    # Small matrices have few second-level blocks, so the error of a coarse format is a matter of chance.
    assert np.median(error) < 0.03
    assert np.quantile(error, 0.8) < 0.06
    assert fast.sizes.tolist() == exact.sizes.tolist()


@pytest.mark.slow
def test_the_whole_grid_is_near_and_in_order_and_few_of_it_are_decomposed(monkeypatch):
    calls = []
    monkeypatch.setattr(_fast, "iterate", lambda *own: calls.append(1) or iterate(*own))
    iterate = lq.decomposition.iteration.iterate
    weights, formats = {"a": matrix(384, 320)}, lq.paper_grid("code")
    exact = lq.cost_table(weights, formats, rank=16)
    assert not calls
    fast = lq.cost_table(weights, formats, rank=16, mode="fast")
    assert len(calls) < len(formats) / 6
    near = near_best(exact)
    ratio = fast.costs[0, near] / exact.costs[0, near]
    assert near.sum() > 200
    assert abs(np.median(ratio) - 1) < 0.01
    assert np.quantile(np.abs(ratio - 1), 0.98) < 0.05
    # With scales of two bits the error is so large that the share of a low-rank part varies.
    assert np.abs(ratio - 1).max() < 0.15
    order = np.argsort(exact.costs[0, near])
    assert np.corrcoef(np.arange(len(order)), np.argsort(np.argsort(fast.costs[0, near]))[order])[0, 1] > 0.998


def test_one_format_alone_costs_what_its_decomposition_does():
    w = matrix()
    for fmt in FORMATS_OF_GRID[::7]:
        fast = lq.cost_table({"a": w}, [fmt], rank=12, mode="fast").costs[0, 0]
        exact = lq.cost_table({"a": w}, [fmt], rank=12).costs[0, 0]
        assert exact <= fast * (1 + 1e-5)  # it is refitted at the end
        np.testing.assert_allclose(fast, exact, rtol=1e-2)


def test_smaller_ranks_are_near_too():
    ranks = [0, 4, 12]
    exact = lq.cost_table({"a": matrix()}, FORMATS_OF_GRID, ranks=ranks)
    fast = lq.cost_table({"a": matrix()}, FORMATS_OF_GRID, ranks=ranks, mode="fast")
    error = np.abs(fast.costs / exact.costs - 1)[0].reshape(-1, 3)
    assert (np.median(error, axis=0) < 0.01).all()
    costs = fast.costs[0].reshape(-1, 3)
    assert (np.diff(costs, axis=1) < 0).all()


def test_the_ranks_of_a_small_matrix_may_be_clipped():
    weights = {"a": matrix(8, 40)}
    with pytest.raises(InvalidArgumentError, match="clip_rank"):
        lq.cost_table(weights, FORMATS, ranks=[4, 12], mode="fast")
    clipped = lq.cost_table(weights, FORMATS, ranks=[8, 12], mode="fast", clip_rank=True)
    assert clipped.costs[0, ::2].tolist() == clipped.costs[0, 1::2].tolist()


def test_the_order_of_matrices_and_where_they_are_computed_changes_no_bit():
    weights = matrices()
    found = lq.cost_table(weights, FORMATS, rank=2, mode="fast")
    with ThreadPoolExecutor(3) as pool:
        assert same(lq.cost_table(weights, FORMATS, rank=2, mode="fast", executor=pool), found)


def test_every_library_has_the_same_costs(fast_xp):
    weights = {name: fast_xp.asarray(w) for name, w in matrices().items()}
    found = lq.cost_table(weights, FORMATS, rank=2, mode="fast")
    np.testing.assert_allclose(found.costs, lq.cost_table(matrices(), FORMATS, rank=2, mode="fast").costs, rtol=1e-4)


def test_a_strict_library_does(strict):
    weights = {"a": strict.asarray(matrices()["layers.0.q"])}
    formats = [lq.BlockFormat.parse(text) for text in ("nf4/16:float32", "nf4/16:u4/8:float32", "nf3/16:float32")]
    found = lq.cost_table(weights, formats, rank=2, mode="fast")
    expected = lq.cost_table({"a": host(weights["a"])}, formats, rank=2, mode="fast")
    np.testing.assert_allclose(found.costs, expected.costs, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_matrix_without_error_costs_nothing(value):
    found = lq.cost_table({"a": np.full((16, 24), value)}, FORMATS, ranks=[0, 2], mode="fast")
    exact = lq.cost_table({"a": np.full((16, 24), value)}, FORMATS, ranks=[0, 2])
    np.testing.assert_allclose(found.costs, exact.costs, atol=1e-9)


def test_an_empty_matrix_costs_nothing():
    assert not lq.cost_table({"a": np.zeros((0, 4))}, FORMATS, rank=0, mode="fast").costs.any()


def test_nan_names_the_matrix():
    weights = {**matrices(), "bad": np.full((4, 4), np.nan)}
    with pytest.raises(NonFiniteError, match="bad"):
        lq.cost_table(weights, FORMATS, rank=2, mode="fast")


@pytest.mark.parametrize(
    "option",
    [{"init": "svd"}, {"max_iter": 3}, {"fit": "scale"}, {"rtol": 0.1}, {"factor_format": FORMATS[0]}],
    ids=str,
)
def test_options_that_it_does_not_have_are_refused_by_name(option):
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(option))} .*mode='fast'"):
        lq.cost_table(matrices(), FORMATS, rank=2, mode="fast", **option)
