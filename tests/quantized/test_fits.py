"""Scales of least squared error: never worse than absolute maxima, weighted by importance, independent of units."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook, ScaleFormat, quantize
from lqlora.errors import InvalidArgumentError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.oracles import quantize as oracle
from tests.quantized.cases import UNROTATED, block_errors, draw_case, normal, quantized, restored, scales_of
from tests.quantized.test_scales import SCALES
from tests.strategies import host, on, stored

pytestmark = [
    pytest.mark.slow_on_strict,
    pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning"),
]

FITTED = [text for text in UNROTATED if not text.startswith(("affine", "tcq"))]
SMALL = [book for book in ALL_CODEBOOKS if book.bits <= 4]


def draw_importance(data, w):
    """Draw importance: none, or values of all sizes with zeros among them, without subnormal ones."""
    seed = data.draw(st.none() | st.integers(0, 99))
    if seed is None:
        return None
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0.0, 1e-6, 1.0, 1e3], size=w.shape) * rng.exponential(size=w.shape)
    return sizes.astype(np.float32)


def uniform_if_zero(importance, w, fmt):
    """Return importance as the fit uses it: entries count equally in a block whose importance is all zero."""
    if importance is None:
        return None
    parts = [
        np.ones_like(place.block) if not place.block.any() else place.block for place in oracle.places(importance, fmt)
    ]
    return oracle.dense_of([value for part in parts for value in part], w.shape, fmt.axis)


def assert_no_block_is_worse(w, fitted, plain, importance=None):
    importance = uniform_if_zero(importance, w, fitted.format)
    for own, other in zip(block_errors(w, fitted, importance), block_errors(w, plain, importance), strict=True):
        # Importance is divided by its maximum in float32, which rounds it.
        assert own <= other * (1 + (1e-12 if importance is None else 1e-6))


# --- never worse


@given(data=st.data())
@settings(max_examples=40)
def test_no_block_is_worse_than_by_its_absolute_maximum(xp, data):
    w, fmt = draw_case(data, xp)
    w = np.where(np.abs(w) < 1e-18, w.dtype.type(0), w)  # squares of what is left are not subnormal
    importance = draw_importance(data, w)
    fitted = quantized(xp, w, fmt, fit="scale", weights=importance)
    assert_no_block_is_worse(w, fitted, quantized(xp, w, fmt), importance)


@pytest.mark.sampled(28)
@pytest.mark.parametrize("text", UNROTATED)
@pytest.mark.parametrize("weighted", [False, True])
def test_most_blocks_of_normal_weights_gain(fast_xp, text, weighted):
    fmt = BlockFormat.parse(text)
    w = normal(40, 60)
    importance = np.random.default_rng(1).exponential(size=w.shape).astype(np.float32) ** 2 if weighted else None
    fitted, plain = quantized(fast_xp, w, fmt, fit="scale", weights=importance), quantized(fast_xp, w, fmt)
    assert_no_block_is_worse(w, fitted, plain, importance)
    own, other = (np.array(block_errors(w, q, importance)) for q in (fitted, plain))
    # With few codes of scales, the neighbors of the first choice are seldom better.
    assert (own < other).mean() > (0.4 if isinstance(fmt.scales, str) else 0.1)
    # The first scale of a long block of trellis codes is close to the best.
    gain = 0.9965 if fmt.codebook.normalization == "rms" else 0.99
    assert own.sum() < (gain if isinstance(fmt.scales, str) else 0.999) * other.sum()


@pytest.mark.parametrize("scales", SCALES)
def test_no_block_is_worse_under_any_format_of_scales(fast_xp, scales):
    w = (normal(60, 24) * np.geomspace(0.01, 1, 60)[:, None]).astype(np.float32)
    fmt = BlockFormat.parse(f"nf3/8:{scales}")
    assert_no_block_is_worse(w, quantized(fast_xp, w, fmt, fit="scale"), quantized(fast_xp, w, fmt))


def test_second_level_scales_and_offsets_are_those_of_the_absolute_maximum(fast_xp):
    w, fmt = normal(20, 30), BlockFormat.parse("nf3/4:u4/8:u3/2:float32")
    fitted, plain = (stored(quantized(fast_xp, w, fmt, fit=fit)) for fit in ("scale", "absmax"))
    same = {name for name in plain if plain[name] == fitted[name]}
    assert same == {"scales.offset", "scales.scales.codes", "scales.scales.scales", "scales.scales.offset"}


@given(data=st.data())
@settings(max_examples=20)
def test_the_sum_of_errors_is_not_above_that_of_the_absolute_maximum(fast_xp, data):
    w, fmt = draw_case(data, fast_xp, codebooks=[book for book in SMALL if book.normalization != "affine"], fitted=True)
    w = np.where(np.abs(w) < 1e-18, w.dtype.type(0), w)
    importance = draw_importance(data, w)
    fitted = quantized(fast_xp, w, fmt, fit="levels+scale", weights=importance)
    assert fitted.levels is not None
    importance = uniform_if_zero(importance, w, fmt) if importance is not None and not importance.any() else importance
    own, other = (math.fsum(block_errors(w, q, importance)) for q in (fitted, quantized(fast_xp, w, fmt)))
    assert own <= other * (1 + 1e-6)


@pytest.mark.parametrize("text", FITTED)
@pytest.mark.parametrize("weighted", [False, True])
def test_fitted_levels_gain_on_normal_weights(text, weighted):
    fmt = BlockFormat.parse(text)
    if fmt.bits > 5:
        return
    w = normal(40, 60)
    importance = np.random.default_rng(1).exponential(size=w.shape).astype(np.float32) ** 2 if weighted else None
    errors = {
        fit: math.fsum(
            block_errors(w, quantize(w, fmt, fit=fit, weights=importance if fit != "absmax" else None), importance)
        )
        for fit in ("absmax", "scale", "levels+scale")
    }
    assert errors["levels+scale"] < 0.99 * errors["absmax"]
    if fmt.scales == "float32":
        assert errors["levels+scale"] < errors["scale"]


# --- the optimum, on blocks that are small enough to search


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_is_close_to_the_best_of_a_fine_grid(bits):
    book = ALL_CODEBOOKS[bits - 2]
    w = normal(50, 32)
    found = np.array(block_errors(w, quantize(w, BlockFormat(book, 32), fit="scale")))
    levels = book.levels.astype(np.float64)
    best = []
    for row in w.astype(np.float64):
        scales = np.abs(row).max() * np.linspace(0.2, 1.3, 1000)
        distances = np.abs(row[:, None, None] / scales[:, None] - levels).min(axis=2) * scales
        best.append((distances**2).sum(axis=0).min())
    assert found.sum() <= 1.02 * np.sum(best)
    assert (found <= 1.25 * np.array(best)).all()


def test_a_block_of_multiples_of_levels_is_found_exactly(xp):
    # The largest weight is not the largest level, so under the absolute maximum the weights are not all levels.
    levels = NF4.levels[[0, 3, 7, 9, 12, 14]] * np.float32(0.5)
    w = np.array([*levels, 0.4], dtype=np.float32)
    importance = np.array([1, 1, 1, 1, 1, 1, 0], dtype=np.float32)
    q = quantized(xp, w, BlockFormat(NF4, 7), fit="scale", weights=importance)
    np.testing.assert_allclose(restored(q)[:6], w[:6], rtol=1e-6)
    np.testing.assert_allclose(scales_of(q), [0.5], rtol=1e-6)


# --- importance of entries


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize(
    "text", ["nf2/16:float32", "nf3/32@0:float32", "bof4s-64/16:float32", "nf3/16:u8/16:float32", "affine3/16:float32"]
)
def test_weights_lower_the_error_that_they_weigh(fast_xp, text, fit):
    fmt = BlockFormat.parse(text)
    if fit == "levels+scale" and fmt.codebook.normalization == "affine":
        return
    w = normal(64, 48)
    # Only small weights are important here, which a fit without importance gets wrong.
    importance = np.exp(-4 * w.astype(np.float64) ** 2).astype(np.float32)
    with_weights, without = (quantized(fast_xp, w, fmt, fit=fit, weights=own) for own in (importance, None))
    found = math.fsum(block_errors(w, with_weights, importance))
    assert found < 0.7 * math.fsum(block_errors(w, without, importance))
    assert math.fsum(block_errors(w, without)) < 0.9 * math.fsum(block_errors(w, with_weights))


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("exponent", [-40, -2, 6, 60])
def test_the_unit_of_weights_changes_nothing(fast_xp, fit, exponent):
    w = normal(20, 30)
    importance = np.random.default_rng(1).exponential(size=w.shape).astype(np.float32)
    for fmt in (BlockFormat(NF4, 8), BlockFormat.parse("nf2/8@0:u8/4:float32")):
        once = quantized(fast_xp, w, fmt, fit=fit, weights=importance)
        scaled = quantized(fast_xp, w, fmt, fit=fit, weights=importance * np.float32(2.0**exponent))
        assert stored(scaled) == stored(once)


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("exponent", [-1000, -500, 500, 1000])
def test_the_unit_of_weights_may_be_anywhere_in_float64(fast_xp, fit, exponent):
    w, importance = normal(20, 30), np.random.default_rng(1).exponential(size=(20, 30))
    once, scaled = (
        quantized(fast_xp, w, BlockFormat(NF4, 8), fit=fit, weights=own)
        for own in (importance, importance * 2.0**exponent)
    )
    assert stored(scaled) == stored(once)


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_equal_weights_are_no_weights(fast_xp, fit):
    w = normal(20, 30)
    once, equal = (
        quantized(fast_xp, w, BlockFormat(NF4, 8), fit=fit, weights=own)
        for own in (None, np.full((1, 1), 4, np.float32))
    )
    assert stored(equal) == stored(once)


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("shape", [(), (1,), (30,), (20, 1), (1, 30)])
def test_weights_are_broadcast(fast_xp, fit, shape):
    w = normal(20, 30)
    importance = np.random.default_rng(1).exponential(size=shape).astype(np.float32)
    importance = np.asarray(importance, dtype=np.float32).reshape(shape)
    whole = np.broadcast_to(importance, w.shape).copy()
    for fmt in (BlockFormat(NF4, 7), BlockFormat(NF4, 7, axis=0)):
        assert stored(quantized(fast_xp, w, fmt, fit=fit, weights=importance)) == stored(
            quantized(fast_xp, w, fmt, fit=fit, weights=whole)
        )


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_weights_may_be_of_any_floating_dtype(fast_xp, fit, dtype):
    w = normal(8, 16)
    importance = np.random.default_rng(1).integers(1, 9, size=w.shape).astype(np.float32)  # exact in all of them
    narrow = importance.astype(oracle.STORAGE.get(dtype, np.float64))
    expected = quantized(fast_xp, w, BlockFormat(NF4, 4), fit=fit, weights=np.exp2(importance))
    found = quantized(
        fast_xp, w, BlockFormat(NF4, 4), fit=fit, weights=np.exp2(narrow.astype(np.float32)).astype(narrow.dtype)
    )
    assert stored(found) == stored(expected)


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_a_block_that_nothing_weighs_is_fitted_all_the_same(fast_xp, fit):
    w = normal(2, 32)
    importance = np.stack([np.zeros(32), np.ones(32)]).astype(np.float32)
    fmt = BlockFormat(NF4, 32)
    q = quantized(fast_xp, w, fmt, fit="scale", weights=importance)
    assert host(q.scales)[0] == host(quantized(fast_xp, w[0], fmt, fit="scale").scales)[0]
    zeros = np.zeros_like(importance)
    for own in (importance, zeros):
        dense = restored(quantized(fast_xp, w, fmt, fit=fit, weights=own))
        assert np.isfinite(dense).all()
        assert np.abs(dense - w).max() < 0.5
    if fit == "scale":
        assert stored(quantized(fast_xp, w, fmt, fit=fit, weights=zeros)) == stored(quantized(fast_xp, w, fmt, fit=fit))


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
def test_weights_that_leave_only_the_smallest_entries_are_taken(fit):
    w, importance = np.array([1, 1e-39], dtype=np.float32), np.array([0, 1], dtype=np.float32)
    q = quantize(w, BlockFormat(Codebook([-1, 1]), 2), fit=fit, weights=importance)
    assert restored(q)[1] == pytest.approx(1e-39, rel=1e-3)


# --- units


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@given(data=st.data(), exponent=st.integers(-60, 60))
@settings(max_examples=12)
def test_a_power_of_two_changes_the_scales_only(fast_xp, fit, data, exponent):
    books = [book for book in SMALL if fit == "scale" or book.normalization != "affine"]
    fmt = BlockFormat(
        data.draw(st.sampled_from(books)), data.draw(st.integers(1, 20)), axis=data.draw(st.sampled_from([None, 0, -1]))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    w = (rng.standard_normal((6, 10)) * rng.choice([0, 0.01, 1], (6, 10))).astype(np.float32) + np.float32(0)
    factor = np.float32(2.0**exponent)
    once, scaled = quantized(fast_xp, w, fmt, fit=fit), quantized(fast_xp, w * factor, fmt, fit=fit)
    assert host(scaled.codes).tolist() == host(once.codes).tolist()
    assert host(scaled.scales).tobytes() == (host(once.scales) * factor).tobytes()
    if fit == "levels+scale":
        assert host(scaled.levels).tobytes() == host(once.levels).tobytes()
    if fmt.codebook.normalization == "affine":
        assert host(scaled.zero_points).tolist() == host(once.zero_points).tolist()


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e37])
def test_sizes_whose_squares_leave_the_range_of_float32_are_fitted(fast_xp, fit, size):
    w = np.clip(normal(8, 32), -3, 3)
    unit = np.float32(2.0 ** math.floor(math.log2(size)))
    q, once = (quantized(fast_xp, own, BlockFormat(NF4, 16), fit=fit) for own in (w * unit, w))
    assert stored(q)["codes"] == stored(once)["codes"]


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize(
    "scales",
    ["float32"]
    # Rounded to six bits the largest scale is beyond float32, which is refused whatever the fit.
    + [text for text in SCALES if text[:2] != "i6" and not text.startswith("d8/")],
)
def test_huge_weights_are_fitted_without_overflow(fit, scales):
    w = np.array([3.3e38, -3.3e38, 2.1e38, 1e38, 3.4e38, 3e38, 1.0, 0.0, 1e30], dtype=np.float32)
    for size in (1, 3):
        q = quantize(w, BlockFormat.parse(f"nf3/{size}:{scales}"), fit=fit)
        assert np.isfinite(restored(q)).all()


@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1.1754942e-38])
def test_denormal_weights_are_fitted(fit, tiny):
    w = np.array([tiny, -tiny, 0.0, tiny], dtype=np.float32)
    assert restored(quantize(w, BlockFormat(NF4, 2), fit=fit)).tolist() == w.tolist()


# --- bad input


@pytest.mark.parametrize("fit", ["mse", "Scale", None, 1, "levels"])
def test_another_fit_is_refused(fit):
    with pytest.raises(InvalidArgumentError, match=f"fit must be .* got {fit!r}"):
        quantize(np.ones(4), BlockFormat(NF4), fit=fit)


def test_weights_for_a_fit_without_an_error_are_refused(xp):
    with pytest.raises(InvalidArgumentError, match=r"weights need fit='scale'"):
        quantized(xp, np.ones(4), BlockFormat(NF4), weights=np.ones(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(xp, bad):
    with pytest.raises(NonFiniteError, match=r"weights has 1 .* index \(2,\)"):
        quantized(xp, np.ones(4), BlockFormat(NF4), fit="scale", weights=np.array([1, 1, bad, 1]))


def test_negative_weights_are_refused(xp):
    with pytest.raises(InvalidArgumentError, match=r"weights must not be negative.* -1e-30"):
        quantized(xp, np.ones(4), BlockFormat(NF4), fit="scale", weights=np.array([1.0, -1e-30, 1, 1]))


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64])
def test_weights_of_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match=rf"weights must be .* got {np.dtype(dtype).name}"):
        quantized(xp, np.ones(4), BlockFormat(NF4), fit="scale", weights=np.ones(4, dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (5, 4), (1, 3, 4), (0,)])
def test_weights_of_another_shape_are_refused(xp, shape):
    with pytest.raises(InvalidArgumentError, match=r"weights must have a shape .* \(3, 4\)"):
        quantized(xp, np.ones((3, 4)), BlockFormat(NF4), fit="scale", weights=np.ones(shape))


def test_weights_of_another_library_are_refused(torch):
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        quantize(np.ones(4), BlockFormat(NF4), fit="scale", weights=torch.ones(4))


@pytest.mark.parametrize("value", [[1.0, 1.0], 1.0, "weights"])
def test_weights_that_are_no_array_are_refused(value):
    with pytest.raises(UnsupportedArrayError, match="array"):
        quantize(np.ones(2), BlockFormat(NF4), fit="scale", weights=value)


def test_weights_that_torch_differentiates_are_taken(torch):
    w = torch.nn.Parameter(torch.from_numpy(normal(4, 8)))
    importance = torch.ones(4, 8, requires_grad=True) * 2
    for fit in ("scale", "levels+scale"):
        q = quantize(w, BlockFormat(NF4, 8), fit=fit, weights=importance)
        assert stored(q) == stored(quantize(normal(4, 8), BlockFormat(NF4, 8), fit=fit))
        assert not any(array.requires_grad for array in q.to_arrays().values())


@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_a_fit_is_repeated_byte_for_byte(seed):
    w = normal(10, 20, seed=seed)
    assume(w.any())
    fmt = BlockFormat(NF4, 8, ScaleFormat(8, 4))
    for fit in ("scale", "levels+scale"):
        assert (
            stored(quantize(w, fmt, fit=fit))
            == stored(quantize(w.copy(), fmt, fit=fit))
            == stored(quantize(on(np, w), fmt, fit=fit))
        )


@pytest.mark.parametrize("levels", [[-1, 1], [-1, -0.5, 0.5, 1]])
@pytest.mark.parametrize("axis", [None, -1])
def test_padding_of_a_short_block_counts_nothing(levels, axis):
    # No level is zero: a search that saw the padding would prefer a smaller scale.
    tail = np.array([[1.0, -0.8, 0.9]], dtype=np.float32)
    w = np.concatenate([np.full((1, 8), 0.7, dtype=np.float32), tail], axis=1)
    fmt = BlockFormat(Codebook(levels), 8, axis=axis)
    alone = restored(quantize(tail, replace(fmt, block_size=3), fit="scale"))
    np.testing.assert_allclose(restored(quantize(w, fmt, fit="scale")).reshape(-1)[-3:], alone.reshape(-1), rtol=1e-5)
