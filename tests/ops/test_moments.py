from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lqlora.errors import InvalidArgumentError, NonFiniteError, UnsupportedArrayError
from lqlora.ops import symmetric_moment
from tests.strategies import host, normal_numbers, on

SQUARES = st.integers(0, 6).flatmap(
    lambda n: arrays(np.float32, (n, n), elements=st.floats(-(2.0**100), 2.0**100, width=32))
)


@given(SQUARES)
def test_a_symmetric_matrix_is_returned_in_float64_to_the_last_bit(xp, square):
    square = normal_numbers(xp, square)
    gram = np.tril(square) + np.tril(square, -1).T
    found = host(symmetric_moment(on(xp, gram), "the gram"))
    assert found.dtype == np.float64
    assert (found == gram).all()


@given(SQUARES)
def test_rounding_is_averaged_away_and_anything_more_is_refused(xp, square):
    largest = float(np.abs(square).max(initial=0.0))
    difference = float(np.abs(square.astype(np.float64) - square.T).max(initial=0.0))
    if difference > 1e-3 * largest:
        with pytest.raises(InvalidArgumentError, match=r"the gram.*symmetric"):
            symmetric_moment(on(xp, square), "the gram")
    else:
        found = host(symmetric_moment(on(xp, square), "the gram"))
        assert (found == found.T).all()
        assert np.abs(found - square).max(initial=0.0) <= 1e-3 * largest


def test_the_largest_numbers_do_not_overflow(xp):
    gram = np.full((2, 2), np.finfo(np.float64).max)
    assert (host(symmetric_moment(on(xp, gram), "the gram")) == gram).all()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 2), ()])
def test_only_squares_are_taken(xp, shape):
    with pytest.raises(InvalidArgumentError, match=r"the gram of q_proj.*square"):
        symmetric_moment(on(xp, np.ones(shape)), "the gram of q_proj")


def test_what_is_not_finite_or_no_float_is_refused(xp):
    with pytest.raises(NonFiniteError, match="the gram has 1"):
        symmetric_moment(on(xp, np.array([[np.nan]])), "the gram")
    with pytest.raises(UnsupportedArrayError, match="the gram must be"):
        symmetric_moment(on(xp, np.ones((2, 2), dtype=np.int64)), "the gram")


def test_the_smallest_numbers_keep_their_bits(xp):
    gram = np.array([[3.0, 1.0], [1.0, 2.0]]) * 5e-324
    assert (host(symmetric_moment(on(xp, gram), "the gram")) == gram).all()
