"""Decomposition in the norm of each weighting."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import decompose, dequantize, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError
from lqlora.weighting import Elementwise, RowColumn, Uniform
from tests.decomposition.cases import COLUMNS, FMT, ROWS, SMALL, fisher, matrix, residual_of, small_case, weighted
from tests.oracles.weighting import truncated
from tests.strategies import host, on
from tests.weighting.cases import KINDS, case

pytestmark = pytest.mark.slow_on_strict


def test_the_weighted_low_rank_step_is_optimal(xp):
    # Importance of rank one has a closed form: scale by the roots, truncate the SVD, scale back.
    w = matrix()
    rng = np.random.default_rng(3)
    row, col = rng.exponential(size=ROWS) + 0.01, rng.exponential(size=COLUMNS) + 0.01
    weighting = RowColumn(on(xp, row), on(xp, col))
    d = decompose(on(xp, w), FMT, 4, weighting=weighting, init="quantize", max_iter=1, rtol=0.0)
    residual = w - dequantize(quantize(w, FMT)).astype(np.float64)
    roots = np.sqrt(np.outer(row, col))
    optimum = truncated(residual * roots, 4) / roots
    best = weighted(residual - optimum, roots**2) / weighted(w, roots**2)
    assert d.errors[1] == pytest.approx(best, rel=0.01)
    assert d.errors[1] >= best * (1 - 1e-6)


def test_importance_of_ones_is_uniform(xp):
    w = on(xp, matrix())
    ones = RowColumn(on(xp, np.ones(ROWS, dtype=np.float32)), on(xp, np.ones(COLUMNS, dtype=np.float32)))
    plain = decompose(w, FMT, 4, weighting=Uniform(), max_iter=3)
    assert decompose(w, FMT, 4, weighting=ones, max_iter=3).errors == pytest.approx(plain.errors, rel=1e-6)


def test_importance_lowers_the_weighted_error():
    w, weights = matrix(), fisher()
    with_weights = decompose(w, FMT, 4, weighting=Elementwise(weights)).reconstruct()
    without = decompose(w, FMT, 4).reconstruct()
    assert weighted(w - with_weights, weights) < weighted(w - without, weights)
    assert weighted(w - with_weights, 1.0) > weighted(w - without, 1.0)


@pytest.mark.parametrize("kind", ["elementwise", "row-column"])
def test_rows_without_fisher_information_give_finite_factors(xp, kind):
    weights = fisher()
    weights[:10] = 0.0
    weights[:, 5] = 0.0
    make = Elementwise if kind == "elementwise" else RowColumn.from_fisher
    d = decompose(on(xp, matrix()), FMT, 4, weighting=make(on(xp, weights)), max_iter=3)
    assert np.isfinite(host(d.lora_A)).all()
    assert np.isfinite(host(d.lora_B)).all()
    assert np.isfinite(d.errors).all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_the_unit_of_the_importance_does_not_matter(xp, size):
    weights = fisher()
    plain = decompose(on(xp, matrix()), FMT, 4, weighting=Elementwise(on(xp, weights)), max_iter=3)
    scaled = decompose(
        on(xp, matrix()), FMT, 4, weighting=Elementwise(on(xp, (weights * size).astype(np.float32))), max_iter=3
    )
    assert scaled.errors == pytest.approx(plain.errors, rel=0.01)


def test_fisher_information_of_zeros_warns_and_is_ignored(xp):
    with pytest.warns(UserWarning, match="zero"):
        weighting = Elementwise(on(xp, np.zeros((ROWS, COLUMNS), dtype=np.float32)))
    d = decompose(on(xp, matrix()), FMT, 4, weighting=weighting, max_iter=3)
    assert d.relative_error == pytest.approx(decompose(matrix(), FMT, 4, max_iter=3).relative_error, rel=0.02)


@pytest.mark.parametrize(
    "make",
    [lambda: Elementwise(np.ones((COLUMNS, ROWS))), lambda: RowColumn(np.ones(3), np.ones(COLUMNS))],
    ids=["elementwise", "row-column"],
)
def test_importance_of_another_shape_is_refused(make):
    with pytest.raises(InvalidArgumentError, match=r"\(40, 32\).*got"):
        decompose(matrix(), FMT, 4, weighting=make())


@pytest.mark.parametrize("kind", ["elementwise", "row-column"])
def test_importance_of_another_library_is_refused(torch, kind):
    weighting = Elementwise(fisher()) if kind == "elementwise" else RowColumn(fisher()[:, 0], fisher()[0])
    with pytest.raises(MixedArraysError):
        decompose(torch.from_numpy(matrix()), FMT, 4, weighting=weighting, max_iter=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_is_lowered_on_every_library(xp, kind):
    own, w = case(kind, 0, ROWS, COLUMNS, np.float32), matrix()
    d = decompose(on(xp, w), FMT, 4, weighting=own.on(xp), max_iter=3)
    numpys = decompose(w, FMT, 4, weighting=own.on(np), max_iter=3)
    # Another BLAS rounds differently: a few codes change, and the iterates differ slightly.
    assert d.relative_error == pytest.approx(numpys.relative_error, rel=0.03)
    assert d.relative_error < 0.95 * d.errors[0]
    assert own.norm(residual_of(w, d)) == pytest.approx(d.squared_error, rel=1e-3)


@pytest.mark.sampled(14)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_every_norm_is_lowered_by_every_fit(fast_xp, kind, fit):
    own, w = small_case(kind, 0, np.float32), matrix(0, *SMALL)
    d, plain = (
        decompose(on(fast_xp, w), FMT, 2, weighting=own.on(fast_xp), fit=chosen, max_iter=2)
        for chosen in (fit, "absmax")
    )
    assert d.relative_error < d.errors[0]
    if kind not in ("gram", "kronecker"):  # a fit uses the diagonal of these forms only
        assert d.relative_error < 1.02 * plain.relative_error
    assert own.norm(residual_of(w, d)) == pytest.approx(d.squared_error, rel=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
def test_each_norm_is_lowered_best_by_its_own_weighting(kind):
    own, w = case(kind, 0, ROWS, COLUMNS, np.float32), matrix()
    with_weights, without = (
        decompose(w, FMT, 4, weighting=weighting, fit="scale", max_iter=6) for weighting in (own.on(np), None)
    )
    assert own.norm(residual_of(w, with_weights)) < own.norm(residual_of(w, without))


def test_sweeps_lower_the_error_of_a_decomposition():
    errors = [
        decompose(matrix(), FMT, 4, weighting=Elementwise(fisher(), sweeps=sweeps)).relative_error for sweeps in (0, 2)
    ]
    assert errors[1] < 0.99 * errors[0]


def test_a_matrix_of_zero_importance_has_no_error():
    w, weights = matrix(), np.zeros((ROWS, COLUMNS), dtype=np.float32)
    weights[3], w[3] = 1.0, 0.0
    d = decompose(w, FMT, 2, weighting=Elementwise(weights), max_iter=2)
    assert d.relative_error == 0.0
    assert np.isfinite(d.reconstruct()).all()
