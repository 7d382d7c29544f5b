"""Rounding of a sample of blocks to formats that differ in the storage of scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.quantized import rounding_sample as sample
from lqlora.quantized.rounding_sample import RoundingSample
from tests.strategies import host, stored

SCALES = [
    "float32", "float16", "bfloat16", "u8/256:float32", "u2/16:float16", "i4/3:float32", "l8/64:bfloat16", "u3/7:u8/4:float32",
]  # fmt: skip
HEADS = ["nf4/16", "nf3/7", "nf2/64", "nf8/5@0", "nf3/7@-1", "nf4+fit4/6@-1", "affine4/6"]


def array(shape=(24, 40), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))).astype(dtype)


def rounded(w, fmt):
    return lq.dequantize(lq.quantize(w, fmt))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sample_of_everything_has_the_error_of_quantization(head, scales, weighted):
    w, fmt = array(), lq.BlockFormat.parse(f"{head}:{scales}")
    weights = np.abs(array(seed=1)) if weighted else None
    found = RoundingSample(w, lq.BlockFormat.parse(f"{head}:float32"), weights).rounded(fmt)
    squares = (w.astype(np.float64) - rounded(w, fmt)) ** 2 * (1 if weights is None else weights)
    np.testing.assert_allclose(found.squared_error, squares.sum(), rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scales", SCALES[:6])
def test_a_whole_array_is_quantized_as_by_itself(xp, head, scales):
    if scales in ("float16", "bfloat16", "u2/16:float16") and xp.__name__ == "array_api_strict":
        pytest.skip("has no such dtypes")
    w, fmt = xp.asarray(array()), lq.BlockFormat.parse(f"{head}:{scales}")
    found = RoundingSample(w, lq.BlockFormat.parse(f"{head}:float32")).quantized(fmt)
    assert stored(found) == stored(lq.quantize(w, fmt))


def test_every_library_has_the_same_sample(xp):
    fmt = lq.BlockFormat.parse("nf3/7:u4/8:float32")
    expected = RoundingSample(array(), fmt, np.abs(array(seed=1))).rounded(fmt)
    found = RoundingSample(xp.asarray(array()), fmt, xp.asarray(np.abs(array(seed=1)))).rounded(fmt)
    np.testing.assert_allclose(found.squared_error, expected.squared_error, rtol=1e-12)
    np.testing.assert_allclose(host(found.errors), expected.errors, rtol=1e-12)


@given(entries=st.integers(500, 3000), seed=st.integers(0, 99), head=st.sampled_from(["nf3/8", "nf4/8@0", "nf3/7@-1"]))
def test_a_small_sample_is_spread_over_the_array_and_near_the_whole(entries, seed, head):
    w = np.random.default_rng(seed).standard_normal((120, 64)).astype(np.float32)
    fmt = lq.BlockFormat.parse(f"{head}:u8/32:float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "_SAMPLE", entries)
        found = RoundingSample(w, fmt)
    error = ((w.astype(np.float64) - rounded(w, fmt)) ** 2).sum()
    # Errors within a block are correlated, so the tolerance is five standard deviations of a mean over blocks.
    np.testing.assert_allclose(found.rounded(fmt).squared_error, error, rtol=5 * (min(entries, w.size) / 8) ** -0.5)


def test_a_row_of_weights_counts_for_every_row_and_zeros_count_nothing():
    w, fmt = array(), lq.BlockFormat.parse("nf3/7:float32")
    row = np.arange(40, dtype=np.float32)[None, :] * (np.arange(40) % 3 > 0)
    found = RoundingSample(w, fmt, row).rounded(fmt)
    np.testing.assert_allclose(
        found.squared_error, (row * (w.astype(np.float64) - rounded(w, fmt)) ** 2).sum(), rtol=1e-6
    )
    assert RoundingSample(w, fmt, np.zeros((1, 40))).rounded(fmt).squared_error == 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_array_loses_nothing(shape):
    fmt = lq.BlockFormat.parse("nf4/8:u8/16:float32")
    assert RoundingSample(np.zeros(shape), fmt).rounded(fmt).squared_error == 0


@pytest.mark.parametrize("other", ["nf3/8:float32", "nf4/16:float32", "nf4/8@0:float32", "nf4+fit/8:float32"])
def test_other_codebooks_and_blocks_are_refused(other):
    found = RoundingSample(array(), lq.BlockFormat.parse("nf4/8:float32"))
    with pytest.raises(InvalidArgumentError, match=r"fmt must differ .* only in its scales"):
        found.rounded(lq.BlockFormat.parse(other))


def test_scales_beyond_a_dtype_are_refused():
    found = RoundingSample(array() * np.float32(1e6), lq.BlockFormat.parse("nf4/8:float32"), name="layer 3")
    with pytest.raises(NonFiniteError, match="layer 3"):
        found.rounded(lq.BlockFormat.parse("nf4/8:float16"))
