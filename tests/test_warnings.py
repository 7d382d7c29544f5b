"""Warnings point to the line that called the library."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import lqlora as lq
from tests.requirements import require_module

torch = require_module("torch")

from lqlora.nn import collect_fisher, collect_gram, quantize_model, requantize_model  # noqa: E402 - needs torch

W = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
ZEROS = np.zeros((8, 16), dtype=np.float32)
NF4 = lq.BlockFormat.parse("nf4/8:float32")
LOST = lq.BlockFormat.parse("nf4/8:float16")


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))


class _OneDead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.dead = torch.nn.Linear(16, 4), torch.nn.Linear(16, 4)

    def forward(self, x):
        return self.used(x)


def _requantized():
    model = _model()
    quantize_model(model, NF4, rank=3)
    return requantize_model(model, {"0": _model()[0].weight.detach(), "1": _model()[1].weight.detach()})


CALLS = {
    "quantize": lambda: lq.quantize(W * 1e-12, LOST),
    "decompose": lambda: lq.decompose(W * 1e-12, LOST, 1, scaling=1.0),
    "gptq": lambda: lq.gptq(W, NF4, np.zeros((16, 16), dtype=np.float32)),
    "Elementwise": lambda: lq.weighting.Elementwise(ZEROS),
    "RowColumn": lambda: lq.weighting.RowColumn(None, ZEROS[0]),
    "InputGram": lambda: lq.weighting.InputGram(np.zeros((16, 16), dtype=np.float32)),
    "collect_fisher": lambda: collect_fisher(
        _OneDead(), [torch.ones(2, 16)], loss=lambda model, x: model(x).square().sum(1)
    ),
    "collect_gram": lambda: collect_gram(_OneDead(), [torch.ones(2, 16)]),
    "requantize_model": _requantized,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_has_the_place_of_the_call(name):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        CALLS[name]()
    assert found
    assert {warning.filename for warning in found} == {__file__}
