"""Experts that a model stores in one array: selection, conversion, training, files, and the way back."""

from __future__ import annotations

import copy
from contextlib import nullcontext as _nothing
from functools import wraps
from types import SimpleNamespace

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import DeadLayerWarning, InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lqlora.nn import (  # noqa: E402
    LQLinear,
    collect_fisher,
    collect_gram,
    collect_kronecker,
    dequantize_model,
    load_model,
    quantize_model,
    save_model,
    select_linears,
    weight_arrays,
)
from tests.nn.statistics.layouts import assert_close, by_example  # noqa: E402

NF8 = lq.BlockFormat.parse("nf8/8:float32")
WIDTH, INNER, EXPERTS = 8, 16, 3
UP, DOWN = ([f"experts.{key}.{index}" for index in range(EXPERTS)] for key in ("up_proj", "down_proj"))


def _with_implementations(forward):
    """Do what the decorator of transformers does."""

    @wraps(forward)
    def chosen(self, x, chosen):
        if self.config._experts_implementation_internal != "eager":
            return functional.relu(x @ self.up_proj.transpose(1, 2)).matmul(self.down_proj.transpose(1, 2)).mean(0)
        return forward(self, x, chosen)

    return chosen


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)
        self.config, self.is_concatenated = config, True

    @_with_implementations
    def forward(self, x, chosen):
        found = torch.zeros_like(x)
        for index in chosen.unique():
            rows = chosen == index
            inner = functional.relu(functional.linear(x[rows], self.up_proj[index]))
            found[rows] = functional.linear(inner, self.down_proj[index])
        return found


class Transposed(nn.Module):
    """Stores matrices of shape (in_features, out_features), as GPT-OSS does."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.config, self.is_concatenated, self.is_transposed = config, True, True

    @_with_implementations
    def forward(self, x, chosen):
        found = torch.zeros_like(x)
        for index in chosen.unique():
            rows = chosen == index
            inner = functional.relu(x[rows] @ self.up_proj[index].to(x.dtype))
            found[rows] = torch.matmul(inner, self.down_proj[index]) + self.down_proj_bias[index]
        return found


class Model(nn.Module):
    def __init__(self, seed=0, experts=Experts):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(_experts_implementation_internal="grouped_mm")
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.experts = experts(self.config)

    def forward(self, x):
        rows = self.inner(x).flatten(0, -2)  # of several examples, if x has three axes
        return self.experts(rows, torch.arange(len(rows)) % EXPERTS).view(x.shape)


@pytest.fixture(params=[Experts, Transposed])
def model(request):
    return Model(experts=request.param)


class _Products(TorchDispatchMode):
    """Counts products with quantized matrices."""

    count = 0

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        self.count += func in (torch.ops.lqlora.matmul.default, torch.ops.lqlora.linear.default)
        return func(*args, **(kwargs or {}))


def _eager(model, x):
    """Return the output of a dense model by the eager implementation."""
    other = copy.deepcopy(model)
    other.experts.config._experts_implementation_internal = "eager"
    return other(x)


def _input():
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))


class TestSelection:
    def test_every_expert_is_a_layer(self, model):
        linears = select_linears(model)
        assert list(linears) == ["inner", *UP, *DOWN]
        assert linears[UP[1]].weight.data_ptr() == model.experts.up_proj[1].data_ptr()
        assert {linears[name].weight.shape for name in UP} == {(INNER, WIDTH)}
        assert list(model.state_dict())[:4] == ["inner.weight", "inner.bias", "experts.up_proj", "experts.down_proj"]

    @pytest.mark.parametrize(
        ("include", "expected"),
        [("up_proj", UP), ("experts.up_proj", UP), ("*.down_proj", DOWN), ("*.2", [UP[2], DOWN[2]]), (UP[1], [UP[1]])],
    )
    def test_patterns_match_the_array_or_one_expert(self, model, include, expected):
        assert list(select_linears(model, include)) == expected
        assert set(select_linears(model, exclude=include)) == {"inner", *UP, *DOWN} - set(expected)

    def test_experts_in_an_array_that_two_modules_share_are_left_dense(self, model):
        model.other = type(model.experts)(model.config)
        model.other.up_proj = model.experts.up_proj
        other = [f"other.down_proj.{index}" for index in range(EXPERTS)]
        assert list(select_linears(model)) == ["inner", *DOWN, *other]
        report = quantize_model(model, NF8, rank=1)
        assert report.dense["shared weights"].size == model.experts.up_proj.numel()
        assert model.other.up_proj is model.experts.up_proj

    def test_experts_of_unknown_classes_are_left_dense(self, model):
        del model.experts.is_concatenated
        assert list(select_linears(model)) == ["inner"]
        report = quantize_model(model, NF8, rank=1)
        assert "experts stored as one array" in report.dense


class TestConversion:
    def test_outputs_and_gradients_are_those_of_the_dense_sums(self, model):
        quantize_model(model, NF8, rank=2)
        dense = copy.deepcopy(model)
        dequantize_model(dense)
        x = _input()
        dense.experts.config._experts_implementation_internal = "eager"
        dense.experts.up_proj.requires_grad_()
        for own in (model, dense):
            own(x).square().sum().backward()
        torch.testing.assert_close(model(x), dense(x))
        gradients = dense.experts.up_proj.grad
        gradients = gradients.mT if hasattr(dense.experts, "is_transposed") else gradients
        for own, full in zip(model.experts.up_proj.children(), gradients, strict=True):
            torch.testing.assert_close(own.lora_A.grad, own.lora_B.T @ full, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.lora_B.grad, full @ own.lora_A.T, rtol=1e-4, atol=1e-5)

    def test_a_matrix_is_decoded_once_for_each_pass(self, model):
        quantize_model(model, NF8, rank=2, include=["up_proj", "down_proj"])
        x = _input().requires_grad_()
        with _Products() as forward:
            y = model(x)
        with _Products() as backward:
            y.square().sum().backward()
        # Seven rows reach all experts, and more than one row reaches the first.
        assert forward.count == backward.count == len(UP + DOWN)

    def test_the_original_is_near(self, model):
        x, expected = _input(), _eager(model, _input())
        quantize_model(model, NF8, rank=4)
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)

    def test_experts_train_alone(self, model):
        quantize_model(model, NF8, rank=2, include="up_proj")
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [f"{name}.lora_{x}" for name in UP for x in "AB"]

    def test_part_of_an_array_may_stay_dense(self, model):
        expected = _eager(model, _input())
        report = quantize_model(model, NF8, rank=4, include=[UP[0], UP[2]])
        assert list(report.layers) == [UP[0], UP[2]]
        assert [isinstance(own, LQLinear) for own in model.experts.up_proj.children()] == [True, False, True]
        torch.testing.assert_close(model(_input()), expected, rtol=0.05, atol=0.05)
        assert isinstance(model.experts.down_proj, nn.Parameter)

    def test_models_that_were_made_in_inference_mode(self):
        with torch.inference_mode():
            model = Model()
        with pytest.raises(InvalidArgumentError, match="inference_mode"):
            collect_gram(model, [_input()])
        quantize_model(model, NF8, rank=1)
        model(_input()).sum().backward()

    def test_the_configuration_of_the_model_stays(self, model):
        quantize_model(model, NF8, rank=1)
        assert model.config._experts_implementation_internal == "grouped_mm"
        dequantize_model(model)
        assert model.experts.config is model.config

    def test_an_error_leaves_the_arrays(self, model):
        with torch.no_grad():
            model.experts.down_proj[1, 0, 0] = torch.nan
        keys = list(model.state_dict())
        with pytest.raises(NonFiniteError, match=r"down_proj\.1"):
            quantize_model(model, NF8, rank=1)
        assert list(model.state_dict()) == keys

    def test_dense_arrays_come_back(self, model):
        keys, expected = list(model.state_dict()), model.experts.up_proj.detach().clone()
        quantize_model(model, NF8, rank=4)
        dequantize_model(model)
        assert set(model.state_dict()) == set(keys)
        torch.testing.assert_close(model.experts.up_proj.detach(), expected, rtol=0.05, atol=0.05)

    def test_a_copy_and_a_second_conversion_keep_the_experts(self, model):
        quantize_model(model, NF8, rank=1, include="up_proj")
        report = quantize_model(model, NF8, rank=1, include="down_proj")
        assert list(report.layers) == DOWN
        assert torch.equal(copy.deepcopy(model)(_input()), model(_input()))


class TestFiles:
    @pytest.mark.parametrize("include", [None, "up_proj", [UP[0], *DOWN]], ids=["all", "an array", "some"])
    def test_a_file_restores_the_bits(self, model, tmp_path, include):
        quantize_model(model, NF8, rank=2, include=include)
        save_model(tmp_path / "m.safetensors", model)
        fresh = Model(seed=1, experts=type(model.experts))
        fresh.load_state_dict({name: own for name, own in model.state_dict().items() if "bias" in name}, strict=False)
        load_model(tmp_path / "m.safetensors", fresh)
        assert torch.equal(fresh(_input()), model(_input()))
        assert list(fresh.state_dict()) == list(model.state_dict())

    def test_names_of_a_state_dict_are_those_of_modules(self, model):
        quantize_model(model, NF8, rank=1)
        model.load_state_dict(model.state_dict())
        for name in model.state_dict():
            owner, _, key = name.rpartition(".")
            assert hasattr(model.get_submodule(owner), key)


def _loss(model, x):
    return model(x).square().flatten(1).sum(1)


class TestStatistics:
    @pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
    def test_they_are_those_of_single_examples(self, model, implementation):
        model = model.double()
        model.config._experts_implementation_internal = implementation
        x = torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        # The expert of a row depends on its place in the batch. In batches of one example it would be another one.
        batches = [x[:3], x[:1]]
        eager = copy.deepcopy(model)
        eager.experts.config._experts_implementation_internal = "eager"
        losses = [lambda m, b=b, i=i: _loss(m, b)[i] for b in batches for i in range(len(b))]
        fisher, kronecker = by_example(eager, losses)
        assert list(fisher) == ["inner", *UP, *DOWN]
        assert_close(collect_fisher(model, batches, loss=_loss), fisher)
        found = collect_kronecker(model, batches, loss=_loss)
        assert_close(
            {name: own for name, (own, _) in found.items()}, {name: own for name, (own, _) in kronecker.items()}
        )
        grams = collect_gram(model, batches)
        _, expected = by_example(eager, [lambda m, b=b: _loss(m, b).sum() for b in batches])
        assert_close(grams, {name: own for name, (_, own) in expected.items()})
        assert all(torch.equal(grams[name], own) for name, (_, own) in found.items())

    def test_the_model_is_as_before(self, model):
        arrays, state = dict(model.named_parameters()), list(model.state_dict())
        model.experts.up_proj.requires_grad_(requires_grad=False)
        config = model.experts.config

        def failing(model, x):
            raise RuntimeError

        collect_fisher(model, [_input()], loss=_loss, include="*.1")
        for loss in (_loss, failing):
            with pytest.raises(RuntimeError) if loss is failing else _nothing():
                collect_gram(model, [_input()], loss=loss)
        assert list(model.state_dict()) == state
        assert all(own is arrays[name] for name, own in model.named_parameters())
        assert not model.experts.up_proj.requires_grad
        assert model.experts.down_proj.requires_grad
        assert model.experts.config is config
        assert "experts.up_proj" not in dict(model.named_modules())

    @pytest.mark.parametrize("collect", [collect_fisher, collect_gram, collect_kronecker])
    def test_experts_without_a_token_are_listed_and_the_rest_kept(self, model, collect):
        with pytest.warns(DeadLayerWarning, match=rf"2 of 7 layers.*{UP[2]}.*{DOWN[2]}"):
            found = collect(model, [_input()[:2]], loss=_loss)
        assert list(found) == ["inner", *UP[:2], *DOWN[:2]]

    def test_quantize_model_weights_errors_with_them(self, model):
        fisher = collect_fisher(model, [_input()], loss=_loss)
        weightings = {name: lq.weighting.Elementwise(own.numpy()) for name, own in fisher.items()}
        matrices = {name: load().copy() for name, load in weight_arrays(select_linears(model)).items()}
        quantize_model(model, NF8, rank=1, weighting=weightings, max_iter=2)
        for name in UP:
            expected = lq.decompose(matrices[name], NF8, 1, weighting=weightings[name], max_iter=2)
            np.testing.assert_array_equal(model.get_submodule(name).lora_A.detach(), expected.lora_A)

    def test_dense_experts_of_a_converted_array_are_seen(self, model):
        expected = collect_gram(model, [_input()])
        quantize_model(model, NF8, rank=4, include=[UP[0], UP[2]])
        found = collect_gram(model, [_input()])
        assert list(found) == ["inner", UP[1], *DOWN]
        torch.testing.assert_close(found[UP[1]], expected[UP[1]])

    def test_a_matrix_may_be_cast_for_the_product(self):
        model = Model(experts=Transposed)
        expected = collect_fisher(model, [_input()], loss=_loss)
        model.experts.up_proj = nn.Parameter(model.experts.up_proj.detach().double())
        found = collect_fisher(model, [_input()], loss=_loss)
        assert_close(found, {name: own.double() for name, own in expected.items()})

    @pytest.mark.parametrize(
        ("use", "name"),
        [
            (lambda x, w: functional.linear(x, w.abs()), "abs"),
            (lambda x, w: functional.linear(x, w.chunk(2)[0]), "chunk"),
            (lambda x, w: functional.linear(x, torch.cat([w, w])), "cat"),
            (lambda x, w: torch.einsum("ti,oi->to", x, w), "einsum"),
            (lambda x, w: x @ w[0], "__getitem__"),
        ],
        ids=lambda own: own if isinstance(own, str) else "",
    )
    def test_other_uses_of_a_matrix_are_refused(self, use, name):
        class Other(Experts):
            @_with_implementations
            def forward(self, x, chosen):
                return use(x, self.up_proj[chosen[0]])

        with pytest.raises(InvalidArgumentError, match=rf"^model .* {name} .*\(16, 8\).*Exclude"):
            collect_gram(Model(experts=Other), [_input()])

    @pytest.mark.parametrize(
        "use",
        [
            lambda x, w: x @ w.t(),
            lambda x, w: torch.mm(x, mat2=w.transpose(0, 1)),
            lambda x, w: functional.linear(x, weight=w, bias=torch.ones(len(w))),
            lambda x, w: x.matmul(w.detach().mT.to(x.device)),
        ],
        ids=["t", "mm", "bias", "matmul"],
    )
    def test_products_are_written_in_several_ways(self, use):
        class Other(Experts):
            @_with_implementations
            def forward(self, x, chosen):
                return use(x, self.up_proj[chosen[0]])[:, :WIDTH]

        model = Model(experts=Other)
        with pytest.warns(DeadLayerWarning):
            found = collect_gram(model, [_input()])
        rows = model.inner(_input()).detach()
        torch.testing.assert_close(found[UP[0]], rows.T @ rows / len(rows))
