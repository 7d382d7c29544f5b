"""Properties of all weightings: the norm is one quadratic form, and the low-rank step is the best in it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError, MixedArraysError, NonFiniteError
from lqlora.weighting import AbstractWeighting, RowColumn, Uniform
from tests.oracles import weighting as oracle
from tests.strategies import FLUSHES, flushes, host, on
from tests.weighting.cases import CLOSED, KINDS, case, residual

SHAPE = (9, 7)
seeds = st.integers(0, 999)

every_kind = pytest.mark.parametrize("kind", KINDS)
some = settings(max_examples=6)


def product(step):
    return host(step.left).astype(np.float64) @ host(step.right).astype(np.float64)


# --- the norm


@every_kind
@given(seed=seeds)
@some
def test_the_norm_is_the_quadratic_form(xp, kind, seed):
    own, error = case(kind, seed), residual(seed)
    expected = oracle.squared_norm(own.form(SHAPE), error)
    assert own.on(xp).squared_norm(on(xp, error)) == pytest.approx(expected, rel=1e-11)
    in_float32 = case(kind, seed, dtype=np.float32).on(xp).squared_norm(on(xp, error.astype(np.float32)))
    assert in_float32 == pytest.approx(expected, rel=1e-5)


@every_kind
@given(seed=seeds)
@some
def test_element_weights_are_the_diagonal_of_the_form(xp, kind, seed):
    own = case(kind, seed)
    importance = own.on(xp).element_weights()
    if kind == "uniform":
        assert importance is None
        return
    found = np.broadcast_to(host(importance), SHAPE).ravel()
    expected = np.diag(own.form(SHAPE))
    # All share one factor, which keeps products of small numbers in the range of float32.
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-11)


@pytest.mark.sampled(42)
@every_kind
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_error_of_a_step_is_the_norm_of_what_it_leaves(xp, kind, rank, dtype):
    own, error = case(kind, dtype=dtype), residual(dtype=dtype)
    step = own.on(xp).low_rank(on(xp, error), rank)
    left = own.norm(error - product(step))
    precision = 1e-4 if dtype is np.float32 else 1e-9
    assert step.squared_error == pytest.approx(left, rel=precision, abs=precision**2 * own.norm(error))


# --- the low-rank step


@pytest.mark.parametrize("kind", CLOSED)
@given(seed=seeds, rank=st.integers(0, 7))
@some
def test_the_step_reaches_the_closed_form(xp, kind, seed, rank):
    own, error = case(kind, seed), residual(seed)
    step = own.on(xp).low_rank(on(xp, error), rank)
    expected = oracle.best(error, *own.sides(SHAPE), rank)
    np.testing.assert_allclose(product(step), expected, atol=1e-7)
    total = own.norm(error)
    assert step.squared_error == pytest.approx(own.norm(error - expected), rel=1e-9, abs=1e-18 * total)


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sketch_comes_within_a_percent_of_the_closed_form(xp, kind, dtype):
    own, error = case(kind, 1, 60, 40, dtype), residual(1, 60, 40, dtype)
    found = own.norm(error - product(own.on(xp).low_rank(on(xp, error), 6)))
    optimum = own.norm(error - oracle.best(error.astype(np.float64), *own.sides(error.shape), 6))
    assert optimum * (1 - 1e-6) <= found <= optimum * 1.01


@pytest.mark.parametrize("kind", CLOSED)
@given(seed=seeds, size=st.sampled_from([1e-4, 1e-2, 0.3]))
@some
def test_no_change_of_the_factors_lowers_the_norm(xp, kind, seed, size):
    own, error = case(kind, seed), residual(seed)
    step = own.on(xp).low_rank(on(xp, error), 2)
    left, right = host(step.left), host(step.right)
    rng = np.random.default_rng(seed)
    least = own.norm(error - left @ right)
    for _ in range(5):
        others = [factor + size * np.std(factor) * rng.standard_normal(factor.shape) for factor in (left, right)]
        assert own.norm(error - others[0] @ others[1]) >= least * (1 - 1e-12)


@every_kind
def test_full_rank_is_exact(xp, kind):
    error = residual()
    step = case(kind).on(xp).low_rank(on(xp, error), min(SHAPE))
    np.testing.assert_allclose(product(step), error, atol=1e-10)
    assert step.squared_error < 1e-18 * case(kind).norm(error)


@every_kind
def test_rank_zero_leaves_everything(xp, kind):
    error, own = residual(), case(kind)
    step = own.on(xp).low_rank(on(xp, error), 0)
    assert (tuple(step.left.shape), tuple(step.right.shape)) == ((9, 0), (0, 7))
    assert step.squared_error == pytest.approx(own.norm(error), rel=1e-12)


@every_kind
def test_the_factors_of_a_component_have_one_norm(xp, kind):
    step = case(kind).on(xp).low_rank(on(xp, residual()), 4)
    lengths = np.linalg.norm(host(step.left), axis=0), np.linalg.norm(host(step.right), axis=1)
    np.testing.assert_allclose(*lengths, rtol=1e-9)


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_keeps_the_dtype_and_its_residual(xp, kind, dtype):
    error = on(xp, residual(dtype=dtype))
    step = case(kind, dtype=dtype).on(xp).low_rank(error, 2)
    assert host(step.left).dtype == host(step.right).dtype == dtype
    assert host(error).tobytes() == residual(dtype=dtype).tobytes()


@every_kind
@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)], ids=str)
def test_importance_and_residual_may_differ_in_precision(xp, kind, dtypes):
    own, error = case(kind, dtype=dtypes[0]), residual(dtype=dtypes[1])
    step = own.on(xp).low_rank(on(xp, error), 2)
    assert host(step.left).dtype == host(step.right).dtype == dtypes[1]
    assert step.squared_error == pytest.approx(own.norm(error - product(step)), rel=1e-4)


@every_kind
def test_a_warm_start_is_as_good_as_a_cold_one(xp, kind):
    own, error = case(kind, 2, 60, 40), residual(2, 60, 40)
    nearby = error + 0.02 * residual(3, 60, 40)
    weighting = own.on(xp)
    previous = weighting.low_rank(on(xp, error), 6)
    warm = weighting.low_rank(on(xp, nearby), 6, previous=previous)
    cold = weighting.low_rank(on(xp, nearby), 6)
    assert warm.squared_error <= 1.01 * cold.squared_error
    assert warm.squared_error == pytest.approx(own.norm(nearby - product(warm)), rel=1e-6)


@every_kind
def test_the_same_seed_gives_the_same_bytes(xp, kind):
    weighting, error = case(kind, 0, 60, 40).on(xp), on(xp, residual(0, 60, 40))
    first, again, other = (host(weighting.low_rank(error, 4, seed=seed).left).tobytes() for seed in (5, 5, 6))
    assert first == again != other


# --- invariance to scale and order


@pytest.mark.sampled(7)
@every_kind
@given(seed=seeds, exponent=st.integers(-200, 200))
@some
def test_scaling_a_residual_scales_the_step(xp, kind, seed, exponent):
    weighting, error, factor = case(kind, seed).on(xp), residual(seed), 2.0**exponent
    plain, scaled = (weighting.low_rank(on(xp, own), 2) for own in (error, error * factor))
    assert scaled.squared_error == pytest.approx(plain.squared_error * factor**2, rel=1e-9)
    np.testing.assert_allclose(product(scaled) / factor, product(plain), atol=1e-9)
    assert weighting.squared_norm(on(xp, error * factor)) == pytest.approx(
        weighting.squared_norm(on(xp, error)) * factor**2, rel=1e-12
    )


@pytest.mark.sampled(7)
@every_kind
@given(seed=seeds, exponent=st.integers(-60, 60))
@some
def test_the_unit_of_the_importance_does_not_matter(xp, kind, seed, exponent):
    own, error, factor = case(kind, seed), residual(seed), 2.0**exponent
    count = sum(weights is not None for weights in own.weights)
    plain, scaled = (weights.on(xp).low_rank(on(xp, error), 2) for weights in (own, own.scaled(factor)))
    assert scaled.squared_error == pytest.approx(plain.squared_error * factor**count, rel=1e-9)
    np.testing.assert_allclose(product(scaled), product(plain), atol=1e-8)


@pytest.mark.sampled(7)
@every_kind
@given(seed=seeds)
@some
def test_permuting_rows_and_columns_permutes_the_step(xp, kind, seed):
    rng = np.random.default_rng(seed)
    rows, columns = (rng.permutation(size) for size in SHAPE)
    own, error = case(kind, seed), residual(seed)
    plain = own.on(xp).low_rank(on(xp, error), 2)
    moved = own.permuted(rows, columns).on(xp).low_rank(on(xp, error[rows][:, columns]), 2)
    assert moved.squared_error == pytest.approx(plain.squared_error, rel=1e-9)
    np.testing.assert_allclose(product(moved), product(plain)[rows][:, columns], atol=1e-7)


# --- limiting cases


@pytest.mark.sampled(42)
@every_kind
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e25, 1e38])
def test_residuals_of_any_magnitude_are_approximated(xp, kind, size):
    if flushes(xp) and size < 1e-30:
        pytest.skip(FLUSHES)
    own, plain = case(kind, dtype=np.float32), residual(dtype=np.float32)
    plain = plain / np.abs(plain).max()
    error = plain * np.float32(size)
    step = own.on(xp).low_rank(on(xp, error), 3)
    assert np.isfinite(host(step.left)).all()
    assert np.isfinite(host(step.right)).all()
    assert step.squared_error == pytest.approx(own.norm(error - product(step)), rel=1e-3)
    expected = own.on(xp).low_rank(on(xp, plain), 3).squared_error
    assert step.squared_error / size**2 == pytest.approx(expected, rel=1e-3)


@every_kind
def test_the_norm_of_the_largest_residuals_does_not_overflow(xp, kind):
    own, error = case(kind, dtype=np.float32), np.full(SHAPE, 3e38, dtype=np.float32)
    assert own.on(xp).squared_norm(on(xp, error)) == pytest.approx(own.norm(error), rel=1e-5)


@pytest.mark.sampled(42)
@every_kind
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_importance_of_any_magnitude_works(xp, kind, size, dtype):
    own = case(kind, dtype=dtype)
    scaled = own.scaled(size)
    error = residual(dtype=dtype)
    step = scaled.on(xp).low_rank(on(xp, error), 3)
    plain = own.on(xp).low_rank(on(xp, error), 3)
    assert step.squared_error == pytest.approx(scaled.norm(error - product(step)), rel=1e-3)
    np.testing.assert_allclose(product(step), product(plain), atol=2e-3)
    if kind != "uniform":
        found = np.broadcast_to(host(scaled.on(xp).element_weights()), SHAPE).ravel().astype(np.float64)
        expected = np.diag(own.form(SHAPE))
        np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)


@every_kind
@pytest.mark.parametrize("rank", [0, 2, 7])
def test_a_residual_of_zeros_gives_zeros(xp, kind, rank):
    weighting, error = case(kind, dtype=np.float32).on(xp), on(xp, np.zeros(SHAPE, dtype=np.float32))
    step = weighting.low_rank(error, rank)
    assert step.squared_error == weighting.squared_norm(error) == 0.0
    assert not product(step).any()
    again = weighting.low_rank(on(xp, residual(dtype=np.float32)), rank, previous=step)
    assert np.isfinite(product(again)).all()


@every_kind
def test_rows_and_columns_of_zeros_stay_zero(xp, kind):
    error = residual()
    error[3], error[:, 5] = 0.0, 0.0
    own = case(kind)
    step = own.on(xp).low_rank(on(xp, error), 3)
    assert np.isfinite(product(step)).all()
    assert step.squared_error == pytest.approx(own.norm(error - product(step)), rel=1e-9)
    if kind in ("uniform", "row", "column", "row-column"):
        np.testing.assert_allclose(product(step)[3], 0.0, atol=1e-12)
        np.testing.assert_allclose(product(step)[:, 5], 0.0, atol=1e-12)


@every_kind
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1)])
def test_one_row_or_column_is_of_rank_one(xp, kind, shape):
    error = residual(0, *shape)
    step = case(kind, 0, *shape).on(xp).low_rank(on(xp, error), 1)
    np.testing.assert_allclose(product(step), error, atol=1e-12)


@every_kind
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_have_no_error(xp, kind, shape):
    rows, columns = shape
    empty = {
        "uniform": (),
        "row": (np.ones(rows), None),
        "column": (None, np.ones(columns)),
        "row-column": (np.ones(rows), np.ones(columns)),
        "elementwise": (np.ones(shape),),
        "gram": (np.eye(columns),),
        "kronecker": (np.eye(rows), np.eye(columns)),
    }[kind]
    weighting = type(case(kind))(kind, empty).on(xp)
    error = on(xp, np.zeros(shape))
    weighting.check(shape)
    assert weighting.squared_norm(error) == weighting.low_rank(error, 0).squared_error == 0.0


# --- refused


@every_kind
def test_a_weighting_is_for_matrices_of_one_shape(xp, kind):
    weighting = case(kind).on(xp)
    assert weighting.check(SHAPE) is None
    if kind == "uniform":
        return
    for shape in [(9,), (9, 7, 1), (7, 9)]:
        with pytest.raises(InvalidArgumentError, match=f"must .*{re.escape(str(shape))}, got"):
            weighting.check(shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
def test_residuals_of_another_library_do_not_mix(torch, kind):
    there, error = case(kind).on(np), torch.ones(SHAPE)
    with pytest.raises(MixedArraysError):
        there.squared_norm(error)
    with pytest.raises(MixedArraysError):
        there.low_rank(error, 1)


def test_a_custom_weighting_must_define_all_methods():
    with pytest.raises(TypeError, match="abstract"):
        AbstractWeighting()


# --- the whole range of float64


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
@given(seed=seeds, half=st.integers(-500, 500), residual_half=st.integers(-400, 400))
@some
def test_powers_of_four_change_no_digit(fast_xp, kind, seed, half, residual_half):
    own, error, factor = case(kind, seed), residual(seed), 4.0**residual_half
    count = sum(weights is not None for weights in own.weights)
    exponent = 2 * half * count + 4 * residual_half
    plain, scaled = own.on(fast_xp), own.scaled(4.0**half).on(fast_xp)
    expected = plain.squared_norm(on(fast_xp, error))
    if math.log2(expected) + exponent > 1021:
        with pytest.raises(NonFiniteError, match=r"^squared norm .* 1\.8e\+308"):
            scaled.squared_norm(on(fast_xp, error * factor * 4))
        return
    found = scaled.squared_norm(on(fast_xp, error * factor))
    assert found == pytest.approx(math.ldexp(expected, exponent), rel=1e-12, abs=1e-320)
    one, two = plain.low_rank(on(fast_xp, error), 2), scaled.low_rank(on(fast_xp, error * factor), 2)
    assert (host(one.left) * 2.0**residual_half).tobytes() == host(two.left).tobytes()
    assert (host(one.right) * 2.0**residual_half).tobytes() == host(two.right).tobytes()
    assert two.squared_error == pytest.approx(math.ldexp(one.squared_error, exponent), rel=1e-12, abs=1e-320)


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_norm_is_the_same_in_another_unit(xp, kind):
    own, error = case(kind).on(xp), on(xp, residual())
    found = own.measured(error)
    assert 0.5 <= found.squared_norm < 1
    assert math.ldexp(found.squared_norm, found.exponent) == own.squared_norm(error)
    assert found.weighting.squared_norm(error) == found.squared_norm
    zeros = own.measured(on(xp, np.zeros(SHAPE)))
    assert zeros.squared_norm == 0.0
    assert math.ldexp(zeros.weighting.squared_norm(error), zeros.exponent) == own.squared_norm(error)


def test_a_norm_of_a_user_keeps_its_unit(xp):
    class Plain(Uniform):
        measured = AbstractWeighting.measured

    weighting = Plain()
    assert weighting.measured(on(xp, np.full((1, 2), 8.0))) == (weighting, 128.0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_that_are_not_finite_are_refused(xp, kind):
    error = residual()
    error[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"^squared norm .*got nan"):
        case(kind).on(xp).squared_norm(on(xp, error))


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-300, 1e300])
def test_means_of_fisher_information_may_be_anywhere_in_float64(xp, size):
    fisher = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 6.0]])
    plain, scaled = (RowColumn.from_fisher(on(xp, own)) for own in (fisher, fisher * size))
    error = residual(0, 2, 3)
    assert not scaled.all_zero
    one, two = (own.measured(on(xp, error)) for own in (plain, scaled))
    ratio = math.log2(two.squared_norm / one.squared_norm) + two.exponent - one.exponent
    assert ratio == pytest.approx(math.log2(size), abs=1e-9)
