"""Importance by row and by column: floor, zeros, and refused arguments."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.weighting import RowColumn, Uniform
from tests.oracles import weighting as oracle
from tests.strategies import host, on
from tests.weighting.cases import residual

seeds = st.integers(0, 999)


@given(seed=seeds)
def test_fisher_information_of_rank_one_is_exact(xp, seed):
    rng = np.random.default_rng(seed)
    fisher = np.outer(rng.exponential(size=5), rng.exponential(size=7))
    weighting = RowColumn.from_fisher(on(xp, fisher))
    # All values are above the floor.
    np.testing.assert_allclose(np.outer(host(weighting.row), host(weighting.col)), fisher, rtol=1e-5, atol=1e-6)


def test_fisher_information_is_approximated_by_its_means():
    fisher = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    weighting = RowColumn.from_fisher(fisher)
    assert weighting.row.tolist() == [2.0, 2.0]
    assert weighting.col.tolist() == [1.0, 1.0, 1.0]


def test_means_of_the_largest_fisher_information_do_not_overflow(xp):
    weighting = RowColumn.from_fisher(on(xp, np.full((5, 7), 3e38, dtype=np.float32)))
    np.testing.assert_allclose(host(weighting.row), 3e38, rtol=1e-6)
    np.testing.assert_allclose(host(weighting.col), 1.0, rtol=1e-6)
    assert host(weighting.row).dtype == np.float32


def test_small_importance_is_raised_to_the_floor(xp):
    weighting = RowColumn(on(xp, np.array([0.0, 1e-9, 4.0])), on(xp, np.array([1.0, 0.5])))
    assert host(weighting.row).tolist() == [1e-6 * 4.0, 1e-6 * 4.0, 4.0]
    assert host(weighting.col).tolist() == [1.0, 0.5]


def test_a_row_of_zero_importance_is_approximated_too(xp):
    error, row, col = residual(), np.ones(9), np.linspace(0.0, 1.0, 7)
    row[4] = 0.0
    step = RowColumn(on(xp, row), on(xp, col)).low_rank(on(xp, error), 3)
    expected = oracle.best(error, np.diag(oracle.raised(row)), np.diag(oracle.raised(col)), 3)
    np.testing.assert_allclose(host(step.left) @ host(step.right), expected, atol=1e-7)
    assert np.abs(expected[4]).max() < 10 * np.abs(error[4]).max()


@pytest.mark.parametrize("which", ["row", "col"])
def test_zero_importance_becomes_equal_importance_and_warns(xp, which):
    arrays = {"row": np.ones(2), "col": np.ones(3)}
    arrays[which] = 0 * arrays[which]
    with pytest.warns(UserWarning, match=f"^{which} .*zeros") as caught:
        weighting = RowColumn(*(on(xp, array) for array in arrays.values()))
    assert [warning.filename for warning in caught] == [__file__]
    assert weighting.all_zero
    assert weighting.squared_norm(on(xp, np.ones((2, 3)))) == pytest.approx(6.0)


def test_some_positive_importance_does_not_warn(xp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighting = RowColumn(on(xp, np.array([0.0, 1.0])), None)
    assert not weighting.all_zero


def test_row_and_col_may_not_both_be_none():
    with pytest.raises(InvalidArgumentError, match=r"^row or col .*Uniform\(\)"):
        RowColumn(None, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("bad", "error"), [(-1e-9, InvalidArgumentError), (np.nan, NonFiniteError), (np.inf, NonFiniteError)]
)
def test_weights_that_are_negative_or_not_finite_are_refused(xp, dtype, bad, error):
    vector, matrix = np.ones(3, dtype=dtype), np.ones((3, 3), dtype=dtype)
    vector[1] = matrix[1, 2] = bad
    good = on(xp, np.ones(3, dtype=dtype))
    with pytest.raises(error, match=r"^row "):
        RowColumn(on(xp, vector), good)
    with pytest.raises(error, match=r"^col "):
        RowColumn(None, on(xp, vector))
    with pytest.raises(error, match=r"^fisher "):
        RowColumn.from_fisher(on(xp, matrix))


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64])
def test_importance_of_other_dtypes_is_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match=r"^row must be"):
        RowColumn(on(xp, np.ones(3, dtype=dtype)), on(xp, np.ones(3)))
    with pytest.raises(UnsupportedArrayError, match=r"^fisher must be"):
        RowColumn.from_fisher(on(xp, np.ones((3, 3), dtype=dtype)))


@pytest.mark.parametrize("bad", [[1.0, 2.0], 3.0, "weights"], ids=str)
def test_other_types_than_arrays_are_refused(bad):
    with pytest.raises(UnsupportedArrayError, match="array"):
        RowColumn(bad, None)
    with pytest.raises(UnsupportedArrayError, match="array"):
        RowColumn.from_fisher(bad)


def test_importance_of_other_dimensions_is_refused(xp):
    vector, matrix = on(xp, np.ones(3)), on(xp, np.ones((3, 3)))
    with pytest.raises(InvalidArgumentError, match=r"^row .*shape \(3, 3\)"):
        RowColumn(matrix, vector)
    with pytest.raises(InvalidArgumentError, match=r"^col .*shape \(3, 3\)"):
        RowColumn(None, matrix)
    with pytest.raises(InvalidArgumentError, match=r"^fisher .*shape \(3,\)"):
        RowColumn.from_fisher(vector)


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (6,), (2, 3, 1)])
def test_the_side_without_importance_may_have_any_length(shape):
    assert Uniform().check(shape) is None
    assert RowColumn(np.ones(2), None).check((2, 99)) is None
    assert RowColumn(None, np.ones(3)).check((99, 3)) is None
    with pytest.raises(InvalidArgumentError, match=f"^(row|col) .*{re.escape(str(shape))}, got [23]"):
        RowColumn(np.ones(2), np.ones(3)).check(shape)


def test_row_and_col_of_two_libraries_do_not_mix(torch):
    with pytest.raises(MixedArraysError):
        RowColumn(np.ones(2), torch.ones(3))
