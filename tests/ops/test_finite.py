from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import NonFiniteError
from lqlora.ops import is_finite, power_of_four, require_finite, sum_of_squares
from lqlora.testing.strategies import shapes, weights
from tests.strategies import host, normal_numbers, on


@given(w=weights())
def test_finite_values_pass(xp, w):
    assert require_finite(on(xp, w), "weight") is None


@given(
    shape=shapes(max_side=6),
    places=st.sets(st.integers(0, 215), min_size=1),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_the_error_names_array_count_and_first_index(xp, shape, places, bad):
    w = np.zeros(shape, dtype=np.float32)
    places = sorted({place for place in places if place < w.size} | {w.size - 1})
    if w.size == 0:
        assert require_finite(on(xp, w), "weight") is None
        return
    for place in places:
        w[np.unravel_index(place, shape)] = bad
    first = tuple(int(index) for index in np.unravel_index(places[0], shape))
    with pytest.raises(NonFiniteError) as caught:
        require_finite(on(xp, w), "weight 'q_proj'")
    message = f"weight 'q_proj' has {len(places)} non-finite value(s), the first at index {first}."
    assert str(caught.value) == message


@given(w=weights())
def test_squares_are_summed_in_float64(xp, w):
    w = normal_numbers(xp, w)
    expected = sum(float(value) ** 2 for value in w.reshape(-1))
    assert sum_of_squares(on(xp, w)) == pytest.approx(expected, rel=1e-13, abs=0.0)


def test_squares_of_huge_values_do_not_overflow(xp):
    assert sum_of_squares(on(xp, np.full(10, 3e38, dtype=np.float32))) == pytest.approx(9e77, rel=1e-6)


def test_squares_of_tiny_values_do_not_vanish(xp):
    tiny = np.full(4, 1e-30, dtype=np.float32)
    assert sum_of_squares(on(xp, tiny)) == pytest.approx(4e-60, rel=1e-6, abs=0.0)


@given(w=weights(largest=1e37), seed=st.integers(0, 99))
def test_squares_are_weighted(xp, w, seed):
    w = normal_numbers(xp, w)
    factors = np.random.default_rng(seed).exponential(size=w.shape).astype(np.float32)
    expected = sum(float(f) * float(value) ** 2 for f, value in zip(factors.reshape(-1), w.reshape(-1), strict=True))
    assert sum_of_squares(on(xp, w), on(xp, factors)) == pytest.approx(expected, rel=1e-13, abs=0.0)


@pytest.mark.parametrize("count", [32767, 32768, 32769, 100_000])
def test_sums_of_several_parts_leave_nothing_out(xp, count):
    assert sum_of_squares(on(xp, np.full(count, 2.0, dtype=np.float32))) == 4.0 * count


def test_the_checked_array_is_not_changed(xp):
    w = on(xp, np.array([1.0, np.nan], dtype=np.float32))
    with pytest.raises(NonFiniteError):
        require_finite(w, "w")
    assert np.isnan(host(w)).tolist() == [False, True]


@given(
    w=weights(shape=shapes()),
    bad=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    data=st.data(),
)
def test_what_is_not_finite_is_seen_wherever_it_is(xp, w, bad, data):
    w = w.copy()
    if bad is not None and w.size:
        w.reshape(-1)[data.draw(st.integers(0, w.size - 1))] = bad
    for dtype in (np.float32, np.float64):
        assert is_finite(on(xp, w.astype(dtype))) == bool(np.isfinite(w).all())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_a_unit_brings_every_size_near_one_without_rounding(dtype, data):
    kind, width = np.dtype(dtype).type, 32 if dtype == "float32" else 64
    size = data.draw(st.floats(0, float(np.finfo(kind).max), width=width, exclude_min=True))
    unit = power_of_four(size, 2.0, dtype)
    near, back = kind(size) / kind(unit), kind(size) * (kind(1) / kind(unit))
    assert 2.0**-52 <= near <= 4
    assert near == back
    assert float(near) * unit == size
    assert power_of_four(size, 2.0 * max(size, 1 / size), dtype) == 1.0


@pytest.mark.parametrize("size", [0.0, np.inf, np.nan, 1.0, 1.9])
def test_a_size_that_has_no_power_or_is_near_one_keeps_its_unit(size):
    assert power_of_four(size, 2.0, "float64") == 1.0
