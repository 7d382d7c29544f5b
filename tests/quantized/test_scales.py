"""Storage of scales: every format, any depth, signs, zeros, and lost blocks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook, QuantizedArray, ScaleFormat, dequantize, quantize
from lqlora.errors import ScaleUnderflowWarning
from lqlora.testing.strategies import ALL_CODEBOOKS, formats, largest_for, scale_formats, weights
from tests.oracles import quantize as oracle
from tests.quantized.cases import draw_case, levels_of, normal, quantized, restored, scales_of
from tests.strategies import host, normal_numbers, on, scale_dtypes, stored

pytestmark = pytest.mark.slow_on_strict

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")

UNSIGNED = [book for book in ALL_CODEBOOKS if book.normalization != "signed"]
#: One format for each codebook of scales and each offset that it allows.
SCALES = (
    "u8/4:float32", "u8+none/4:float32", "u1/3:float32", "i8/4:float32", "i5+min/4:float32", "i6+mean/4:float32",
    "d8/4:float32", "d8+none/4:float32", "d8+min/4:float32", "l8/4:float32", "l3/4:float32", "l5+min/4:float32",
    "u8/4:u6/3:float32", "d8/4:l6/3:u4+none/2:float32",
)  # fmt: skip


# --- equal to an independent decoder


@quiet
@given(data=st.data(), depth=st.integers(1, 3))
def test_scales_of_any_format_and_depth_equal_the_oracle(xp, data, depth):
    scales = data.draw(scale_formats(scale_dtypes(xp), depth))
    fmt = BlockFormat(NF4, 1, scales)
    w = normal_numbers(xp, data.draw(weights(shape=st.tuples(st.integers(0, 60)), largest=largest_for(fmt))))
    statistics = np.abs(w)
    expected, decoded = oracle.store_scales(statistics, scales)
    q = quantize(on(xp, w), fmt)
    assert {name: content for name, content in stored(q).items() if name != "codes"} == expected
    assert scales_of(q).tobytes() == decoded.tobytes()


def decoded_by_hand(scales):
    """Decode scales of any depth by plain NumPy."""
    if not isinstance(scales, QuantizedArray):
        return scales.astype(np.float32)
    blocks = np.arange(scales.shape[0]) // scales.format.block_size
    values = scales.codebook.levels[scales.codes] * decoded_by_hand(scales.scales)[blocks]
    return values if scales.offset is None else values + scales.offset


@quiet
@pytest.mark.parametrize("scales", SCALES)
def test_more_scales_than_one_piece_takes_decode_by_the_same_formula(scales):
    q = quantize(normal(600_000), BlockFormat.parse(f"nf4/1:{scales}"))
    assert dequantize(q.scales).tobytes() == decoded_by_hand(q.scales).tobytes()
    assert dequantize(q).tobytes() == (NF4.levels[q.codes] * decoded_by_hand(q.scales)).tobytes()


@quiet
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1001])
def test_the_mean_is_summed_in_an_order_of_its_own(xp, count):
    w = np.random.default_rng(count).exponential(size=count).astype(np.float32) ** 3
    q = quantized(xp, w, BlockFormat(NF4, 1, ScaleFormat(8, 16, codebook="dynamic")))
    total = oracle.halved_sum(w.astype(np.float64).tolist())
    assert host(q.scales.offset).tolist() == [np.float32(total / count)]
    assert host(q.scales.offset)[0] == pytest.approx(w.astype(np.float64).mean(), rel=1e-7)


# --- signs


@quiet
@given(data=st.data(), fit=st.sampled_from(["absmax", "scale"]))
def test_scales_are_never_negative_where_they_have_no_sign(xp, data, fit):
    w, fmt = draw_case(data, xp, codebooks=UNSIGNED)
    for depth, level in enumerate(levels_of(quantized(xp, w, fmt, fit=fit))):
        if not isinstance(level.scales, QuantizedArray) or level.scales.format.codebook.levels[0] >= 0:
            assert (scales_of(level) >= 0).all()
        elif depth == 0:  # a mean may leave a zero scale a little below zero
            statistics = np.array(
                [oracle.statistic(place.block, fmt) for place in oracle.places(w, fmt)], dtype=np.float32
            )
            assert (scales_of(level)[statistics > 0] >= 0).all()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("fit", ["absmax", "scale"])
def test_a_scale_above_zero_never_decodes_to_zero_or_below(xp, scales, fit):
    fmt = BlockFormat.parse(f"nf4/8:{scales}")
    w = (normal(40, 8) * np.geomspace(1e-6, 1, 40)[:, None]).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleUnderflowWarning)
        q = quantized(xp, w, fmt, fit=fit)
    assert (scales_of(q) > 0).all()


@quiet
@pytest.mark.parametrize("scales", ["float32", "i8/4:float32", "i5/3:float32", "i2/9:float32", "d8+none/4:float32"])
@given(data=st.data())
@settings(max_examples=20)
def test_no_sign_of_a_scale_is_turned(fast_xp, scales, data):
    fmt = BlockFormat.parse(f"bof4s-64/4:{scales}")
    w = data.draw(weights(largest=1e38)) + np.float32(0)
    expected = np.array([oracle.statistic(place.block, fmt) for place in oracle.places(w, fmt)], dtype=np.float32)
    assert (np.sign(expected) * np.sign(scales_of(quantize(on(fast_xp, w), fmt))) >= 0).all()


@pytest.mark.parametrize("scales", ["float32", *SCALES])
def test_a_zero_block_comes_back_zero(xp, scales):
    w = normal(6, 8)
    w[2] = 0.0
    q = quantized(xp, w, BlockFormat.parse(f"nf4/8:{scales}"))
    assert restored(q)[2].tolist() == [0.0] * 8
    if "mean" not in scales and "d8/" not in scales:
        assert scales_of(q)[2] == 0.0


@quiet
@given(data=st.data(), fit=st.sampled_from(["absmax", "scale", "levels+scale"]))
@settings(max_examples=30)
def test_an_array_of_zeros_has_scales_of_zero_and_comes_back_zero(fast_xp, data, fit):
    fmt = data.draw(formats(scale_dtypes(fast_xp), codebooks=[b for b in ALL_CODEBOOKS if b.bits < 5]))
    if fit == "levels+scale" and fmt.codebook.normalization == "affine":
        return
    q = quantized(fast_xp, np.zeros((5, 9), dtype=np.float32), fmt, fit=fit)
    assert not restored(q).any()
    assert not scales_of(q).any()


@pytest.mark.parametrize("offset", ["min", "none"])
@quiet
@given(data=st.data())
@settings(max_examples=25)
def test_a_zero_scale_stays_exactly_zero_without_a_mean(xp, offset, data):
    scales = data.draw(scale_formats(scale_dtypes(xp), 1).filter(lambda s: s.offset == offset))
    fmt = BlockFormat(NF4, 3, scales)
    w = data.draw(weights(largest=largest_for(fmt), shape=st.tuples(st.integers(1, 9)))).repeat(3)
    w[:3] = 0.0
    q = quantize(on(xp, w), fmt)
    assert scales_of(q)[0] == 0.0
    assert not restored(q)[:3].any()


# --- lost blocks


def lost_blocks(w, q):
    """Count the blocks that are not zero but decode to zeros only."""
    dense, size = restored(q).reshape(-1), q.format.block_size
    flat = w.reshape(-1)
    parts = [slice(start, start + size) for start in range(0, flat.size, size)]
    return sum(bool(flat[part].any()) and not dense[part].any() for part in parts)


def caught(xp, w, fmt, **options):
    """Return the number of lost blocks in the warning, and the quantized array."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        q = quantized(xp, w, fmt, **options)
    assert len(found) <= 1
    if not found:
        return 0, q
    assert found[0].category is ScaleUnderflowWarning
    count, _, blocks = str(found[0].message).split(" ")[:3]
    assert str(found[0].message).startswith(f"{count} of {blocks} blocks of ")
    return int(count), q


@pytest.mark.parametrize("scales", SCALES)
def test_exactly_the_lost_blocks_are_counted(xp, scales):
    w = (normal(200, 4) * np.geomspace(1e-8, 1, 200)[:, None]).astype(np.float32)
    w[::7] = 0.0
    count, q = caught(xp, w, BlockFormat.parse(f"nf4/4:{scales}"))
    # Within a factor of 1.2 of the boundary it depends on the sign of the largest weight: see below.
    assert count == pytest.approx(lost_blocks(w, q), abs=3)
    assert (count > 0) == (lost_blocks(w, q) > 0)


@pytest.mark.parametrize("text", ["nf4/4:float32", "nf4/4:bfloat16", "nf4/4:l8/16:float32", "affine4/4:float32"])
def test_nothing_lost_no_warning(fast_xp, text):
    w = (normal(200, 4) * np.geomspace(0.1, 1, 200)[:, None]).astype(np.float32)
    count, q = caught(fast_xp, w, BlockFormat.parse(text))
    assert count == lost_blocks(w, q) == 0


@pytest.mark.parametrize("text", ["int4/4:float16", "affine4/4:float16", "uint4/4:float16", "bof4s-64/4:float16"])
def test_scales_that_round_to_zero_are_counted(fast_xp, text):
    w = np.array([[1e-9] * 4, [0.0] * 4, [1.0] * 4, [1e-8, 0, 0, 0]], dtype=np.float32)
    count, q = caught(fast_xp, w, BlockFormat.parse(text), name="q_proj")
    assert count == lost_blocks(w, q) == 2


def test_the_warning_says_what_and_what_to_do():
    message = (
        r"^1 of 2 blocks of q_proj are not zero but decode to zeros: their scales round to zero in float16\. "
        r"Scale the weights up, or choose a dtype of wider range\.$"
    )
    with pytest.warns(ScaleUnderflowWarning, match=message):
        quantize(np.array([1e-9, 1.0], dtype=np.float32), BlockFormat.parse("nf4/1:float16"), name="q_proj")


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_the_warning_points_to_the_line_that_quantizes(batch_dims):
    with pytest.warns(ScaleUnderflowWarning) as found:
        quantize(np.array([[1e-9, 1.0]], dtype=np.float32), BlockFormat.parse("nf4/1:float16"), batch_dims=batch_dims)
    assert found[0].filename == __file__


def test_a_lost_block_is_counted_though_its_negative_would_not_be_lost():
    # The levels of NF4 next to zero are -0.091 and 0.080. So 0.042 of the scale is kept, and -0.042 rounds to zero.
    w = np.array([1.0, -0.042 / 255], dtype=np.float32)
    count, q = caught(np, w, BlockFormat.parse("nf4/1:u8+none/2:float32"))
    assert lost_blocks(w, q) == 1
    assert count == 1


def test_a_block_that_a_fit_keeps_is_not_counted():
    w = np.array([2.9e-8], dtype=np.float32)
    count, q = caught(np, w, BlockFormat.parse("nf4/1:float16"), fit="scale")
    assert count == lost_blocks(w, q)


def test_a_block_that_a_fit_loses_is_counted():
    w = np.array([1.0, 1e-6], dtype=np.float32)
    count, q = caught(np, w, BlockFormat(Codebook([-1, 1]), 1, ScaleFormat(8, 2, offset="none")), fit="scale")
    assert lost_blocks(w, q) == 1
    assert count == 1


# --- powers of two


@given(
    codebook=st.sampled_from(ALL_CODEBOOKS),
    block_size=st.integers(1, 20),
    scales=st.sampled_from(["float32", *SCALES]),
    seed=st.integers(0, 999),
    exponent=st.integers(-80, 80),
)
@quiet
def test_a_power_of_two_changes_the_scales_only(xp, codebook, block_size, scales, seed, exponent):
    # Weights, scales and their scales stay far from both ends of the normal range, whatever the exponent.
    if codebook.normalization == "signed":
        scales = "float32"
    fmt = BlockFormat(codebook, block_size, BlockFormat.parse(f"nf4/1:{scales}").scales)
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(60) * rng.choice([0, 0.01, 1], 60)).astype(np.float32) + np.float32(0)
    factor = np.float32(2.0**exponent)
    once, scaled = quantize(on(xp, w), fmt), quantize(on(xp, w * factor), fmt)
    assert host(scaled.codes).tolist() == host(once.codes).tolist()
    assert host(dequantize(scaled)).tobytes() == (host(dequantize(once)) * factor).tobytes()
    arrays, scaled_arrays = once.to_arrays(), scaled.to_arrays()
    for name, array in arrays.items():
        grown = host(array) if name.endswith(("codes", "zero_points")) else host(array) * factor
        assert host(scaled_arrays[name]).tobytes() == grown.tobytes()


# --- size


@quiet
@given(data=st.data())
def test_storage_is_what_was_counted(xp, data):
    w, fmt = draw_case(data, xp, fitted=True)
    q = quantize(on(xp, w), fmt)
    assert fmt.storage_bits(w.shape) == 8 * q.nbytes == 8 * sum(len(content) for content in stored(q).values())


@quiet
@pytest.mark.parametrize("scales", ["float32", *SCALES])
def test_huge_weights_come_back_finite(xp, scales):
    w = np.array([3.4e38, -3.4028235e38, 1.0, 0.0, 1e37, 2e37], dtype=np.float32)
    dense = restored(quantized(xp, w, BlockFormat.parse(f"nf4/2:{scales}")))
    assert np.isfinite(dense).all()
    if scales.startswith("u8/4:f"):
        np.testing.assert_allclose(dense, w, rtol=0.05, atol=1e36)


@quiet
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1.1754942e-38])
def test_denormal_weights_are_quantized_like_others(xp, tiny):
    w = np.array([tiny, -tiny, 0.0, tiny], dtype=np.float32)
    assert restored(quantized(xp, w, BlockFormat(NF4, 2))).tolist() == w.tolist()
