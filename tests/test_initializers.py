from __future__ import annotations

import numpy as np
import pytest

from lqlora import BlockFormat, decompose, dequantize, quantize
from lqlora.initializers import loftq, lqlora, qlora
from lqlora.weighting import Elementwise
from tests.strategies import host, on, stored

FMT = BlockFormat.parse("nf2/16:float32")


@pytest.fixture
def w():
    return np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)


@pytest.fixture
def fisher():
    return np.random.default_rng(1).exponential(size=(48, 32)).astype(np.float32)


def same(one, other):
    return (
        stored(one.quantized) == stored(other.quantized)
        and host(one.lora_A).tobytes() == host(other.lora_A).tobytes()
        and host(one.lora_B).tobytes() == host(other.lora_B).tobytes()
    )


def test_lqlora_starts_from_the_svd_and_iterates_until_it_converges(xp, w):
    d = lqlora(on(xp, w), FMT, 4)
    assert same(d, decompose(on(xp, w), FMT, 4, init="svd"))
    assert d.stop_reason == "converged"


def test_lqlora_is_weighted_by_fisher_information(xp, w, fisher):
    d = lqlora(on(xp, w), FMT, 4, fisher=on(xp, fisher), max_iter=4)
    assert same(d, decompose(on(xp, w), FMT, 4, weighting=Elementwise(on(xp, fisher)), max_iter=4))
    assert not same(d, lqlora(on(xp, w), FMT, 4, max_iter=4))


@pytest.mark.parametrize("iterations", [1, 5])
def test_loftq_alternates_a_fixed_number_of_times(xp, w, iterations):
    d = loftq(on(xp, w), FMT, 4, iterations=iterations)
    assert (d.stop_reason, len(d.errors)) == ("max_iter", 1 + iterations)


def test_one_iteration_of_loftq_is_one_svd_of_the_residual(w):
    residual = w - dequantize(quantize(w, FMT))
    left, values, right = np.linalg.svd(residual)
    optimum = np.linalg.norm(residual - (left[:, :4] * values[:4]) @ right[:4]) / np.linalg.norm(w)
    assert loftq(w, FMT, 4, iterations=1).relative_error == pytest.approx(optimum, rel=0.02)


def test_loftq_is_the_alternation_of_its_paper(w):
    # Algorithm 1 of arXiv 2310.08659 with exact decompositions: quantize what the factors leave, then the reverse.
    product = np.zeros_like(w)
    errors = []
    for _ in range(5):
        quantized = dequantize(quantize(w - product, FMT))
        left, values, right = np.linalg.svd(w - quantized, full_matrices=False)
        product = (left[:, :4] * values[:4]) @ right[:4]
        errors.append(np.linalg.norm(w - quantized - product) / np.linalg.norm(w))
    assert loftq(w, FMT, 4).errors[1:] == pytest.approx(errors, rel=0.02)


def test_qlora_starts_the_adapter_at_zero(xp, w):
    d = qlora(on(xp, w), FMT, 4, seed=3)
    assert same(d, decompose(on(xp, w), FMT, 4, init="zero", seed=3))
    assert not host(d.lora_B).any()
    assert host(d.lora_A).any()


def test_more_work_gives_a_smaller_error(w):
    errors = [d.relative_error for d in (qlora(w, FMT, 8), loftq(w, FMT, 8, iterations=1), lqlora(w, FMT, 8))]
    assert errors[0] > errors[1] > errors[2]
