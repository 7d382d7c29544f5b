"""Cost tables."""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import Elementwise

FORMATS = tuple(
    lq.BlockFormat.parse(text)
    for text in ("nf2/16:float16", "nf3/64:u8/256:float32", "nf3/16:float16", "nf4/32:float16", "nf8/64:float32")
)
NF2, NF4, NF8 = FORMATS[0], FORMATS[3], FORMATS[4]
SHAPES = {"layers.0.q": (16, 24), "layers.0.up": (40, 16), "layers.1.q": (16, 24), "layers.1.up": (40, 16)}


def _matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    scales = [1.0, 0.3, 5.0, 0.05]
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for (name, shape), scale in zip(SHAPES.items(), scales, strict=True)
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return _matrices()


@pytest.fixture(scope="module")
def table(weights) -> lq.CostTable:
    return lq.cost_table(weights, FORMATS, rank=2)


def _same(first: lq.CostTable, second: lq.CostTable) -> bool:
    return (
        (first.names, first.shapes, first.configurations) == (second.names, second.shapes, second.configurations)
        and first.costs.tobytes() == second.costs.tobytes()
        and first.sizes.tobytes() == second.sizes.tobytes()
        and first.factor_sizes.tobytes() == second.factor_sizes.tobytes()
    )


class TestCostTable:
    def test_every_cell_is_the_error_of_a_decomposition(self, weights, table):
        for i, name in enumerate(table.names):
            for j, fmt in enumerate(table.formats):
                direct = lq.decompose(weights[name], fmt, 2, init="quantize", max_iter=2)
                assert table.costs[i, j] == direct.squared_error
                residual = weights[name].astype(np.float64) - direct.reconstruct()
                np.testing.assert_allclose(table.costs[i, j], (residual**2).sum(), rtol=1e-4)

    def test_weightings_are_used(self, weights):
        fisher = {name: np.full(w.shape, 0.25, dtype=np.float32) for name, w in weights.items()}
        fisher["layers.1.q"][3] = 100.0
        norms = {name: Elementwise(values) for name, values in fisher.items()}
        weighted = lq.cost_table(weights, FORMATS[:1], rank=2, weighting=norms)
        for i, name in enumerate(weighted.names):
            direct = lq.decompose(weights[name], NF2, 2, weighting=norms[name], init="quantize", max_iter=2)
            residual = weights[name].astype(np.float64) - direct.reconstruct()
            np.testing.assert_allclose(weighted.costs[i, 0], (fisher[name] * residual**2).sum(), rtol=1e-4)

    def test_sizes_are_storage_bits(self, table):
        expected = [[fmt.storage_bits(shape) for fmt in FORMATS] for shape in SHAPES.values()]
        assert table.sizes.tolist() == expected
        assert table.sizes.dtype == np.int64

    def test_weight_count(self, table):
        assert table.weight_count == 2 * (16 * 24 + 40 * 16)

    def test_loaders_are_called_once_each_and_give_the_same_table(self, weights, table):
        calls = []

        def loader(name):
            def load():
                calls.append(name)
                return weights[name]

            return load

        lazy = lq.cost_table({name: loader(name) for name in weights}, FORMATS, rank=2)
        assert sorted(calls) == sorted(weights)
        assert _same(lazy, table)

    @pytest.mark.parametrize("workers", [1, 4])
    def test_threads_do_not_change_a_bit(self, weights, table, workers):
        with ThreadPoolExecutor(workers) as pool:
            assert _same(lq.cost_table(weights, FORMATS, rank=2, executor=pool), table)

    def test_processes_do_not_change_a_bit(self, weights):
        few = dict(itertools.islice(weights.items(), 2))
        # Forked children of a process that has threads may hang, so they are started afresh.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = lq.cost_table(few, FORMATS[:2], rank=1, executor=pool)
        assert _same(found, lq.cost_table(few, FORMATS[:2], rank=1))

    def test_progress_counts_matrices(self, weights):
        seen = []
        lq.cost_table(weights, FORMATS[:1], rank=0, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def test_nan_names_the_matrix(self, weights):
        bad = weights["layers.0.up"].copy()
        bad[3, 5] = np.nan
        with pytest.raises(NonFiniteError, match=r"layers\.0\.up"):
            lq.cost_table({**weights, "layers.0.up": bad}, FORMATS, rank=2)

    def test_an_error_of_a_loader_is_passed_on(self, weights):
        def load():
            raise FileNotFoundError("shard 3")

        with pytest.raises(FileNotFoundError, match="shard 3"):
            lq.cost_table({**weights, "lost": load}, FORMATS[:1], rank=0)

    @pytest.mark.parametrize(
        ("matrices", "formats", "options"),
        [
            ({}, FORMATS, {}),
            (_matrices(), (), {}),
            (_matrices(), (NF4, NF4), {}),
            (_matrices(), FORMATS, {"weighting": {"layers.9.q": Elementwise(np.ones((16, 24)))}}),
            (_matrices(), FORMATS, {"rank": 17}),
        ],
        ids=["no matrices", "no formats", "format twice", "weighting of an unknown matrix", "rank too large"],
    )
    def test_bad_arguments_are_refused(self, matrices, formats, options):
        with pytest.raises(InvalidArgumentError):
            lq.cost_table(matrices, formats, **{"rank": 2, **options})


@pytest.mark.filterwarnings("ignore:All weights are zero")
def test_a_matrix_without_fisher_information_costs_nothing():
    dead, live = np.zeros((8, 8)), np.full((8, 8), 1e-8)
    weighting = {"dead": lq.weighting.Elementwise(dead), "live": lq.weighting.Elementwise(live)}
    weights = dict.fromkeys(weighting, np.random.default_rng(0).standard_normal((8, 8)))
    table = lq.cost_table(weights, FORMATS, rank=1, weighting=weighting)
    assert (table.costs[0] == 0).all()
    assert (table.costs[1] > 0).all()
