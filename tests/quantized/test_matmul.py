"""Multiplication by a quantized weight."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora import NF4, BlockFormat, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError
from tests.quantized.cases import KINDS, normal, quantized, ramp, restored
from tests.strategies import host, on


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("text", KINDS)
def test_the_product_is_that_of_the_dense_matrix(fast_xp, scaling, text):
    x, lora_A, lora_B = (normal(*shape, seed=seed) for seed, shape in enumerate([(2, 3, 8), (4, 8), (5, 4)]))
    q = quantized(fast_xp, ramp(5, 8), BlockFormat.parse(text))
    dense = restored(q) + scaling * lora_B @ lora_A
    y = lq.matmul(on(fast_xp, x), q, on(fast_xp, lora_A), on(fast_xp, lora_B), scaling)
    np.testing.assert_allclose(host(y), x @ dense.T, rtol=1e-4, atol=1e-5)


def test_without_factors_it_is_the_weight_alone(xp):
    q, x = quantized(xp, ramp(5, 8), BlockFormat(NF4, 8)), normal(3, 8)
    np.testing.assert_allclose(host(lq.matmul(on(xp, x), q)), x @ restored(q).T, rtol=1e-5, atol=1e-5)
    assert tuple(lq.matmul(on(xp, x[0]), q).shape) == (5,)


def test_both_factors_are_needed_or_neither(xp):
    q = quantized(xp, ramp(4, 4), BlockFormat(NF4))
    x = on(xp, ramp(1, 4))
    with pytest.raises(InvalidArgumentError, match="lora_A and lora_B must"):
        lq.matmul(x, q, lora_A=x)
    with pytest.raises(InvalidArgumentError, match="lora_A and lora_B must"):
        lq.matmul(x, q, lora_B=x)


@pytest.mark.parametrize("shape", [(3,), (2, 4), ()])
def test_rows_that_do_not_fit_a_weight_are_refused(shape):
    q = quantize(np.ones((2, 5)), BlockFormat(NF4))
    with pytest.raises(InvalidArgumentError, match=r"x must have .* columns"):
        lq.matmul(np.ones(shape, dtype=np.float32), q)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)])
def test_a_weight_that_is_no_matrix_is_refused(shape):
    q = quantize(np.ones(shape), BlockFormat(NF4))
    with pytest.raises(InvalidArgumentError, match=r"x must have .* columns"):
        lq.matmul(np.ones((1, shape[-1]), dtype=np.float32), q)


def test_inputs_of_another_library_are_refused(torch):
    q = quantize(ramp(4, 4), BlockFormat(NF4))
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        lq.matmul(torch.ones(2, 4), q)
