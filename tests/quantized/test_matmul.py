"""Multiplication by a quantized weight."""

from __future__ import annotations

import re

import numpy as np
import pytest

import lqlora as lq
from lqlora import NF4, BlockFormat, quantize
from lqlora.errors import InvalidArgumentError
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


@pytest.mark.parametrize(("shape", "batch_dims"), [((8,), 0), ((2, 2, 2), 0), ((2, 8), 1), ((2, 2, 2, 2), 1)])
def test_a_weight_that_is_no_matrix_is_refused(shape, batch_dims):
    q = quantize(np.ones(shape), BlockFormat(NF4), batch_dims=batch_dims)
    with pytest.raises(InvalidArgumentError, match=rf"^x must .*matrix.*{re.escape(str(shape))}"):
        lq.matmul(np.ones(shape, dtype=np.float32), q)


class TestStacks:
    @pytest.mark.parametrize("batch", [(3,), (2, 2)])
    @pytest.mark.parametrize("text", KINDS)
    def test_each_matrix_multiplies_its_own_rows(self, fast_xp, text, batch):
        w, x = normal(*batch, 5, 8), on(fast_xp, normal(*batch, 2, 3, 8, seed=1))
        lora_A, lora_B = (on(fast_xp, normal(*batch, *own, seed=seed)) for seed, own in ((2, (4, 8)), (3, (5, 4))))
        q = quantized(fast_xp, w, BlockFormat.parse(text), batch_dims=len(batch))
        alone, both = lq.matmul(x, q), lq.matmul(x, q, lora_A, lora_B, 0.5)
        assert tuple(both.shape) == (*batch, 2, 3, 5)
        for index, own in zip(np.ndindex(batch), q.unstack(), strict=True):
            rows, *factors = (array[(*index, ...)] for array in (x, lora_A, lora_B))
            np.testing.assert_array_equal(host(alone[(*index, ...)]), host(lq.matmul(rows, own)))
            np.testing.assert_array_equal(host(both[(*index, ...)]), host(lq.matmul(rows, own, *factors, 0.5)))

    def test_products_without_rows_are_empty(self, xp):
        q = quantized(xp, normal(2, 5, 8), BlockFormat(NF4), batch_dims=1)
        assert tuple(lq.matmul(on(xp, normal(2, 0, 8)), q).shape) == (2, 0, 5)

    @pytest.mark.parametrize("shape", [(3, 4, 8), (2, 4, 7), (2, 8), (8,), ()])
    def test_rows_of_other_shapes_are_refused(self, shape):
        q = quantize(normal(2, 5, 8), BlockFormat(NF4), batch_dims=1)
        with pytest.raises(InvalidArgumentError, match=rf"^x must .*\(2, \.\.\., rows, 8\).*{re.escape(str(shape))}"):
            lq.matmul(np.ones(shape, dtype=np.float32), q)

    @pytest.mark.parametrize(
        ("a", "b"), [((4, 8), (5, 4)), ((3, 4, 8), (2, 5, 4)), ((2, 4, 8), (2, 5, 3)), ((2, 4, 7), (2, 5, 4))]
    )
    def test_factors_of_other_shapes_are_refused(self, a, b):
        q = quantize(normal(2, 5, 8), BlockFormat(NF4), batch_dims=1)
        with pytest.raises(InvalidArgumentError, match=r"^lora_B .*\(2, 5, rank\).*\(2, rank, 8\)"):
            lq.matmul(normal(2, 1, 8), q, normal(*a), normal(*b))


@pytest.mark.parametrize("text", ["nf4/8:float32", "nf4/5@0:float32"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_pass(torch, batch, text):
    q = quantize(torch.randn(*batch, 5, 8), BlockFormat.parse(text), batch_dims=len(batch))
    own = [torch.randn(*batch, *sides, requires_grad=True) for sides in ((3, 8), (4, 8), (5, 4))]
    for factors in ([], own[1:]):
        found = torch.autograd.grad(lq.matmul(own[0], q, *factors).square().sum(), own[: 1 + len(factors)])
        dense = lq.dequantize(q) + (factors[1] @ factors[0] if factors else 0)
        expected = torch.autograd.grad((own[0] @ dense.mT).square().sum(), own[: 1 + len(factors)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
