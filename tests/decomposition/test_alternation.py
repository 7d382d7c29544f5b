"""The alternation: equal to its oracle, and never worse than its start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lqlora import decompose, quantize
from tests.decomposition.cases import COLUMNS, FMT, ROWS, SMALL, matrix, rounded, small_case
from tests.oracles import decomposition as oracle
from tests.oracles import weighting as oracle_weighting
from tests.strategies import on
from tests.weighting.cases import CLOSED, KINDS, case

pytestmark = pytest.mark.slow_on_strict


def test_the_alternation_improves_on_its_start():
    d = decompose(matrix(), FMT, 8)
    assert d.relative_error < 0.98 * d.errors[1] < d.errors[0]
    assert d.best >= 2


# --- equal to the oracle


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("init", ["svd", "quantize"])
def test_zero_extrapolation_is_the_alternation_of_the_papers(xp, kind, init):
    own, w = small_case(kind), matrix(1, *SMALL, np.float64)
    d = decompose(
        on(xp, w), FMT, 6, weighting=own.on(xp), init=init, extrapolation=0.0, max_iter=5, rtol=0.0, quantizer="nearest"
    )

    def approximated(target):
        return oracle_weighting.best(target, *own.sides(SMALL), 6)

    start = approximated(w) if init == "svd" else np.zeros(SMALL)
    pairs = itertools.islice(oracle.alternation(w, rounded, approximated, start), 5)
    errors = [(own.norm(w - quantized - product) / own.norm(w)) ** 0.5 for quantized, product in pairs]
    assert d.errors[-5:] == pytest.approx(errors, rel=1e-6)
    assert len(d.errors) == 5 + (2 if init == "svd" else 1)


@pytest.mark.parametrize("init_rank", [0, 1, 3, 6])
def test_init_rank_may_be_a_part_of_the_rank(xp, init_rank):
    w = matrix(1, 24, 11, np.float64)  # a sketch spans it for every rank
    d = decompose(on(xp, w), FMT, 6, init_rank=init_rank, extrapolation=0.0, max_iter=3, rtol=0.0)

    def approximated(target):
        return oracle_weighting.truncated(target, 6)

    start = oracle_weighting.truncated(w, init_rank)
    pairs = itertools.islice(oracle.alternation(w, rounded, approximated, start), 3)
    errors = [np.linalg.norm(w - quantized - product) / np.linalg.norm(w) for quantized, product in pairs]
    assert d.errors[2:] == pytest.approx(errors, rel=1e-9)


def test_init_rank_zero_equals_quantization_first():
    w = matrix(1, *SMALL, np.float64)
    nothing = decompose(w, FMT, 6, init_rank=0, extrapolation=0.0, max_iter=4, rtol=0.0)
    first = decompose(w, FMT, 6, init="quantize", extrapolation=0.0, max_iter=4, rtol=0.0)
    assert nothing.errors[2:] == pytest.approx(first.errors[1:], rel=1e-9)


@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
def test_extrapolation_ends_lower_after_as_many_iterations(fit):
    plain, ahead = (
        [decompose(matrix(seed), FMT, 4, fit=fit, extrapolation=step, max_iter=12, rtol=0.0) for seed in range(3)]
        for step in (0.0, None)
    )
    lower = [after.relative_error / before.relative_error for before, after in zip(plain, ahead, strict=True)]
    assert max(lower) < 1.01
    assert np.mean(lower) < 1.0


def test_extrapolation_repeats_the_last_change():
    # The third target is extrapolated; the first two are those of the papers.
    w, targets = matrix(1, *SMALL, np.float64), []

    def spy(target, previous):
        targets.append(target)
        return quantize(target, FMT)

    decompose(w, FMT, 6, quantizer=spy, extrapolation=0.5, max_iter=3, rtol=0.0)
    alone, first, second, third = targets
    np.testing.assert_array_equal(alone, w)
    start = oracle_weighting.truncated(w, 6)
    products = [start, *(oracle_weighting.truncated(w - rounded(target), 6) for target in (first, second))]
    np.testing.assert_allclose(first, w - start, atol=1e-12)
    np.testing.assert_allclose(second, w - products[1] - 0.5 * (products[1] - start), atol=1e-12)
    np.testing.assert_allclose(third, w - products[2] - 0.5 * (products[2] - products[1]), atol=1e-12)


# --- safeguards


@pytest.mark.sampled(14)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
@pytest.mark.parametrize("init", ["svd", "quantize"])
def test_never_worse_than_quantization_nor_than_one_svd_of_its_residual(kind, fit, init):
    own, w = small_case(kind), matrix(2, *SMALL, np.float64)
    weighting = own.on(np)
    d = decompose(w, FMT, 6, weighting=weighting, fit=fit, init=init, max_iter=2)
    weights = None if fit == "absmax" else weighting.element_weights()
    residual = w - rounded(w, fit=fit, weights=weights)
    alone = own.norm(residual) / own.norm(w)
    assert d.errors[0] == pytest.approx(alone**0.5, rel=1e-6)
    if kind == "elementwise":
        one_svd = own.on(np).low_rank(residual, 6).squared_error / own.norm(w)
    else:
        one_svd = own.norm(residual - oracle_weighting.best(residual, *own.sides(SMALL), 6)) / own.norm(w)
    assert d.errors[1] == pytest.approx(one_svd**0.5, rel=1e-6)
    assert d.relative_error <= min(alone, one_svd) ** 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("init", ["svd", "quantize"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_randomized_decomposition_is_as_good_within_a_percent(xp, init, rank):
    w = matrix()
    d = decompose(on(xp, w), FMT, rank, init=init, max_iter=1)
    residual = w - rounded(w)
    one_svd = np.linalg.norm(residual - oracle_weighting.truncated(residual, rank)) / np.linalg.norm(w)
    assert d.errors[0] == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(w), rel=1e-5)
    assert d.relative_error <= one_svd * 1.01 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_refitting_never_makes_a_pair_worse(kind):
    own, w = case(kind, 3, ROWS, COLUMNS), matrix(3)
    seen = []
    d = decompose(w, FMT, 4, weighting=own.on(np), max_iter=6, callback=lambda _, error: seen.append(error))
    assert d.relative_error <= min(seen) == seen[d.best]
    assert [error for index, error in enumerate(d.errors) if index != d.best] == [
        error for index, error in enumerate(seen) if index != d.best
    ]
