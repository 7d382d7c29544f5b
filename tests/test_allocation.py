"""Cost tables, plans within budgets, and plans as documents."""

from __future__ import annotations

import itertools
import json
import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import Elementwise
from tests.requirements import require_or_skip

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


class TestDocuments:
    @pytest.fixture
    def plan(self, table) -> lq.Plan:
        return lq.allocate(table, bits_per_weight=4.0)

    def test_the_round_trip_is_identical(self, plan):
        back = lq.Plan.from_json(plan.to_json())
        assert back == plan
        assert back.to_json() == plan.to_json()
        assert back.formats == plan.formats
        assert (back.objective, back.bound, back.costs) == (plan.objective, plan.bound, plan.costs)
        assert back.bits_per_weight == plan.bits_per_weight

    def test_equal_inputs_give_equal_text(self, table, plan):
        assert lq.allocate(table, bits_per_weight=4.0).to_json() == plan.to_json()

    @pytest.mark.parametrize("name", ["ternary", "nf4"])  # the second is not what its name stands for
    def test_a_codebook_of_ones_own_is_written_with_its_levels(self, name):
        ternary = lq.BlockFormat(lq.Codebook([-1, 0, 1 / 3], name=name), 8)
        plan = lq.allocate(lq.cost_table({"a": np.eye(8)}, [ternary], rank=0), bits_per_weight=9)
        back = lq.Plan.from_json(plan.to_json())
        assert back == plan
        assert back.formats["a"].codebook.levels.tolist() == ternary.codebook.levels.tolist()

    def test_the_document_is_readable(self, plan):
        document = json.loads(plan.to_json())
        assert list(document["matrices"]) == list(SHAPES)
        assert document["storage_bits"] == plan.storage_bits
        assert document["matrices"]["layers.0.q"]["format"] == str(plan.formats["layers.0.q"])

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"', "{}", "[" * 100_000], ids=lambda t: t[:6])
    def test_text_that_is_no_plan_is_refused(self, text):
        with pytest.raises(InvalidArgumentError, match="plan"):
            lq.Plan.from_json(text)

    @pytest.mark.parametrize(
        "key", ["lqlora_plan", "matrices", "goal", "objective", "bound", "counts_factors", "status", "solver", "note"]
    )
    def test_a_missing_key_is_refused(self, plan, key):
        document = json.loads(plan.to_json())
        del document[key]
        with pytest.raises(InvalidArgumentError, match=key):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize("key", ["format", "rank", "shape", "cost"])
    def test_a_missing_key_of_a_matrix_is_refused(self, plan, key):
        document = json.loads(plan.to_json())
        del document["matrices"]["layers.0.q"][key]
        with pytest.raises(InvalidArgumentError, match=key):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("lqlora_plan", 1),
            ("matrices", []),
            ("matrices", {"a": []}),
            ("objective", "cheap"),
            ("bound", "high"),
            ("counts_factors", 1),
        ],
    )
    def test_a_wrong_value_is_refused(self, plan, key, value):
        document = json.loads(plan.to_json())
        document[key] = value
        with pytest.raises(InvalidArgumentError, match=r"[pP]lan"):
            lq.Plan.from_json(json.dumps(document))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "nf99/64"),
            ("format", 4),
            ("format", "nf4/8" + ":u8/1" * 20_000),
            ("rank", "two"),
            ("rank", -1),
            ("rank", math.inf),
            ("rank", 1.5),
            ("shape", "ab"),
            ("shape", [2, -3]),
            ("shape", [2.5, 3]),
            ("cost", "little"),
            ("cost", math.nan),
        ],
        ids=lambda value: str(value)[:10],
    )
    def test_a_wrong_value_of_a_matrix_is_refused(self, plan, key, value):
        document = json.loads(plan.to_json())
        document["matrices"]["layers.0.q"][key] = value
        with pytest.raises(InvalidArgumentError):
            lq.Plan.from_json(json.dumps(document))

    def test_bits_by_matrix_is_exact_storage_per_weight(self, plan):
        for name, bits in plan.bits_by_matrix().items():
            assert bits == plan.formats[name].storage_bits(SHAPES[name]) / math.prod(SHAPES[name])
        mean = sum(bits * math.prod(SHAPES[name]) for name, bits in plan.bits_by_matrix().items())
        assert mean == pytest.approx(plan.storage_bits)

    def test_the_table_has_a_row_for_each_matrix(self, plan):
        head, rule, *rows = plan.table().split("\n")
        assert head.count("|") == rule.count("|") == 6
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert [row[:2] for row in cells] == [[name, str(fmt)] for name, fmt in plan.formats.items()]
        assert [row[2] for row in cells] == [f"{bits:.3f}" for bits in plan.bits_by_matrix().values()]

    def test_the_picture_shows_the_bits(self, plan):
        require_or_skip("matplotlib", is_installed("matplotlib"))
        from matplotlib.figure import Figure

        picture = plan.plot()
        assert isinstance(picture, Figure)
        shown = picture.axes[0].images[0].get_array()
        bits = plan.bits_by_matrix()
        expected = [[bits["layers.0.q"], bits["layers.1.q"]], [bits["layers.0.up"], bits["layers.1.up"]]]
        assert shown.tolist() == expected
        assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == ["q", "up"]


@pytest.mark.filterwarnings("ignore:All weights are zero")
def test_a_matrix_without_fisher_information_costs_nothing():
    dead, live = np.zeros((8, 8)), np.full((8, 8), 1e-8)
    weighting = {"dead": lq.weighting.Elementwise(dead), "live": lq.weighting.Elementwise(live)}
    weights = dict.fromkeys(weighting, np.random.default_rng(0).standard_normal((8, 8)))
    table = lq.cost_table(weights, FORMATS, rank=1, weighting=weighting)
    assert (table.costs[0] == 0).all()
    assert (table.costs[1] > 0).all()
