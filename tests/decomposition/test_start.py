"""Decomposition from a given low-rank part (``start=``)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from tests.decomposition.cases import FMT, SMALL, contents, matrix, small_case
from tests.strategies import host

RANK = 3


@pytest.mark.parametrize("kind", ["uniform", "row-column", "elementwise", "gram"])
def test_a_precomputed_low_rank_step_gives_the_same_bytes(kind):
    norm = small_case(kind).on(np)
    w = matrix(0, *SMALL, dtype=np.float64)
    start = norm.low_rank(w, RANK, seed=5)
    options = {"weighting": norm, "seed": 5, "max_iter": 4}
    assert contents(lq.decompose(w, FMT, RANK, start=start, **options)) == contents(
        lq.decompose(w, FMT, RANK, **options)
    )


def test_factors_of_a_similar_format_save_iterations_and_keep_the_promises(xp):
    w = matrix(1, 96, 80)
    array = xp.asarray(w)
    similar = lq.decompose(array, lq.BlockFormat.parse("nf3/16:u8/16:float32"), RANK)
    alone = lq.decompose(array, FMT, RANK, max_iter=1)
    found = lq.decompose(array, FMT, RANK, max_iter=1, start=(similar.lora_B, similar.lora_A))
    assert found.squared_error < alone.squared_error
    assert found.relative_error <= min(found.errors)
    rest = w - host(lq.dequantize(found.quantized)) - host(found.lora_B) @ host(found.lora_A)
    np.testing.assert_allclose((rest.astype(np.float64) ** 2).sum(), found.squared_error, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_a_start_may_have_another_rank(rank):
    w = matrix(2)
    start = (np.zeros((w.shape[0], rank), dtype=np.float32), np.zeros((rank, w.shape[1]), dtype=np.float64))
    zero = lq.decompose(w, FMT, RANK, max_iter=3, start=start)
    assert contents(zero)[2:] == contents(lq.decompose(w, FMT, RANK, max_iter=3, init_rank=0))[2:]


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ((np.zeros((40, 2)),), {}),
        (np.zeros((40, 2)), {}),
        ((np.zeros((40, 2)), np.zeros((3, 32))), {}),
        ((np.zeros((32, 2)), np.zeros((2, 40))), {}),
        ((np.zeros(40), np.zeros(32)), {}),
        ((np.zeros((40, 2)), np.zeros((2, 32))), {"init": "quantize"}),
        ((np.zeros((40, 2)), np.zeros((2, 32))), {"init": "zero"}),
    ],
)
def test_invalid_starts_are_refused(start, options):
    with pytest.raises(InvalidArgumentError, match="start"):
        lq.decompose(matrix(), FMT, RANK, start=start, **options)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="lora_A"):
        lq.decompose(matrix(), FMT, RANK, start=(np.zeros((40, 2)), np.full((2, 32), np.nan)))


def decomposed(xp, fmt=FMT, rank=RANK, **options):
    w = xp.asarray(matrix(3, 48, 64))
    return w, lq.decompose(w, fmt, rank, max_iter=3, rtol=0.0, **options)


@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_a_decomposition_is_continued(xp, fit, scaling):
    w, first = decomposed(xp, fit=fit, scaling=scaling)
    again = lq.decompose(w, FMT, RANK, start=first, fit=fit, scaling=scaling, max_iter=20, rtol=0.0)
    assert again.errors[0] == pytest.approx(first.relative_error, rel=1e-5)
    assert again.relative_error <= first.relative_error * (1 + 1e-6)
    longer = lq.decompose(w, FMT, RANK, fit=fit, scaling=scaling, max_iter=23, rtol=0.0)
    assert again.relative_error < 1.02 * longer.relative_error
    rest = host(w) - host(again.reconstruct())
    np.testing.assert_allclose((rest.astype(np.float64) ** 2).sum(), again.squared_error, rtol=1e-4)


@pytest.mark.parametrize("text", ["tcq2-6/16@0:float32", "nf2/16~in:float32", "nf3/16@-1:u8/4:float32"])
def test_another_quantizer_goes_on_in_another_norm_and_never_gets_worse(text):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 64)) + 2 * rng.standard_normal((300, 3)) @ rng.standard_normal((3, 64))
    norm, fmt = lq.weighting.InputGram(x.T @ x), lq.BlockFormat.parse(text)
    w, first = decomposed(np, fmt=fmt, fit="scale")
    before = norm.squared_norm(w - first.reconstruct())
    again = lq.decompose(w, fmt, RANK, start=first, weighting=norm, quantizer="gptq", fit="scale", max_iter=3)
    assert again.squared_error < before
    once = lq.decompose(w, fmt, RANK, start=again, weighting=norm, quantizer="gptq", fit="scale", max_iter=1)
    assert once.squared_error <= again.squared_error * (1 + 1e-6)


def test_factors_that_trained_and_ranks_of_zero_and_more_than_the_matrix_are_continued():
    w, first = decomposed(np)
    trained = dataclasses.replace(first, lora_B=first.lora_B * np.float32(1.1))
    again = lq.decompose(w, FMT, RANK, start=trained, max_iter=2)
    assert again.relative_error < again.errors[0]
    w, alone = decomposed(np, rank=0)
    finer = lq.decompose(w, FMT, 0, start=alone, fit="scale")
    assert finer.stop_reason == "rank_zero"
    assert finer.squared_error < alone.squared_error
    w, wide = decomposed(np, rank=60, clip_rank=True)
    assert lq.decompose(w, FMT, 60, start=wide, clip_rank=True, max_iter=1).lora_A.shape == (60, 64)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"rank": 4}),
        ({}, {"fmt": lq.BlockFormat.parse("nf2/16:float32")}),
        ({}, {"w": np.ones((48, 63))}),
        ({}, {"init": "quantize"}),
        ({}, {"fit": "levels+scale"}),
        ({"lora_A": np.full((RANK, 64), np.nan, dtype=np.float32)}, {}),
    ],
)
def test_what_cannot_be_continued(changes, options):
    w, first = decomposed(np)
    start = dataclasses.replace(first, **changes)
    with pytest.raises((InvalidArgumentError, NonFiniteError), match=r"start|lora_A"):
        lq.decompose(**({"w": w, "fmt": FMT, "rank": RANK, "start": start} | options))
