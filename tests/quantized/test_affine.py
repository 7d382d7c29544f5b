"""Affine formats: blocks with a zero point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
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
    return oracle.unpack(host(q.zero_points).tobytes(), q.format.codebook.zero_point_bits, blocks)


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


@given(bits=st.integers(1, 4), more=st.integers(0, 4), seed=st.integers(0, 99), size=st.integers(1, 20))
def test_a_fine_zero_point_leaves_no_more_than_half_a_gap_and_half_its_own_step(bits, more, seed, size):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(size) + rng.choice([-3, 0, 3])).astype(np.float32)
    q = quantize(w, BlockFormat(affine(bits, bits + more), size))
    gap, step = q.scales[0] * 2**more, q.scales[0]
    assert np.abs(restored(q) - w).max() <= (gap + step) / 2 * np.float32(1.00001)


@quiet
@given(data=st.data(), fit=st.sampled_from(["absmax", "scale"]))
@settings(max_examples=30)
def test_zero_comes_back_exactly(xp, data, fit):
    w, fmt = draw_case(data, xp, codebooks=[book for book in BOOKS if book.zero_point_bits == book.bits])
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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [64, 72])  # whole blocks, and a short one at the end of each line
@pytest.mark.parametrize("scales", ["u4/16:float16", "float32"])
def test_fine_zero_points_and_scales_are_fitted_together(weighted, length, scales):
    w = normal(200, length) + np.float32(0.5)
    importance = np.random.default_rng(1).exponential(size=w.shape).astype(np.float32) if weighted else None
    errors = []
    for text in ("affine2", "affine2-3", "affine2-4", "affine2-6"):
        q = quantize(w, BlockFormat.parse(f"{text}/16@-1:{scales}"), fit="scale", weights=importance)
        errors.append(((1 if importance is None else importance) * (restored(q) - w).astype(np.float64) ** 2).sum())
    assert errors[1] < 0.88 * errors[0]
    assert errors[2] < 0.94 * errors[1]
    assert errors[3] < errors[2]


def sparse(rng):
    return rng.standard_normal((60, 16)) * (rng.random((60, 16)) < 0.2)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(
    "draw",
    [
        sparse,
        lambda rng: rng.random((60, 16)) + 1,
        lambda rng: -rng.random((60, 16)) - 1,
        lambda rng: rng.standard_normal((60, 16)) + 10,
        lambda rng: rng.standard_t(2, (60, 16)),
        lambda rng: rng.integers(-2, 3, (60, 16)),
    ],
    ids=["sparse", "positive", "negative", "shifted", "heavy", "integers"],
)
def test_finer_zero_points_leave_no_more_error_than_those_on_levels(fast_xp, bits, draw):
    w = draw(np.random.default_rng(3)).astype(np.float32)
    errors = [
        ((restored(quantized(fast_xp, w, BlockFormat(affine(bits, own), 16), fit="scale")) - w) ** 2).sum(axis=1)
        for own in (bits, bits + 2)
    ]
    # The search starts from a zero point that was rounded twice, so a single block may end in another minimum.
    assert (errors[1] > errors[0] * (1 + 1e-5) + 1e-6).mean() < 0.1
    assert errors[1].sum() <= errors[0].sum()


def test_the_joint_fit_is_no_worse_than_all_pairs_of_a_grid():
    w, book = normal(20, 8), affine(2, 4)
    q = quantize(w, BlockFormat(book, 8), fit="scale")
    found = ((restored(q) - w) ** 2).sum(axis=1)
    ratios = np.linspace(0.3, 1.2, 60)[:, None, None, None]
    scales = ratios * ((w.max(axis=1).clip(0) - w.min(axis=1).clip(None, 0)) / 12)[None, None, :, None]
    points = np.arange(13)[None, :, None, None]
    values = (np.clip(np.rint((w / scales + points) / 4), 0, 3) * 4 - points) * scales
    best = ((values - w) ** 2).sum(axis=3).min(axis=(0, 1))
    assert found.sum() < 1.03 * best.sum()


def test_values_that_lie_on_fine_steps_come_back_exactly():
    w = (np.array([0, 4, 8, 12, 12, 4, 0, 8]) - 5).astype(np.float32)
    for fit in ("absmax", "scale"):
        q = quantize(w, BlockFormat(affine(2, 4), 8), fit=fit)
        assert restored(q).tolist() == w.tolist()
        assert zero_points(q) == [5]
        assert {name: len(own) for name, own in stored(q).items()} == {"codes": 2, "scales": 4, "zero_points": 1}


@pytest.mark.parametrize("text", ["affine2-4/8@-1:float32", "affine2-5/4@-1:u8/4:float32", "affine3-8/16:float16"])
def test_rows_and_files_keep_fine_zero_points(text, tmp_path):
    w = normal(16, 32)
    q = quantize(w, BlockFormat.parse(text), fit="scale")
    dense = restored(q)
    np.testing.assert_array_equal(restored(q.rows(8, 16)), dense[8:])
    lq.save(tmp_path / "a.safetensors", {"a": q})
    back = lq.load(tmp_path / "a.safetensors").matrices["a"].quantized
    assert stored(back) == stored(q)
    assert str(back.format) == text
    np.testing.assert_allclose(lq.matmul(np.eye(32, dtype=np.float32), back), dense.T, rtol=1e-6)


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
