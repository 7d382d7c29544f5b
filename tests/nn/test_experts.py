"""Experts that a model stores in one array: selection, conversion, training, files, and the way back."""

from __future__ import annotations

import copy
from functools import wraps
from types import SimpleNamespace

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.requirements import require_module

torch = require_module("torch")
from torch import nn  # noqa: E402 - needs torch
from torch.nn import functional  # noqa: E402

from lqlora.nn import (  # noqa: E402
    LQLinear,
    collect_fisher,
    dequantize_model,
    load_model,
    quantize_model,
    save_model,
    select_linears,
)

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


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(_experts_implementation_internal="grouped_mm")
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(self.config)

    def forward(self, x):
        return self.experts(self.inner(x), torch.arange(len(x)) % EXPERTS)


@pytest.fixture
def model():
    return Model()


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
        assert list(model.state_dict()) == ["inner.weight", "inner.bias", "experts.up_proj", "experts.down_proj"]

    @pytest.mark.parametrize(
        ("include", "expected"),
        [("up_proj", UP), ("experts.up_proj", UP), ("*.down_proj", DOWN), ("*.2", [UP[2], DOWN[2]]), (UP[1], [UP[1]])],
    )
    def test_patterns_match_the_array_or_one_expert(self, model, include, expected):
        assert list(select_linears(model, include)) == expected
        assert set(select_linears(model, exclude=include)) == {"inner", *UP, *DOWN} - set(expected)

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
        for own, full in zip(model.experts.up_proj.children(), dense.experts.up_proj.grad, strict=True):
            torch.testing.assert_close(own.lora_A.grad, own.lora_B.T @ full, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.lora_B.grad, full @ own.lora_A.T, rtol=1e-4, atol=1e-5)

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
        fresh = Model(seed=1)
        load_model(tmp_path / "m.safetensors", fresh)
        assert torch.equal(fresh(_input()), model(_input()))
        assert list(fresh.state_dict()) == list(model.state_dict())

    def test_names_of_a_state_dict_are_those_of_modules(self, model):
        quantize_model(model, NF8, rank=1)
        model.load_state_dict(model.state_dict())
        for name in model.state_dict():
            owner, _, key = name.rpartition(".")
            assert hasattr(model.get_submodule(owner), key)


def test_statistics_are_those_of_layers_that_are_called(model):
    def loss(model, x):
        return model(x).square().sum(1)

    assert list(collect_fisher(model, [_input()], loss=loss)) == ["inner"]
    with pytest.raises(InvalidArgumentError, match="include must select"):
        collect_fisher(model, [_input()], loss=loss, include="up_proj")
