"""Conversion of models: selection of layers, replacement, what stays unchanged, and the report."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting import Elementwise
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch

from lqlora.nn import LQLinear, quantize_model, select_linears  # noqa: E402
from lqlora.nn.model import weight_arrays  # noqa: E402

NF4 = lq.BlockFormat.parse("nf4/16:float32")
NF2 = lq.BlockFormat.parse("nf2/8:u8/16:float16")


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.up_proj(torch.relu(self.q_proj(self.norm(x))))[..., : x.shape[-1]]


class Model(nn.Module):
    """Two blocks, an embedding, and a head that is tied to it."""

    def __init__(self, width: int = 8, words: int = 11):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


NAMES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("q_proj", "up_proj")]
IDS = torch.arange(10).view(2, 5)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def _quantized(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LQLinear)]


def _snapshot(model) -> dict:
    return {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}


def _assert_unchanged(model, before) -> None:
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (values, flag) in before.items():
        assert after[name].requires_grad == flag, name
        assert torch.equal(after[name].nan_to_num(), values.nan_to_num()), name


class TestSelection:
    @pytest.mark.parametrize(
        ("include", "expected"),
        [
            ("*", NAMES),
            ("*.q_proj", NAMES[::2]),
            ("layers.1.*", NAMES[2:]),
            (re.compile(r"layers\.\d\.up_proj"), NAMES[1::2]),
            (re.compile(r"layers\.0"), None),  # expressions match whole names
            (lambda name: name.endswith("0.q_proj"), NAMES[:1]),
            (["*.1.q_proj", re.compile(".*0.up.*")], [NAMES[1], NAMES[2]]),
            ("*.v_proj", None),
            ((), None),
        ],
        ids=["all", "glob", "layer", "regex", "part of a name", "callable", "several", "no match", "none"],
    )
    def test_patterns(self, model, include, expected):
        if expected is None:
            with pytest.raises(InvalidArgumentError, match=r"include.*linear layer"):
                select_linears(model, include)
        else:
            assert list(select_linears(model, include)) == expected

    def test_heads_are_kept_unless_asked_for(self, model):
        assert "lm_head" not in select_linears(model)
        assert list(select_linears(model, ["*", "lm_head"])) == [*NAMES, "lm_head"]

    def test_excluded_layers_are_not_selected(self, model):
        assert list(select_linears(model, "*", ["*.q_proj", "lm_head", "layers.1.*"])) == [NAMES[1]]

    def test_the_error_names_some_layers_of_the_model(self, model):
        with pytest.raises(InvalidArgumentError, match=re.escape("layers.0.q_proj")):
            select_linears(model, "nothing")

    def test_weight_arrays_are_views_of_the_weights(self, model):
        linears = select_linears(model)
        for name, load in weight_arrays(linears).items():
            np.testing.assert_array_equal(load(), linears[name].weight.detach().numpy())

    def test_bfloat16_weights_are_loaded_exactly_in_float32(self, model):
        # Every model in host memory gives NumPy arrays, so that weightings of NumPy arrays suit all of them.
        linears = select_linears(model.bfloat16())
        loaded = weight_arrays(linears)[NAMES[0]]()
        assert loaded.dtype == np.float32
        assert torch.equal(torch.from_numpy(loaded), linears[NAMES[0]].weight.float())


class TestConversion:
    def test_layers_are_replaced_by_their_decompositions(self, model):
        dense = {name: m.weight.detach().clone() for name, m in select_linears(model).items()}
        report = quantize_model(model, NF2, rank=2, max_iter=3)
        assert _quantized(model) == list(report.layers) == NAMES
        for name, w in dense.items():
            expected = lq.decompose(w.numpy(), NF2, 2, max_iter=3)
            layer = model.get_submodule(name)
            np.testing.assert_array_equal(layer.quantized.array.packed.numpy(), expected.quantized.packed)
            np.testing.assert_array_equal(layer.lora_A.detach().numpy(), expected.lora_A)
            assert layer.lora_B.shape == (w.shape[0], 2)

    def test_the_model_computes_nearly_the_same(self, model):
        before = model(IDS)
        quantize_model(model, lq.BlockFormat.parse("nf8/8:float32"), rank=2)
        torch.testing.assert_close(model(IDS), before, rtol=0.05, atol=0.05)

    def test_everything_else_is_frozen_and_unchanged(self, model):
        before = _snapshot(model)
        quantize_model(model, NF4, rank=2)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {f"{name}.lora_{x}" for name in NAMES for x in "AB"}
        for name, p in model.named_parameters():
            if name in before:
                assert torch.equal(p, before[name][0]), name
        assert model.lm_head.weight is model.embed.weight

    def test_the_training_flag_is_kept(self, model):
        quantize_model(model.eval(), NF4, rank=1)
        assert not any(module.training for module in model.modules())

    def test_other_kinds_of_layers_are_untouched(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 4), nn.Embedding(3, 3))
        quantize_model(model, NF4, rank=1)
        assert [type(module) for module in model] == [nn.Conv1d, nn.Flatten, LQLinear, nn.Embedding]

    def test_a_layer_used_under_two_names_stays_one_layer(self):
        model = nn.Module()
        model.first = model.second = nn.Linear(8, 8)
        quantize_model(model, NF4, rank=1)
        assert model.first is model.second
        assert isinstance(model.first, LQLinear)

    def test_a_model_that_is_itself_a_linear_layer_is_refused(self):
        # In place there is nothing to replace: a child of nn.Module must have a name.
        layer = nn.Linear(8, 8)
        with pytest.raises(InvalidArgumentError, match="model"):
            quantize_model(layer, NF4, rank=1)
        assert layer.weight.requires_grad
        assert list(layer.children()) == []

    def test_attention_of_torch_still_runs(self):
        # nn.MultiheadAttention passes the weight of its output projection to a function instead of calling the layer.
        torch.manual_seed(0)
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True), "up": nn.Linear(16, 8)})
        report = quantize_model(model, lq.BlockFormat.parse("nf8/8:float32"), rank=1)
        assert "up" in report.layers
        x = torch.randn(1, 3, 16)
        assert model["attention"](x, x, x)[0].shape == (1, 3, 16)

    def test_weightings_are_used(self, model):
        fisher = torch.full((8, 8), 1e-3)
        fisher[2] = 10.0
        report = quantize_model(model, NF2, rank=1, max_iter=2, weighting={NAMES[0]: Elementwise(fisher.numpy())})
        expected = lq.decompose(_model_weight(NAMES[0]), NF2, 1, max_iter=2, weighting=Elementwise(fisher.numpy()))
        assert report.layers[NAMES[0]].errors == expected.errors


def _model_weight(name: str):
    torch.manual_seed(0)
    return Model().get_submodule(name).weight.detach().numpy()


class TestPlans:
    @pytest.fixture
    def plan(self, model) -> lq.Plan:
        table = lq.cost_table(weight_arrays(select_linears(model)), [NF4, NF2], rank=2)
        return lq.allocate(table, bits_per_weight=5.0)

    def test_formats_and_ranks_come_from_the_plan(self, model, plan):
        assert len(set(plan.formats.values())) == 2  # with one format the test would show nothing
        report = quantize_model(model, plan)
        assert {name: layer.format for name, layer in report.layers.items()} == plan.formats
        assert {layer.rank for layer in report.layers.values()} == {2}
        assert report.storage_bits == plan.storage_bits
        assert report.bits_per_weight == pytest.approx(float(plan.bits_per_weight))

    def test_a_given_rank_overrides_that_of_the_plan(self, model, plan):
        report = quantize_model(model, plan, rank=1)
        assert {layer.rank for layer in report.layers.values()} == {1}

    def test_a_mapping_replaces_exactly_the_layers_it_names(self, model):
        quantize_model(model, {NAMES[2]: NF4, "lm_head": NF2}, rank=1)
        assert _quantized(model) == [NAMES[2], "lm_head"]

    def test_names_the_model_does_not_have_are_refused(self, model):
        before = _snapshot(model)
        with pytest.raises(InvalidArgumentError, match=r"layers\.7\.q_proj"):
            quantize_model(model, {NAMES[0]: NF4, "layers.7.q_proj": NF4}, rank=1)
        _assert_unchanged(model, before)

    def test_a_name_of_something_else_is_refused(self, model):
        with pytest.raises(InvalidArgumentError, match="embed"):
            quantize_model(model, {"embed": NF4}, rank=1)


class TestFailures:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "rank"),
            ({"rank": 1.5}, r"(?i)rank.*1\.5"),
            ({"rank": -1}, "(?i)rank.*-1"),
            ({"rank": 1, "include": "x"}, "include.*'x'"),
        ],
        ids=["no rank", "a fraction", "negative rank", "no match"],
    )
    def test_bad_arguments_leave_the_model_unchanged(self, model, options, message):
        before = _snapshot(model)
        with pytest.raises(InvalidArgumentError, match=message):
            quantize_model(model, NF4, **options)
        _assert_unchanged(model, before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_is_not_finite_leaves_the_model_unchanged(self, model, value):
        with torch.no_grad():
            model.layers[1].up_proj.weight[3, 2] = value
        before = _snapshot(model)
        with pytest.raises(NonFiniteError, match=r"layers\.1\.up_proj"):
            quantize_model(model, NF4, rank=2)
        assert _quantized(model) == []
        _assert_unchanged(model, before)


class TestReport:
    @staticmethod
    def _bytes(model) -> int:
        unique = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        return sum(t.numel() * t.element_size() for t in unique.values())

    def test_bytes_are_those_of_all_tensors_of_the_model(self, model):
        report = quantize_model(model, NF2, rank=2)
        assert report.total_bytes == self._bytes(model)
        layers = [model.get_submodule(name) for name in NAMES]
        assert report.storage_bits == 8 * sum(b.nbytes for layer in layers for b in layer.quantized.buffers())
        assert report.factor_bytes == sum(p.nbytes for layer in layers for p in (layer.lora_A, layer.lora_B))
        biases = {f"{name}.bias" for name in NAMES[1::2]}
        assert biases < set(report.kept)
        assert sum(report.kept.values()) + report.factor_bytes + report.storage_bits // 8 == report.total_bytes

    def test_tied_parameters_count_once(self, model):
        report = quantize_model(model, NF2, rank=2)
        assert ("embed.weight" in report.kept) + ("lm_head.weight" in report.kept) == 1

    def test_persistent_buffers_count(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        assert quantize_model(model, NF4, rank=2).total_bytes == self._bytes(model)

    def test_parameters_in_half_precision_count_two_bytes(self, model):
        half = copy.deepcopy(model).half()
        full, narrow = quantize_model(model, NF4, rank=1), quantize_model(half, NF4, rank=1)
        assert sum(full.kept.values()) == 2 * sum(narrow.kept.values())
        assert narrow.total_bytes == self._bytes(half)

    def test_bits_per_weight_are_those_of_the_format(self, model):
        report = quantize_model(model, NF4, rank=2)
        assert report.bits_per_weight == 6.0


def test_a_weighting_of_an_unknown_layer_is_refused(model):
    with pytest.raises(InvalidArgumentError, match=r"weighting.*typo"):
        quantize_model(model, NF4, rank=1, weighting={"typo": Elementwise(np.ones((2, 2)))})


@pytest.mark.parametrize("formats", [{}, "nf4/64:float32", None])
def test_formats_of_another_kind_are_refused(model, formats):
    with pytest.raises(InvalidArgumentError, match=f"formats.*{formats!r}"):
        quantize_model(model, formats, rank=1)


def test_dropout_is_that_of_every_layer(model):
    quantize_model(model, NF4, rank=2, dropout=0.25)
    assert {module.dropout for module in model.modules() if isinstance(module, LQLinear)} == {0.25}
    assert not torch.equal(model(IDS), model(IDS))
    assert torch.equal(model.eval()(IDS), model(IDS))


def test_a_dropout_that_is_not_a_probability_is_refused(model):
    before = _snapshot(model)
    with pytest.raises(InvalidArgumentError, match=r"dropout.*1\.0"):
        quantize_model(model, NF4, rank=2, dropout=1.0)
    _assert_unchanged(model, before)
