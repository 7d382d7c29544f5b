"""Cost tables: values of cells, executors, bad input, and JSON documents."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import Elementwise
from tests.costs.cases import FORMATS, NF2, NF4, SHAPES, matrices, same
from tests.decomposition.cases import SMALL, matrix, small_case


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return matrices()


@pytest.fixture(scope="module")
def table(weights) -> lq.CostTable:
    return lq.cost_table(weights, FORMATS, rank=2)


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

    def test_functions_are_called_for_their_norms(self, weights, tmp_path):
        norms = {name: Elementwise(np.random.default_rng(3).random(w.shape)) for name, w in weights.items()}
        expected = lq.cost_table(weights, FORMATS[:1], rank=2, weighting=norms)
        plain = lq.cost_table(weights, FORMATS[:1], rank=2)
        for store in (None, tmp_path / "costs.jsonl"):
            functions = {name: lambda own=own: own for name, own in norms.items()}
            found = lq.cost_table(weights, FORMATS[:1], rank=2, weighting=functions, store=store)
            assert np.array_equal(found.costs, expected.costs)
            assert not np.array_equal(found.costs, plain.costs)
        with pytest.raises(InvalidArgumentError, match="must return a norm"):
            lq.cost_table(weights, FORMATS[:1], rank=2, weighting={next(iter(weights)): lambda: 3})

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
        assert same(lazy, table)

    @pytest.mark.parametrize("workers", [1, 4])
    def test_threads_do_not_change_a_bit(self, weights, table, workers):
        with ThreadPoolExecutor(workers) as pool:
            assert same(lq.cost_table(weights, FORMATS, rank=2, executor=pool), table)

    def test_processes_do_not_change_a_bit(self, weights):
        few = dict(itertools.islice(weights.items(), 2))
        # Forked children of a process with threads may hang, so new processes are spawned.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = lq.cost_table(few, FORMATS[:2], rank=1, executor=pool)
        assert same(found, lq.cost_table(few, FORMATS[:2], rank=1))

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
            (matrices(), (), {}),
            (matrices(), (NF4, NF4), {}),
            (matrices(), FORMATS, {"weighting": {"layers.9.q": Elementwise(np.ones((16, 24)))}}),
            (matrices(), FORMATS, {"rank": 17}),
        ],
        ids=["no matrices", "no formats", "format twice", "weighting of an unknown matrix", "rank too large"],
    )
    def test_bad_arguments_are_refused(self, matrices, formats, options):
        with pytest.raises(InvalidArgumentError):
            lq.cost_table(matrices, formats, **{"rank": 2, **options})

    def test_a_function_made_on_the_spot_is_refused_by_processes_in_one_sentence(self, weights):
        with (
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
            pytest.raises(InvalidArgumentError, match="picklable"),
        ):
            lq.cost_table({"a": lambda: weights["layers.0.q"]}, FORMATS[:1], rank=1, executor=pool)

    def test_the_start_that_all_formats_share_changes_no_bit(self, weights):
        found = lq.cost_table(weights, FORMATS, rank=2, init="svd")
        for i, name in enumerate(found.names):
            for j, fmt in enumerate(FORMATS):
                assert found.costs[i, j] == lq.decompose(weights[name], fmt, 2, max_iter=2).squared_error

    @pytest.mark.parametrize("options", [{"mode": "quick"}, {"factor_dtype": "float8"}, {"rank": None}, {"ranks": [1]}])
    def test_options_that_contradict_or_do_not_exist_are_refused(self, weights, options):
        with pytest.raises(InvalidArgumentError):
            lq.cost_table(weights, FORMATS, **{"rank": 2, **options})


class TestRanks:
    def test_every_format_is_combined_with_every_rank(self, weights):
        found = lq.cost_table(weights, FORMATS[:2], ranks=[1, 0, 4])
        pairs = itertools.product(FORMATS[:2], [1, 0, 4])
        assert found.configurations == tuple(lq.Configuration(*pair) for pair in pairs)
        assert (found.formats, found.ranks) == (FORMATS[:2], (1, 0, 4))
        for j, (fmt, rank) in enumerate(itertools.product(FORMATS[:2], [1, 0, 4])):
            assert found.costs[0, j] == lq.cost_table(weights, [fmt], rank=rank).costs[0, 0]
        assert (np.diff(found.costs[:, [1, 0, 2]], axis=1) < 0).all()

    @pytest.mark.parametrize(("dtype", "bits"), [("float16", 16), ("bfloat16", 16), ("float32", 32)])
    def test_factors_take_the_bits_of_their_dtype(self, weights, dtype, bits):
        found = lq.cost_table(weights, FORMATS[:1], ranks=[2, 5], factor_dtype=dtype)
        assert found.factor_sizes.dtype == np.int64
        assert found.factor_sizes.tolist() == [[bits * r * (m + n) for r in (2, 5)] for m, n in SHAPES.values()]

    def test_quantized_factors_count_in_cost_and_size(self, weights):
        found = lq.cost_table(weights, [NF2], rank=3, factor_format=NF4)
        for i, name in enumerate(found.names):
            d = lq.decompose(weights[name], NF2, 3, init="quantize", max_iter=2, factor_format=NF4)
            assert found.costs[i, 0] == d.squared_error
            assert found.factor_sizes[i, 0] == 8 * sum(factor.nbytes for factor in d.factors)
            assert found.sizes[i, 0] + found.factor_sizes[i, 0] == d.storage_bits


class TestDocuments:
    def test_the_round_trip_is_identical(self, weights):
        own = lq.BlockFormat(lq.Codebook([-1, 0, 1 / 3], name="ternary"), 8)
        found = lq.cost_table(weights, [NF2, own], ranks=[0, 2])
        found.costs[0, 0] = np.inf
        back = lq.CostTable.from_json(found.to_json())
        assert same(back, found)
        assert back.to_json() == found.to_json()
        assert back.formats[1].codebook.levels.tolist() == own.codebook.levels.tolist()
        json.loads(found.to_json(), parse_constant=pytest.fail)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "3", "null", "{}", "[" * 100_000, '{"lqlora_cost_table": 9}'], ids=lambda text: text[:6]
    )
    def test_text_that_is_no_table_is_refused(self, text):
        with pytest.raises(InvalidArgumentError, match=r"^text "):
            lq.CostTable.from_json(text)

    @pytest.mark.parametrize("key", ["name", "shape", "costs", "sizes", "factor_sizes"])
    @pytest.mark.parametrize("value", [None, "x", [1.5], [[]]])
    def test_a_wrong_row_is_refused(self, table, key, value):
        document = json.loads(table.to_json())
        document["matrices"][0][key] = value
        if key == "name":
            del document["matrices"][0][key]
        with pytest.raises(InvalidArgumentError, match=r"^text "):
            lq.CostTable.from_json(json.dumps(document))

    def test_arrays_of_other_shapes_are_no_table(self, table):
        with pytest.raises(InvalidArgumentError, match=r"^sizes "):
            lq.CostTable(
                table.names, table.shapes, table.configurations, table.costs, table.sizes[:1], table.factor_sizes
            )


@pytest.mark.filterwarnings("ignore:weights must have entries above zero")
def test_a_matrix_without_fisher_information_costs_nothing():
    dead, live = np.zeros((8, 8)), np.full((8, 8), 1e-8)
    weighting = {"dead": lq.weighting.Elementwise(dead), "live": lq.weighting.Elementwise(live)}
    weights = dict.fromkeys(weighting, np.random.default_rng(0).standard_normal((8, 8)))
    table = lq.cost_table(weights, FORMATS, rank=1, weighting=weighting)
    assert (table.costs[0] == 0).all()
    assert (table.costs[1] > 0).all()


def test_fitted_levels_count():
    w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    fmt, options = lq.BlockFormat.parse("nf3/64:float16"), {"fit": "levels+scale", "max_iter": 2}
    table = lq.cost_table({"a": w}, [fmt], rank=2, **options)
    found = lq.decompose(w, fmt, 2, **options).quantized
    assert table.configurations[0].format == found.format != fmt
    assert table.sizes.tolist() == [[8 * found.nbytes]]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["row-column", "elementwise", "gram"])
def test_costs_are_in_the_unit_of_the_importance_or_refused(mode, kind):
    w, formats = {"a": matrix(0, *SMALL)}, FORMATS[:3]
    own = small_case(kind)
    for exponent in (-900, -440, 0, 440, 900):
        weighting = own.scaled(2.0**exponent).on(np)
        if kind == "row-column" and abs(exponent) == 900:  # 2**1800
            with pytest.raises(InvalidArgumentError, match=r"^weighting .* 1e-288 .* got about 1e"):
                lq.cost_table(w, formats, ranks=[0, 2], mode=mode, weighting={"a": weighting})
            continue
        found = lq.cost_table(w, formats, ranks=[0, 2], mode=mode, weighting={"a": weighting}).costs
        plain = lq.cost_table(w, formats, ranks=[0, 2], mode=mode, weighting={"a": own.on(np)}).costs
        assert found.tolist() == np.ldexp(plain, exponent * len(own.weights)).tolist()
