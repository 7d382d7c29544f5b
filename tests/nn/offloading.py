"""A small quantized model, its outputs and gradients, for tests of offloading."""

from __future__ import annotations

import copy
import functools

import torch

import lqlora as lq

FORMATS = ["nf4/16:u8/16:float32", "nf2+fit/8:float16", "affine3/16@-1:bfloat16", "nf3/16@0:float32"]
WIDTH = 32


def dense():
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)])


def make_model(fmt=FORMATS[0], kind="factors"):
    return copy.deepcopy(_made(fmt, kind))


@functools.cache
def _made(fmt, kind):
    model = dense()
    fit = "levels+scale" if "+fit" in fmt else "absmax"
    if kind == "scales":
        lq.nn.peqa_model(model, lq.BlockFormat.parse(fmt), fit=fit)
    else:
        lq.nn.quantize_model(model, lq.BlockFormat.parse(fmt), rank=2, fit=fit, max_iter=1)
    if kind == "both":
        lq.nn.train_scales(model, train_factors=True)
    return model


def results(model, call=None):
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = (call or model)(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    return y.detach(), *gradients


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
