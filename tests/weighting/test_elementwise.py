"""Elementwise weighting: sweeps lower the true norm, for which there is no closed form."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError, NonFiniteError, UnsupportedArrayError
from lqlora.weighting import Elementwise, LowRankStep, RowColumn
from tests.oracles import weighting as oracle
from tests.strategies import host, on
from tests.weighting.cases import residual

seeds = st.integers(0, 999)
some = settings(max_examples=10)


def spread(seed, rows=9, columns=7, dtype=np.float64):
    """Return importance over several orders of magnitude, far from rank one."""
    return np.exp(2 * np.random.default_rng(seed).standard_normal((rows, columns))).astype(dtype)


def left_over(weights, error, step):
    rest = error.astype(np.float64) - host(step.left).astype(np.float64) @ host(step.right)
    return float((weights.astype(np.float64) * rest**2).sum())


@pytest.mark.slow_on_strict
@given(seed=seeds, dtype=st.sampled_from([np.float32, np.float64]))
@some
def test_each_sweep_lowers_the_norm(xp, seed, dtype):
    weights, error = spread(seed, dtype=dtype), residual(seed, dtype=dtype)
    steps = [Elementwise(on(xp, weights), sweeps=count).low_rank(on(xp, error), 2) for count in (0, 1, 2, 4, 8)]
    errors = [left_over(weights, error, step) for step in steps]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < 0.99 * errors[0]


@given(seed=seeds)
@some
def test_zero_sweeps_return_the_step_of_the_surrogate(xp, seed):
    weights, error = spread(seed), residual(seed)
    step = Elementwise(on(xp, weights), sweeps=0).low_rank(on(xp, error), 2)
    row, col = (oracle.raised(weights.mean(axis=axis)) for axis in (1, 0))
    expected = oracle.best(error, np.diag(row), np.diag(col / weights.mean()), 2)
    np.testing.assert_allclose(host(step.left) @ host(step.right), expected, atol=1e-7)
    assert step.squared_error == pytest.approx(left_over(weights, error, step), rel=1e-9)


def test_free_entries_may_overflow_without_a_warning():
    # The sweeps from this start return factors whose product overflows float32, because most entries are free.
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((9, 7)) < 0.6, 0, 1).astype(np.float32)
    error = (rng.standard_normal((9, 7)) * 1e31).astype(np.float32)
    weighting = Elementwise(weights)
    start = weighting.surrogate.low_rank(error, 3)
    with np.errstate(over="ignore", invalid="ignore"):
        left, right = weighting._swept(error, start.left, start.right)
        assert not np.isfinite(left @ right).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = weighting.low_rank(error, 3)
    assert np.isfinite(step.left @ step.right).all()
    assert step.squared_error == pytest.approx(left_over(weights, error, step), rel=1e-5)


@given(seed=seeds)
@some
def test_importance_of_rank_one_has_the_closed_form(xp, seed):
    rng = np.random.default_rng(seed)
    row, col, error = rng.exponential(size=9) + 0.01, rng.exponential(size=7) + 0.01, residual(seed)
    step = Elementwise(on(xp, np.outer(row, col))).low_rank(on(xp, error), 3)
    expected = oracle.best(error, np.diag(row), np.diag(col), 3)
    np.testing.assert_allclose(host(step.left) @ host(step.right), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_many_sweeps_reach_a_local_minimum(seed):
    weights, error = spread(seed), residual(seed)
    step = Elementwise(weights, sweeps=300).low_rank(error, 2)
    rest = weights * (error - step.left @ step.right)
    # Both parts of the gradient, relative to their largest possible size.
    slopes = [
        np.linalg.norm(rest @ step.right.T) / (np.linalg.norm(rest) * np.linalg.norm(step.right)),
        np.linalg.norm(step.left.T @ rest) / (np.linalg.norm(rest) * np.linalg.norm(step.left)),
    ]
    assert max(slopes) < 1e-3
    rng = np.random.default_rng(seed)
    least = left_over(weights, error, step)
    for _ in range(20):
        others = [factor + 0.02 * np.std(factor) * rng.standard_normal(factor.shape) for factor in step[:2]]
        assert left_over(weights, error, LowRankStep(*others, None, 0.0)) >= least * (1 - 1e-6)


def test_a_half_sweep_solves_the_normal_equations_of_each_row():
    # A few steps of conjugate gradients solve for two unknowns exactly.
    weights, error = spread(0), residual(0)
    step = Elementwise(weights, sweeps=1).low_rank(error, 2)
    for column in range(7):
        roots = np.sqrt(weights[:, column])
        solution, *_ = np.linalg.lstsq(roots[:, None] * step.left, roots * error[:, column], rcond=None)
        np.testing.assert_allclose(step.right[:, column], solution, rtol=1e-6, atol=1e-9)


def test_a_step_continues_from_the_previous_one(xp):
    weights, error = spread(1), residual(1)
    weighting = Elementwise(on(xp, weights), sweeps=1)
    errors, step = [], None
    for _ in range(5):
        step = weighting.low_rank(on(xp, error), 2, previous=step)
        errors.append(step.squared_error)
    assert errors == sorted(errors, reverse=True)
    five = Elementwise(on(xp, weights), sweeps=5).low_rank(on(xp, error), 2)
    assert errors[-1] == pytest.approx(five.squared_error, rel=1e-6)


def test_entries_of_zero_importance_are_ignored(xp):
    # A matrix of rank one with a fifth of its entries replaced: the other entries determine these.
    rng = np.random.default_rng(0)
    truth = np.outer(rng.uniform(1, 2, 12), rng.uniform(1, 2, 10))
    missing = rng.random(truth.shape) < 0.2
    error = np.where(missing, 3.0, truth)
    step = Elementwise(on(xp, (~missing).astype(np.float64)), sweeps=60).low_rank(on(xp, error), 1)
    np.testing.assert_allclose(host(step.left) @ host(step.right), truth, atol=1e-5)


@pytest.mark.parametrize("small", [0.0, 1e-44, 1e-39, 1e-30])
def test_rows_and_columns_of_tiny_importance_give_finite_factors(xp, small):
    weights, error = spread(0, dtype=np.float32), residual(0, dtype=np.float32)
    weights[3] = weights[:, 2] = small
    step = Elementwise(on(xp, weights)).low_rank(on(xp, error), 2)
    surrogate = Elementwise(on(xp, weights), sweeps=0).low_rank(on(xp, error), 2)
    assert np.abs(host(step.left) @ host(step.right)).max() < 1e3
    assert step.squared_error == pytest.approx(left_over(weights, error, step), rel=1e-4)
    assert step.squared_error <= surrogate.squared_error


@pytest.mark.parametrize("size", [1e-50, 1e50])
def test_importance_beyond_float32_works_on_float32_residuals(xp, size):
    weights, error = spread(0), residual(0, dtype=np.float32)
    scaled, plain = (Elementwise(on(xp, own)).low_rank(on(xp, error), 2) for own in (weights * size, weights))
    np.testing.assert_allclose(host(scaled.left) @ host(scaled.right), host(plain.left) @ host(plain.right), atol=1e-3)
    assert scaled.squared_error == pytest.approx(plain.squared_error * size, rel=1e-3)


def test_zero_importance_becomes_equal_importance_and_warns(xp):
    with pytest.warns(UserWarning, match="^weights .*zeros") as caught:
        weighting = Elementwise(on(xp, np.zeros((9, 7))))
    assert {warning.filename for warning in caught} == {__file__}
    assert weighting.all_zero
    assert weighting.squared_norm(on(xp, np.ones((9, 7)))) == pytest.approx(63.0)
    error = residual()
    step = weighting.low_rank(on(xp, error), 2)
    np.testing.assert_allclose(host(step.left) @ host(step.right), oracle.truncated(error, 2), atol=1e-9)


def test_some_zeros_do_not_warn(xp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighting = Elementwise(on(xp, np.array([[0.0, 1.0], [0.0, 0.0]])))
    assert not weighting.all_zero
    assert weighting.squared_norm(on(xp, np.ones((2, 2)))) == 1.0


def test_the_surrogate_is_from_fisher():
    weights = spread(0)
    own, other = Elementwise(weights).surrogate, RowColumn.from_fisher(weights)
    assert own.row.tolist() == other.row.tolist()
    assert own.col.tolist() == other.col.tolist()


@pytest.mark.parametrize(
    ("bad", "error"), [(-1e-9, InvalidArgumentError), (np.nan, NonFiniteError), (np.inf, NonFiniteError)]
)
def test_weights_that_are_negative_or_not_finite_are_refused(xp, bad, error):
    weights = np.ones((3, 3))
    weights[1, 2] = bad
    with pytest.raises(error, match=r"^weights"):
        Elementwise(on(xp, weights))


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64])
def test_importance_of_other_dtypes_is_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match="weights must be"):
        Elementwise(on(xp, np.ones((3, 3), dtype=dtype)))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_importance_of_other_dimensions_is_refused(xp, shape):
    with pytest.raises(InvalidArgumentError, match=f"^weights .*{re.escape(str(shape))}"):
        Elementwise(on(xp, np.ones(shape)))


@pytest.mark.parametrize("sweeps", [-1, 1.0, "2", None, True])
def test_sweeps_that_are_no_count_are_refused(sweeps):
    with pytest.raises(InvalidArgumentError, match=f"^sweeps .*got {sweeps!r}"):
        Elementwise(np.ones((2, 2)), sweeps=sweeps)
