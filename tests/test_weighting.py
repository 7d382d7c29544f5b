from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.weighting import Elementwise, RowColumn, Uniform
from tests.strategies import host, on

seeds = st.integers(0, 999)


def drawn(seed, rows=5, columns=7):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)), rng.exponential(size=rows), rng.exponential(size=columns)


@given(seed=seeds)
def test_norms_are_weighted_sums_of_squares(xp, seed):
    residual, row, col = drawn(seed)
    weights = np.outer(row, col)
    there = on(xp, residual)
    assert Uniform().squared_norm(there) == pytest.approx((residual**2).sum(), rel=1e-12)
    assert RowColumn(on(xp, row), on(xp, col)).squared_norm(there) == pytest.approx(
        (weights * residual**2).sum(), rel=1e-12
    )
    assert Elementwise(on(xp, weights)).squared_norm(there) == pytest.approx((weights * residual**2).sum(), rel=1e-12)


@given(seed=seeds)
def test_fisher_information_of_rank_one_is_met_exactly(xp, seed):
    _, row, col = drawn(seed)
    weighting = RowColumn.from_fisher(on(xp, np.outer(row, col)))
    # No weight is so small that the floor would raise it.
    np.testing.assert_allclose(
        np.outer(host(weighting.row), host(weighting.col)), np.outer(row, col), rtol=1e-5, atol=1e-6
    )


def test_fisher_information_is_approximated_by_its_means():
    fisher = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    weighting = RowColumn.from_fisher(fisher)
    assert weighting.row.tolist() == [2.0, 2.0]
    assert weighting.col.tolist() == [1.0, 1.0, 1.0]


def test_huge_residuals_do_not_overflow(xp):
    residual = on(xp, np.full((2, 2), 3e38, dtype=np.float32))
    ones = on(xp, np.ones(2, dtype=np.float32))
    for weighting in (Uniform(), RowColumn(ones, ones), Elementwise(on(xp, np.ones((2, 2), dtype=np.float32)))):
        assert weighting.squared_norm(residual) == pytest.approx(4 * 9e76, rel=1e-6)


def test_small_weights_are_raised_to_the_floor(xp):
    weighting = RowColumn(on(xp, np.array([0.0, 1e-9, 4.0])), on(xp, np.array([1.0, 0.5])))
    assert host(weighting.row).tolist() == [1e-6 * 4.0, 1e-6 * 4.0, 4.0]
    assert host(weighting.col).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("which", ["row", "col"])
def test_weights_that_are_all_zero_count_the_same_and_warn(xp, which):
    arrays = {"row": np.ones(2), "col": np.ones(3)}
    arrays[which] = 0 * arrays[which]
    with pytest.warns(UserWarning, match="are zero: all count the same"):
        weighting = RowColumn(*(on(xp, array) for array in arrays.values()))
    assert weighting.squared_norm(on(xp, np.ones((2, 3)))) == pytest.approx(6.0)


def test_fisher_information_that_is_all_zero_counts_every_entry_the_same_and_warns(xp):
    with pytest.warns(UserWarning, match="zero"):
        weighting = Elementwise(on(xp, np.zeros((2, 3))))
    assert weighting.all_zero
    assert weighting.squared_norm(on(xp, np.ones((2, 3)))) == pytest.approx(6.0)


def test_positive_weights_do_not_warn(xp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighting = Elementwise(on(xp, np.array([[0.0, 1.0], [0.0, 0.0]])))
    assert weighting.squared_norm(on(xp, np.ones((2, 2)))) == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("bad", "error"), [(-1e-9, InvalidArgumentError), (np.nan, NonFiniteError), (np.inf, NonFiniteError)]
)
def test_weights_that_are_negative_or_not_finite_are_refused(xp, dtype, bad, error):
    vector, matrix = np.ones(3, dtype=dtype), np.ones((3, 3), dtype=dtype)
    vector[1] = matrix[1, 2] = bad
    good = on(xp, np.ones(3, dtype=dtype))
    with pytest.raises(error, match=r"(?i)row weights"):
        RowColumn(on(xp, vector), good)
    with pytest.raises(error, match=r"(?i)column weights"):
        RowColumn(good, on(xp, vector))
    with pytest.raises(error, match=r"(?i)fisher information"):
        RowColumn.from_fisher(on(xp, matrix))
    with pytest.raises(error):
        Elementwise(on(xp, matrix))


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64])
def test_weights_of_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError):
        RowColumn(on(xp, np.ones(3, dtype=dtype)), on(xp, np.ones(3)))
    with pytest.raises(UnsupportedArrayError):
        Elementwise(on(xp, np.ones((3, 3), dtype=dtype)))


def test_weights_of_other_dimensions_are_refused(xp):
    vector, matrix = on(xp, np.ones(3)), on(xp, np.ones((3, 3)))
    with pytest.raises(InvalidArgumentError, match="Row weights have one dimension, not 2"):
        RowColumn(matrix, vector)
    with pytest.raises(InvalidArgumentError, match="two dimensions, not 1"):
        Elementwise(vector)


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (6,), (2, 3, 1)])
def test_weights_fit_one_shape(shape):
    weightings = RowColumn(np.ones(2), np.ones(3)), Elementwise(np.ones((2, 3)))
    for weighting in weightings:
        assert weighting.check((2, 3)) is None
        with pytest.raises(InvalidArgumentError, match="do not fit"):
            weighting.check(shape)
    assert Uniform().check(shape) is None


def test_weights_of_two_libraries_do_not_mix(torch):
    with pytest.raises(MixedArraysError):
        RowColumn(np.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    "make",
    [lambda xp: RowColumn(xp.ones(2), xp.ones(3)), lambda xp: Elementwise(xp.ones((2, 3)))],
    ids=["row-column", "elementwise"],
)
def test_residuals_of_another_library_do_not_mix(torch, make):
    with pytest.raises(MixedArraysError):
        make(np).squared_norm(torch.ones(2, 3))
    with pytest.raises(MixedArraysError):
        make(np).low_rank(torch.ones(2, 3), 1)
    with pytest.raises(MixedArraysError):
        make(torch).low_rank(np.ones((2, 3)), 1)
