"""Quantization gives the same bytes as the oracle, on every library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
from lqlora import NF4, BlockFormat, Codebook, ScaleFormat, dequantize, quantize
from lqlora.testing.strategies import ALL_CODEBOOKS, LAYOUTS, formats, lay_out, ties, weights
from tests.oracles import quantize as oracle
from tests.quantized.cases import UNROTATED, draw_case, normal, quantized, restored
from tests.strategies import host, on, scale_dtypes, stored

pytestmark = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")


@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_bytes_and_values_equal_the_oracle(xp, data, layout):
    w, fmt = draw_case(data, xp, fitted=True)
    expected_bytes, expected = oracle.quantize(w, fmt)
    q = quantize(lay_out(on(xp, w), layout), fmt)
    assert stored(q) == expected_bytes
    assert q.shape == w.shape
    dense = restored(q)
    assert (dense.dtype, dense.shape) == (np.float32, w.shape)
    np.testing.assert_array_equal(dense, expected)


@given(data=st.data())
@settings(max_examples=25)
def test_float64_input_equals_the_oracle(xp, data):
    w, fmt = draw_case(data, xp, np.float64)
    assert stored(quantize(on(xp, w), fmt)) == oracle.quantize(w, fmt)[0]


@given(data=st.data())
@settings(max_examples=25)
def test_narrow_input_is_widened_first(xp, data):
    # In a library without narrow floats, float32 is the narrowest dtype.
    narrowest = oracle.STORAGE[data.draw(st.sampled_from(scale_dtypes(xp)))]
    fmt = data.draw(formats(scale_dtypes(xp)))
    w = (data.draw(weights(largest=3e4)) + np.float32(0)).astype(narrowest)
    assert stored(quantize(on(xp, w), fmt)) == oracle.quantize(w.astype(np.float32), fmt)[0]


@pytest.mark.parametrize("codebook", ALL_CODEBOOKS, ids=lambda codebook: codebook.name)
def test_every_codebook_equals_the_oracle(xp, codebook):
    fmt = BlockFormat(codebook, 32)
    w = normal(9, 11)
    expected_bytes, expected = oracle.quantize(w, fmt)
    q = quantized(xp, w, fmt)
    assert stored(q) == expected_bytes
    assert restored(q).tobytes() == expected.tobytes()


@pytest.mark.sampled(42)
@pytest.mark.parametrize("text", UNROTATED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_kind_of_format_equals_the_oracle(xp, text, dtype):
    fmt = BlockFormat.parse(text)
    w = normal(7, 11, dtype=dtype) * np.geomspace(1e-3, 1e3, 11).astype(dtype)
    expected_bytes, expected = oracle.quantize(w, fmt)
    q = quantized(xp, w, fmt)
    assert stored(q) == expected_bytes
    assert restored(q).tobytes() == expected.tobytes()


@pytest.mark.parametrize("normalization", ["absmax", "signed"])
@pytest.mark.parametrize("factor", [6.0, 0.75, 1 / 3])
def test_levels_that_do_not_end_at_one_equal_the_oracle(xp, normalization, factor):
    codebook = Codebook(np.array([-0.9, -0.4, 0.1, 0.5, 1.0]) * factor, normalization=normalization)
    for fmt in (BlockFormat(codebook, 8), BlockFormat(codebook, 8, levels="matrix")):
        w = normal(5, 13)
        expected_bytes, expected = oracle.quantize(w, fmt)
        q = quantized(xp, w, fmt)
        assert stored(q) == expected_bytes
        assert restored(q).tobytes() == expected.tobytes()


@given(data=st.data(), codebook=st.sampled_from([book for book in ALL_CODEBOOKS if book.normalization == "absmax"]))
@settings(max_examples=25)
def test_ties_go_to_the_lower_level(xp, data, codebook):
    w = data.draw(ties(codebook))
    fmt = BlockFormat(codebook, len(w))
    q = quantize(on(xp, w), fmt)
    assert stored(q) == oracle.quantize(w, fmt)[0]
    apart = codebook.boundaries < codebook.levels[1:]  # levels that are neighbors have no number between them
    assert set(np.arange(len(codebook) - 1)[apart]) <= set(host(q.codes)[1:].tolist())


@given(
    w=weights(shape=st.tuples(st.integers(1, 200)), largest=6e4),
    block_size=st.integers(1, 9),
    bits=st.integers(1, 8),
    second=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_double_quantization_is_that_of_lq_lora(w, block_size, bits, second, dtype):
    fmt = BlockFormat(NF4, block_size, ScaleFormat(bits, second, dtype))
    statistics = np.array([oracle.absmax(block) for block in oracle.blocks_of(w, block_size)], dtype=np.float32)
    codes, second_scales, decoded = oracle.lq_lora_scales(statistics, bits, second, dtype)
    q = quantize(w, fmt)
    assert q.scales.scales.astype(np.float32).tolist() == second_scales.tolist()
    assert q.scales.offset.tolist() == [statistics.min()]
    # Scales whose nearest code decodes to zero get the next code, or all weights of their blocks would be lost.
    kept = (decoded > 0) | (statistics == 0)
    assert q.scales.codes[kept].tolist() == np.array(codes)[kept].tolist()
    found = dequantize(q.scales)
    assert found[kept].tolist() == decoded[kept].tolist()
    assert q.codes.tolist() == oracle.codes_of(w, found, fmt)


@pytest.mark.parametrize("text", UNROTATED)
def test_bits_and_arrays_do_not_depend_on_the_library(xp, text):
    w, fmt = normal(37, 53), BlockFormat.parse(text)
    mine, numpys = quantize(on(xp, w), fmt), quantize(w, fmt)
    assert stored(mine) == stored(numpys)
    assert restored(mine).tobytes() == dequantize(numpys).tobytes()


@pytest.mark.sampled(28)
@pytest.mark.parametrize("text", UNROTATED)
@pytest.mark.parametrize("fit", ["absmax", "scale"])
def test_quantizing_for_a_second_time_changes_nothing_on_any_path(fast_xp, text, fit):
    fmt = BlockFormat.parse(text)
    w = on(fast_xp, normal(40, 53))
    fast = quantize(w, fmt, fit=fit)
    with lq.forced("reference"):
        slow = quantize(w, fmt, fit=fit)
        dense = restored(slow)
    assert stored(fast) == stored(slow)
    assert restored(fast).tobytes() == dense.tobytes()


@pytest.mark.slow_on_strict
@given(data=st.data(), fit=st.sampled_from(["absmax", "scale", "levels+scale"]))
@settings(max_examples=15)
def test_bytes_of_a_fit_are_those_of_numpy_and_of_the_reference(xp, data, fit):
    fitted = fit == "levels+scale"
    small = [book for book in ALL_CODEBOOKS if book.normalization != "affine" and book.bits <= 3]
    w, fmt = draw_case(data, xp, fitted=fitted, codebooks=small if fitted else ALL_CODEBOOKS)
    importance = None
    if fit != "absmax" and data.draw(st.booleans()):
        importance = np.random.default_rng(data.draw(st.integers(0, 9))).exponential(size=w.shape).astype(np.float32)
    q = quantized(xp, w, fmt, fit=fit, weights=importance)
    assert stored(q) == stored(quantize(w, fmt, fit=fit, weights=importance))
    with lq.forced("reference"):
        assert stored(q) == stored(quantized(xp, w, fmt, fit=fit, weights=importance))
