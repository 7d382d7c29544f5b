"""Norms of outputs: Gram matrices that are singular, ill-conditioned, or none at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.weighting import InputGram, Kronecker, RowColumn
from tests.oracles import weighting as oracle
from tests.strategies import host, on
from tests.weighting.cases import gram, residual

seeds = st.integers(0, 999)
some = settings(max_examples=6)

both_kinds = pytest.mark.parametrize("kind", ["gram", "kronecker"])


def make(kind, xp, inputs, **options):
    if kind == "gram":
        return InputGram(on(xp, inputs), **options)
    return Kronecker(on(xp, np.eye(9, dtype=inputs.dtype)), on(xp, inputs), **options)


def product(step):
    return host(step.left).astype(np.float64) @ host(step.right).astype(np.float64)


def conditioned(seed, size, condition):
    """A positive definite matrix whose eigenvalues fall evenly by a factor in all."""
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return (vectors * np.logspace(0, -np.log10(condition), size)) @ vectors.T


def test_the_norm_is_the_mean_square_of_the_outputs(xp):
    rng = np.random.default_rng(0)
    x, error = rng.standard_normal((50, 7)), residual()
    weighting = InputGram(on(xp, x.T @ x / 50), damping=1e-12)
    assert weighting.squared_norm(on(xp, error)) == pytest.approx(((x @ error.T) ** 2).sum() / 50, rel=1e-9)


def test_a_diagonal_gram_counts_columns(xp):
    squares, error = np.random.default_rng(0).exponential(size=7) + 0.1, residual()
    whole = InputGram(on(xp, np.diag(squares)), damping=1e-12).low_rank(on(xp, error), 2)
    diagonal = RowColumn(None, on(xp, squares)).low_rank(on(xp, error), 2)
    np.testing.assert_allclose(product(whole), product(diagonal), atol=1e-9)
    assert whole.squared_error == pytest.approx(diagonal.squared_error, rel=1e-9)


def test_an_output_gram_of_the_identity_changes_nothing(xp):
    inputs, error = gram(np.random.default_rng(0), 7), residual()
    one, two = (make(kind, xp, inputs).low_rank(on(xp, error), 2) for kind in ("gram", "kronecker"))
    np.testing.assert_allclose(product(two), product(one), atol=1e-9)
    assert two.squared_error == pytest.approx(1.01 * one.squared_error, rel=1e-9)  # it is damped, too


@given(seed=seeds, damping=st.sampled_from([1e-6, 1e-2, 1.0]))
@some
def test_damping_adds_a_share_of_the_mean_to_the_diagonal(xp, seed, damping):
    inputs, error = gram(np.random.default_rng(seed), 7), residual(seed)
    weighting = InputGram(on(xp, inputs), damping=damping)
    form = np.kron(np.eye(9), oracle.damped(inputs, damping))
    assert weighting.squared_norm(on(xp, error)) == pytest.approx(oracle.squared_norm(form, error), rel=1e-11)
    found = product(weighting.low_rank(on(xp, error), 2))
    np.testing.assert_allclose(found, oracle.best(error, np.eye(9), oracle.damped(inputs, damping), 2), atol=1e-6)


@both_kinds
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_singular_gram_is_damped(xp, kind, dtype):
    inputs, error = gram(np.random.default_rng(0), 7, samples=3).astype(dtype), residual(dtype=dtype)
    step = make(kind, xp, inputs).low_rank(on(xp, error), 2)
    outputs = np.eye(9) * (1.0 if kind == "gram" else 1.01)
    optimum = oracle.best(error.astype(np.float64), outputs, oracle.damped(inputs, 0.01), 2)
    np.testing.assert_allclose(product(step), optimum, atol=1e-8 if dtype is np.float64 else 2e-3)


@pytest.mark.parametrize("damping", [1e-13, 1e-2])
def test_an_ill_conditioned_gram_reaches_the_closed_form(xp, damping):
    inputs, outputs, error = conditioned(0, 7, 1e12), conditioned(1, 9, 1e12), residual()
    for weighting, left in (
        (InputGram(on(xp, inputs), damping=damping), np.eye(9)),
        (Kronecker(on(xp, outputs), on(xp, inputs), damping=damping), oracle.damped(outputs, damping)),
    ):
        right = oracle.damped(inputs, damping)
        step = weighting.low_rank(on(xp, error), 2)

        def norm(rest, left=left, right=right):
            return float(((left @ rest @ right) * rest).sum())

        optimum = norm(error - oracle.best(error, left, right, 2))
        assert step.squared_error == pytest.approx(optimum, rel=1e-3)
        assert norm(error - product(step)) == pytest.approx(optimum, rel=1e-2)


@both_kinds
def test_an_ill_conditioned_gram_in_float32_gives_finite_factors(xp, kind):
    inputs = conditioned(0, 7, 1e12).astype(np.float32)
    step = make(kind, xp, inputs, damping=1e-6).low_rank(on(xp, residual(dtype=np.float32)), 2)
    assert np.abs(product(step)).max() < 100


def test_the_second_moment_is_there_for_error_feedback(xp):
    inputs = gram(np.random.default_rng(0), 7)
    for kind in ("gram", "kronecker"):
        found = host(make(kind, xp, inputs).feedback_gram)
        np.testing.assert_allclose(found, inputs, rtol=1e-12)
        assert (found == found.T).all()
    assert RowColumn(None, on(xp, np.ones(7))).feedback_gram is None


@both_kinds
def test_a_gram_of_zeros_counts_the_same_and_warns(xp, kind):
    with pytest.warns(UserWarning, match="entries of the input Gram matrix are zero: all count the same") as caught:
        weighting = make(kind, xp, np.zeros((7, 7)))
    assert [warning.filename for warning in caught] == [__file__]
    assert weighting.all_zero
    assert weighting.squared_norm(on(xp, np.ones((9, 7)))) == pytest.approx(63.0, rel=0.03)


def test_an_output_gram_of_zeros_counts_the_same_and_warns(xp):
    with pytest.warns(UserWarning, match="entries of the output Gram matrix are zero"):
        weighting = Kronecker(on(xp, np.zeros((9, 9))), on(xp, np.eye(7)))
    assert weighting.all_zero


BAD = {
    "not square": (np.ones((7, 8)), InvalidArgumentError, "must be square"),
    "a vector": (np.ones(7), InvalidArgumentError, "must be square"),
    "not symmetric": (np.eye(7) + np.triu(np.ones((7, 7)), 1), InvalidArgumentError, "must be symmetric"),
    "negative": (-np.eye(7), InvalidArgumentError, "is not positive semidefinite"),
    "indefinite": (np.diag([1.0] * 6 + [-0.5]), InvalidArgumentError, "is not positive semidefinite"),
    "no diagonal": (np.ones((7, 7)) - np.eye(7), InvalidArgumentError, "is not positive semidefinite"),
    "nan": (np.full((7, 7), np.nan), NonFiniteError, "(?i)put Gram matrix has 49 non-finite"),
    "infinite": (np.diag([1.0] * 6 + [np.inf]), NonFiniteError, "(?i)put Gram matrix has 1 non-finite"),
    "integers": (np.eye(7, dtype=np.int64), UnsupportedArrayError, "put Gram matrix must be"),
    "booleans": (np.eye(7, dtype=np.bool_), UnsupportedArrayError, "put Gram matrix must be"),
    "complex": (np.eye(7, dtype=np.complex64), UnsupportedArrayError, "put Gram matrix must be"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_gram_is_refused(xp, bad):
    array, error, message = BAD[bad]
    good, array = on(xp, np.eye(7)), on(xp, array)
    with pytest.raises(error, match=message):
        InputGram(array)
    with pytest.raises(error, match=message):
        Kronecker(good, array)
    with pytest.raises(error, match=message):
        Kronecker(array, good)


@pytest.mark.parametrize("bad", [[[1.0]], 1.0, "gram", None], ids=str)
def test_what_is_no_array_is_refused(bad):
    with pytest.raises(UnsupportedArrayError, match="array"):
        InputGram(bad)
    with pytest.raises(UnsupportedArrayError, match="array"):
        Kronecker(bad, np.eye(2))


@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan, np.inf])
def test_damping_is_positive_and_finite(damping):
    with pytest.raises(InvalidArgumentError, match="damping is positive and finite"):
        InputGram(np.eye(3), damping=damping)
    with pytest.raises(InvalidArgumentError, match="damping is positive and finite"):
        Kronecker(np.eye(3), np.eye(3), damping=damping)


def test_a_gram_that_is_symmetric_up_to_rounding_is_taken(xp):
    inputs = gram(np.random.default_rng(0), 7).astype(np.float16).astype(np.float32)
    inputs[1, 2] *= 1 + 1e-4
    assert InputGram(on(xp, inputs)).low_rank(on(xp, residual(dtype=np.float32)), 2).squared_error > 0


def test_grams_of_two_libraries_do_not_mix(torch):
    with pytest.raises(MixedArraysError):
        Kronecker(np.eye(2), torch.eye(3))


def test_the_message_names_the_side_that_does_not_fit():
    with pytest.raises(InvalidArgumentError, match=r"input Gram matrix of 7x7 does not fit the columns of \(7, 9\)"):
        InputGram(np.eye(7)).check((7, 9))
    with pytest.raises(InvalidArgumentError, match=r"output Gram matrix of 9x9 does not fit the rows of \(8, 7\)"):
        Kronecker(np.eye(9), np.eye(7)).check((8, 7))
