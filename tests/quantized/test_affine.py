"""Affine formats: blocks with a zero point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import BlockFormat, affine, quantize
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.oracles import quantize as oracle
from tests.quantized.cases import draw_case, normal, quantized, restored, scales_of
from tests.strategies import host, on, stored

pytestmark = pytest.mark.slow_on_strict

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
BOOKS = [book for book in ALL_CODEBOOKS if book.normalization == "affine"]


def zero_points(q):
    blocks = len(scales_of(q))
    return oracle.unpack(host(q.zero_points).tobytes(), q.format.bits, blocks)


@quiet
@given(data=st.data())
def test_bytes_and_values_equal_the_oracle(xp, data):
    w, fmt = draw_case(data, xp, codebooks=BOOKS)
    expected_bytes, expected = oracle.quantize(w, fmt)
    q = quantized(xp, w, fmt)
    assert stored(q) == expected_bytes
    np.testing.assert_array_equal(restored(q), expected)


@given(bits=st.integers(1, 8), seed=st.integers(0, 99), size=st.integers(1, 20))
def test_scale_and_zero_point_span_the_block_and_zero(bits, seed, size):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(size) + rng.choice([-3, 0, 3])).astype(np.float32)
    q = quantize(w, BlockFormat(affine(bits), size))
    low, high = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
    last = 2**bits - 1
    assert float(q.scales[0]) == np.float32((high - low) / np.float32(last))
    assert zero_points(q) == [min(max(round(float(-low / q.scales[0])), 0), last)]


@quiet
@given(data=st.data(), fit=st.sampled_from(["absmax", "scale"]))
@settings(max_examples=30)
def test_zero_comes_back_exactly(xp, data, fit):
    w, fmt = draw_case(data, xp, codebooks=BOOKS)
    assert not restored(quantized(xp, w, fmt, fit=fit))[w == 0].any()


def test_integers_come_back_exactly(xp):
    w = np.array([-3, 0, 4, 12, 1, -1, 7, 2], dtype=np.float32)
    q = quantized(xp, w, BlockFormat(affine(4), 8))
    assert restored(q).tolist() == w.tolist()
    assert zero_points(q) == [3]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_is_at_most_a_step(bits):
    # Half a step of rounding, and at an end half a step by which the rounded zero point may shift the grid.
    w = normal(50, 16)
    q = quantize(w, BlockFormat(affine(bits), 16))
    steps = q.scales.repeat(16).reshape(50, 16)
    assert (np.abs(restored(q) - w) <= steps * 1.00001).all()


def test_a_search_moves_zero_points(fast_xp):
    w = normal(200, 16)
    fmt = BlockFormat(affine(2), 16)
    plain, fitted = quantized(fast_xp, w, fmt), quantized(fast_xp, w, fmt, fit="scale")
    moved = np.abs(np.array(zero_points(plain)) - zero_points(fitted))
    assert set(moved.tolist()) == {0, 1}
    assert ((restored(fitted) - w) ** 2).sum() < 0.8 * ((restored(plain) - w) ** 2).sum()


def test_zero_points_are_counted():
    fmt = BlockFormat(affine(4), 64, "float16")
    assert fmt.bits_per_weight == 4 + (16 + 4) / 64
    q = quantize(normal(3, 64), fmt)
    assert 8 * q.nbytes == fmt.storage_bits((3, 64)) == 3 * 64 * 4 + 16 + 3 * 16  # three codes of zero take two bytes


@pytest.mark.parametrize("w", [[0.0, 0.0], [0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]])
def test_a_block_of_zeros_of_either_sign_is_all_zero(xp, w):
    q = quantize(on(xp, np.array(w, dtype=np.float32)), BlockFormat(affine(4), 2))
    assert stored(q) == {"codes": b"\0", "scales": bytes(4), "zero_points": b"\0"}


def test_weights_whose_range_is_beyond_float32_need_a_narrower_one():
    w = np.array([-2e38, 1e38], dtype=np.float32)
    np.testing.assert_allclose(restored(quantize(w, BlockFormat(affine(4), 2))), w, rtol=0.1)
