from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError
from lqlora.ops import bin_sums, level_sums, row_sums
from tests.oracles.quantize import halved_sum
from tests.strategies import host, on


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 70),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_rows_are_halved_until_one_number_is_left(xp, rows, columns, seed, dtype):
    terms = (np.random.default_rng(seed).standard_normal((rows, columns)) ** 5).astype(dtype)
    found = host(row_sums(on(xp, terms)))
    assert found.dtype == dtype
    assert found.tolist() == [float(halved_sum([dtype(term) for term in row])) for row in terms]


def test_the_order_is_not_that_of_any_library():
    terms = np.array([[1e8, 1.0, -1e8, 1.0, 3.0]], dtype=np.float32)
    # (1e8 - 1e8) + (1 + 1), then 3.
    assert row_sums(terms).tolist() == [5.0]


def test_rows_are_not_changed(xp):
    rows = on(xp, np.ones((2, 5), dtype=np.float32))
    row_sums(rows)
    assert (host(rows) == 1).all()


@st.composite
def binned(draw):
    count = draw(st.integers(0, 60))
    bins = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    terms = (
        rng.standard_normal(count)
        * 2.0 ** rng.integers(-30, 30, count)
        * draw(st.sampled_from([1e-250, 1e-30, 1.0, 1e30, 1e250]))
    )
    return terms, rng.integers(0, bins, count), bins


@given(case=binned())
def test_sums_of_bins_are_as_exact_as_they_promise(xp, case):
    terms, bins, count = case
    sums = host(bin_sums(on(xp, terms), on(xp, bins), count))
    assert (sums.dtype, sums.shape) == (np.float64, (count,))
    limit = len(terms) ** 2 * 2.0**-51 * np.abs(terms).max(initial=0.0)
    for index, found in enumerate(sums):
        assert abs(found - math.fsum(terms[bins == index].tolist())) <= limit


@given(case=binned(), seed=st.integers(0, 9))
def test_the_order_of_the_terms_does_not_matter(xp, case, seed):
    terms, bins, count = case
    order = np.random.default_rng(seed).permutation(len(terms))
    once = host(bin_sums(on(xp, terms), on(xp, bins), count))
    assert host(bin_sums(on(xp, terms[order]), on(xp, bins[order]), count)).tobytes() == once.tobytes()
    assert once.tobytes() == bin_sums.reference(terms, bins, count).tobytes()


@given(numbers=st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=50), exponent=st.integers(-900, 900))
def test_sums_of_multiples_of_one_number_are_exact(numbers, exponent):
    unit = 2.0**exponent
    found = bin_sums(np.array(numbers) * unit, np.zeros(len(numbers), dtype=np.int64), 1)
    assert Fraction(float(found[0])) == sum(numbers) * Fraction(unit)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 1000])
@pytest.mark.parametrize("exponent", [-1000, -500, 0, 900])
def test_no_bit_of_the_promised_52_is_lost(xp, count, exponent):
    largest = 2 ** (52 - (count - 1).bit_length()) - 1
    terms = np.array([largest, *[1] * (count - 1)]) * 2.0**exponent
    found = host(bin_sums(on(xp, terms), on(xp, np.zeros(count, dtype=np.int64)), 1))
    assert Fraction(float(found[0])) == (largest + count - 1) * Fraction(2) ** exponent


def test_bins_without_terms_are_zero(xp):
    sums = bin_sums(on(xp, np.array([1.0, 2.0])), on(xp, np.array([3, 3])), 5)
    assert host(sums).tolist() == [0.0, 0.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("terms", [[0.0, 0.0], []])
def test_nothing_sums_to_zero(xp, terms):
    bins = np.zeros(len(terms), dtype=np.int64)
    assert host(bin_sums(on(xp, np.array(terms, dtype=np.float64)), on(xp, bins), 2)).tolist() == [0.0, 0.0]


def test_a_million_terms_are_summed_exactly_enough():
    rng = np.random.default_rng(0)
    terms, bins = rng.exponential(size=1 << 20), rng.integers(0, 16, 1 << 20)
    found = bin_sums(terms, bins, 16)
    for index in range(16):
        assert found[index] == pytest.approx(math.fsum(terms[bins == index].tolist()), rel=1e-9)


def test_sums_by_level_are_those_of_a_loop(xp):
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((2, 6, 5)).astype(np.float32)
    importance, ratios = rng.random(6), rng.random(6).astype(np.float32)
    codes, sets = rng.integers(0, 3, (6, 5)).astype(np.uint8), np.array([0, 1, 0, 1, 1, 0])
    for own in (None, np.abs(weights)):
        above, below = np.zeros((2, 2, 3))
        for i, j in np.ndindex(6, 5):
            factor = importance[i] * float(ratios[i]) * (1 if own is None else float(own[i, j]))
            above[sets[i], codes[i, j]] += factor * float(rows[i, j])
            below[sets[i], codes[i, j]] += factor * float(ratios[i])
        arguments = [None if a is None else on(xp, a) for a in (rows, own, importance, ratios, codes, sets)]
        found = level_sums(*arguments, 3, 2)
        np.testing.assert_allclose(host(found[0]), above.reshape(-1), rtol=1e-12)
        np.testing.assert_allclose(host(found[1]), below.reshape(-1), rtol=1e-12)


@pytest.mark.parametrize("position", [2, 3, 4, 5])
def test_sums_by_level_need_arrays_that_fit(position):
    arguments = [np.ones((2, 3), np.float32), None, np.ones(2), np.ones(2, np.float32), np.zeros((2, 3), np.uint8)]
    arguments.append(np.zeros(2, np.int64))
    arguments[position] = arguments[position][:1]
    with pytest.raises(InvalidArgumentError, match=r"^rows of shape \(2, 3\)"):
        level_sums(*arguments, 2, 1)
