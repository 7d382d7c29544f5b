"""Gradients of quantized layers in double precision, once and twice, against differences: inputs, factors and scales."""

from __future__ import annotations

import pytest

import lqlora as lq
from tests.requirements import require_module

torch = require_module("torch")
from torch.func import functional_call  # noqa: E402 - needs torch
from torch.nn import functional  # noqa: E402

from lqlora.nn import LQLinear, QuantizedTensor, operands, train_scales  # noqa: E402

pytestmark = pytest.mark.slow

OUT, IN, RANK = 3, 4, 2


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _layer(text="nf4/4:float32"):
    q = lq.quantize(_random(OUT, IN).float(), lq.BlockFormat.parse(text))
    layer = LQLinear(q, _random(RANK, IN, seed=1), _random(OUT, RANK, seed=2), 0.5, _random(OUT, seed=3))
    return torch.nn.Sequential(layer.double())


def _holds(function, *tensors):
    tensors = [tensor.detach().double().clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("scales_train", [False, True])
@pytest.mark.parametrize("text", ["nf4/4:float32", "nf3/2:u8/4:float32", "affine4/4:float32", "nf3+fit/4:float32"])
def test_layers(text, scales_train):
    model = _layer(text)
    if scales_train:
        train_scales(model, train_factors=True)
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    assert len(trained) == 2 + scales_train

    def run(x, *values):
        return functional_call(model, dict(zip(trained, values, strict=True)), (x,))

    _holds(run, _random(2, IN, seed=4), *trained.values())


PRODUCTS = {
    "linear": (lambda w, x: functional.linear(x, w), (2, IN)),
    "matmul": (lambda w, x: x @ w, (2, OUT)),
    "transposed": (lambda w, x: w.T @ x, (OUT, 2)),
    "from the left": (lambda w, x: w @ x, (IN, 2)),
    "addmm": (lambda w, x: torch.addmm(x[:, :1], x, w.t()), (2, IN)),
    "dense": (lambda w, x: (x * w.dequantize()).sum(dim=0), (OUT, IN)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_the_weight(name):
    product, shape = PRODUCTS[name]
    weight = operands(lq.quantize(_random(OUT, IN).float(), lq.BlockFormat.parse("nf4/4:float32")))

    def run(x, lora_A, lora_B):
        return product(QuantizedTensor(weight, lora_A, lora_B, 0.5, dtype=torch.float64), x)

    _holds(run, _random(*shape, seed=4), _random(RANK, IN, seed=1), _random(OUT, RANK, seed=2))
