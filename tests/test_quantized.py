from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import NF4, BlockFormat, Codebook, QuantizedArray, ScaleFormat, dequantize, quantize
from lqlora.errors import FormatError, InvalidArgumentError, MixedArraysError, NonFiniteError, UnsupportedArrayError
from lqlora.testing.strategies import ALL_CODEBOOKS, LAYOUTS, formats, largest_for, lay_out, shapes, ties, weights
from tests.oracles import quantize as oracle
from tests.strategies import host, on, scale_dtypes, stored

DOUBLE = "nf4/16:u8/4:float32"


def draw_case(data, xp, dtype=np.float32):
    fmt = data.draw(formats(scale_dtypes(xp)))
    return data.draw(weights(dtype, largest_for(fmt))), fmt


def ramp(*shape):
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def levels_of(q):
    """All levels of scales, outermost first."""
    while isinstance(q.scales, QuantizedArray):
        yield q
        q = q.scales
    yield q


# --- the same bytes as the oracle, on every library


@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_bytes_and_values_equal_the_oracle(xp, data, layout):
    w, fmt = draw_case(data, xp)
    expected_bytes, expected = oracle.quantize(w, fmt)
    q = quantize(lay_out(on(xp, w), layout), fmt)
    assert stored(q) == expected_bytes
    assert q.shape == w.shape
    dense = host(dequantize(q))
    assert (dense.dtype, dense.shape) == (np.float32, w.shape)
    np.testing.assert_array_equal(dense.reshape(-1), expected)


@given(data=st.data())
def test_float64_input_equals_the_oracle(xp, data):
    w, fmt = draw_case(data, xp, np.float64)
    assert stored(quantize(on(xp, w), fmt)) == oracle.quantize(w, fmt)[0]


@given(data=st.data())
def test_narrow_input_is_widened_first(xp, data):
    # Where a library has no narrow floats, float32 is narrowest.
    narrowest = oracle.STORAGE[data.draw(st.sampled_from(scale_dtypes(xp)))]
    fmt = data.draw(formats(scale_dtypes(xp)))
    w = data.draw(weights(largest=6e4)).astype(narrowest)
    assert stored(quantize(on(xp, w), fmt)) == oracle.quantize(w.astype(np.float32), fmt)[0]


@given(data=st.data(), codebook=st.sampled_from(ALL_CODEBOOKS))
def test_ties_go_to_the_lower_level(xp, data, codebook):
    w = data.draw(ties(codebook))
    fmt = BlockFormat(codebook, len(w))
    q = quantize(on(xp, w), fmt)
    assert stored(q) == oracle.quantize(w, fmt)[0]
    assert sorted(host(q.codes)[1:].tolist()) == list(range(len(codebook) - 1))


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
    assert q.scales.codes.tolist() == codes
    assert q.scales.scales.astype(np.float32).tolist() == second_scales.tolist()
    assert q.scales.offset.tolist() == [statistics.min()]
    assert dequantize(q.scales).tolist() == decoded.tolist()
    assert q.codes.tolist() == oracle.codes_of(w, decoded, fmt)


def test_bits_and_arrays_do_not_depend_on_the_library(xp):
    w = np.random.default_rng(0).standard_normal((37, 53)).astype(np.float32)
    for text in ("nf3/64:float32", DOUBLE, "nf8/5:u4+none/7:u3/3:float32", "int5/1:float32", "uint1/53:float32"):
        fmt = BlockFormat.parse(text)
        mine, numpys = quantize(on(xp, w), fmt), quantize(w, fmt)
        assert stored(mine) == stored(numpys)
        assert host(dequantize(mine)).tobytes() == dequantize(numpys).tobytes()


# --- blocks, tails, layout


@given(data=st.data())
def test_the_tail_is_a_block_of_its_own(xp, data):
    fmt = BlockFormat(data.draw(st.sampled_from(ALL_CODEBOOKS)), data.draw(st.integers(1, 70)))
    w = data.draw(weights(shape=st.tuples(st.integers(1, 150))))
    start = (len(w) - 1) // fmt.block_size * fmt.block_size
    whole, tail = quantize(on(xp, w), fmt), quantize(on(xp, w[start:]), fmt)
    assert host(whole.codes)[start:].tolist() == host(tail.codes).tolist()
    assert host(whole.scales)[-1:].tolist() == host(tail.scales).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 35), (3, 5, 14), (210,)])
def test_the_result_depends_on_logical_order_only(xp, layout, shape):
    w, fmt = ramp(*shape), BlockFormat.parse(DOUBLE)
    assert stored(quantize(lay_out(on(xp, w), layout), fmt)) == stored(quantize(on(xp, w), fmt))


def test_a_broadcast_view_is_an_array_like_any_other(xp):
    view = xp.broadcast_to(on(xp, ramp(5)), (3, 5))
    assert stored(quantize(view, BlockFormat(NF4, 4))) == stored(
        quantize(np.tile(ramp(5), (3, 1)), BlockFormat(NF4, 4))
    )


@pytest.mark.parametrize("text", ["nf4/64:float32", DOUBLE, "nf8/64:float32"])
def test_a_block_far_longer_than_the_array(xp, text):
    # As one scale for a whole tensor is spelled when its size is not known; padding would take four petabytes.
    w = on(xp, ramp(5, 5))
    fmt = BlockFormat.parse(text.replace("/64", f"/{10**15}").replace("/16", f"/{10**15}"))
    assert host(quantize(w, fmt).codes).tolist() == host(quantize(w, BlockFormat(fmt.codebook, 25)).codes).tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
@pytest.mark.parametrize("text", ["nf4/64:float32", "nf3/7:float32", DOUBLE, "nf8/2:u4+none/3:u3/3:float32"])
def test_empty_arrays_stay_empty(xp, shape, text):
    fmt = BlockFormat.parse(text)
    q = quantize(on(xp, np.zeros(shape, dtype=np.float32)), fmt)
    assert tuple(dequantize(q).shape) == tuple(q.codes.shape) == shape
    assert 8 * q.nbytes == fmt.storage_bits(shape)


def test_a_single_weight_comes_back(xp):
    q = quantize(on(xp, np.array(-3.7, dtype=np.float32)), BlockFormat(NF4))
    assert host(dequantize(q)).tolist() == np.float32(-3.7)


def test_the_input_is_not_changed(xp):
    w = on(xp, ramp(5, 7))
    quantize(w, BlockFormat.parse(DOUBLE))
    assert host(w).tobytes() == ramp(5, 7).tobytes()


# --- numerical promises


@given(data=st.data())
def test_a_zero_block_has_scale_zero_and_comes_back_zero(xp, data):
    fmt = data.draw(formats(scale_dtypes(xp)))
    w = data.draw(weights(largest=largest_for(fmt), shape=st.tuples(st.integers(1, 3)))).repeat(fmt.block_size)
    w[: fmt.block_size] = 0.0
    q = quantize(on(xp, w), fmt)
    scales = dequantize(q.scales) if isinstance(q.scales, QuantizedArray) else q.scales
    assert float(host(scales)[0]) == 0.0
    assert not host(dequantize(q))[: fmt.block_size].any()


@given(data=st.data())
def test_decoded_scales_are_never_negative(xp, data):
    w, fmt = draw_case(data, xp)
    for level in levels_of(quantize(on(xp, w), fmt)):
        scales = dequantize(level.scales) if isinstance(level.scales, QuantizedArray) else level.scales
        assert (host(scales).astype(np.float32) >= 0).all()


@given(
    codebook=st.sampled_from(ALL_CODEBOOKS),
    block_size=st.integers(1, 20),
    scales=st.sampled_from(
        ["float32", ScaleFormat(8, 4), ScaleFormat(3, 5, "float32", "none"), ScaleFormat(8, 4, ScaleFormat(6, 2))]
    ),
    seed=st.integers(0, 999),
    exponent=st.integers(-80, 80),
)
def test_a_power_of_two_changes_the_scales_only(xp, codebook, block_size, scales, seed, exponent):
    # Weights that stay far from both ends of the normal range, whatever the exponent, and so do the scales of scales.
    fmt = BlockFormat(codebook, block_size, scales)
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(60) * rng.choice([0, 0.01, 1], 60)).astype(np.float32)
    factor = np.float32(2.0**exponent)
    once, scaled = quantize(on(xp, w), fmt), quantize(on(xp, w * factor), fmt)
    assert host(scaled.codes).tolist() == host(once.codes).tolist()
    assert host(dequantize(scaled)).tobytes() == (host(dequantize(once)) * factor).tobytes()
    arrays, scaled_arrays = once.to_arrays(), scaled.to_arrays()
    for name, array in arrays.items():
        grown = host(array) if name.endswith("codes") else host(array) * factor
        assert host(scaled_arrays[name]).tobytes() == grown.tobytes()


@given(w=weights(largest=1e37), codebook=st.sampled_from(ALL_CODEBOOKS[:14]), block_size=st.integers(1, 70))
def test_the_error_is_at_most_half_the_widest_gap(xp, w, codebook, block_size):
    q = quantize(on(xp, w), BlockFormat(codebook, block_size))
    errors = np.abs(host(dequantize(q)).astype(np.float64) - w).reshape(-1)
    gap = np.diff(codebook.levels.astype(np.float64)).max()
    scales = host(q.scales).astype(np.float64).repeat(block_size)[: w.size]
    # Division, midpoint and product are each rounded to float32; the last may be subnormal.
    assert (errors <= (gap / 2 + 2e-7) * scales + 1e-45).all()


def test_the_largest_weight_of_a_block_is_exact(xp):
    w = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    dense = host(dequantize(quantize(on(xp, w), BlockFormat(lq.uniform(4)))))
    peaks = np.abs(w).argmax(axis=1)
    assert dense[range(10), peaks].tolist() == w[range(10), peaks].tolist()


def test_nf4_has_the_known_error_on_normal_weights():
    # bitsandbytes' own tests expect a mean absolute error of 0.072798 ± 0.000074 per matrix for blocks of 64.
    w = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    error = np.abs(dequantize(quantize(w, BlockFormat(NF4, 64))) - w).mean()
    assert error == pytest.approx(0.072798, abs=7 * 0.000074)


@given(data=st.data())
def test_storage_is_what_was_counted(xp, data):
    w, fmt = draw_case(data, xp)
    q = quantize(on(xp, w), fmt)
    assert fmt.storage_bits(w.shape) == 8 * q.nbytes == 8 * sum(len(content) for content in stored(q).values())


@pytest.mark.parametrize(
    "scales", ["float32", *[ScaleFormat(8, 4, "float32", offset) for offset in ("min", "none")]], ids=str
)
def test_huge_weights_come_back_finite(xp, scales):
    w = np.array([3.4e38, -3.4028235e38, 1.0, 0.0, 1e37, 2e37], dtype=np.float32)
    dense = host(dequantize(quantize(on(xp, w), BlockFormat(NF4, 2, scales))))
    np.testing.assert_allclose(dense, w, rtol=0.05, atol=1e36)


# --- bad input


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_that_are_not_finite_are_named_counted_and_located(xp, bad, dtype):
    w = np.zeros((3, 5), dtype=dtype)
    w[1, 2] = w[2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"q_proj has 2 non-finite value\(s\), the first at index \(1, 2\)"):
        quantize(on(xp, w), BlockFormat(NF4), name="q_proj")


def test_a_nan_scalar_is_refused(xp):
    with pytest.raises(NonFiniteError, match=r"1 non-finite value\(s\), the first at index \(\)"):
        quantize(on(xp, np.array(np.nan, dtype=np.float32)), BlockFormat(NF4))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64])
def test_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match=rf"k_proj must be .* not {np.dtype(dtype).name}"):
        quantize(on(xp, np.ones(3, dtype=dtype)), BlockFormat(NF4), name="k_proj")


@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, None, "weights"])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(UnsupportedArrayError, match="Expected a NumPy, torch, CuPy or array API array"):
        quantize(value, BlockFormat(NF4))


@pytest.mark.parametrize("largest", [65520.0, 1e30])
@pytest.mark.parametrize("text", ["nf4/2:float16", "nf4/2:u8/2:float16", "nf4/2:u8+none/2:float16"])
def test_a_scale_beyond_its_storage_is_refused(text, largest):
    w = np.array([1.0, 1.0, -largest, 2.0], dtype=np.float32)
    w = np.where(np.abs(w) == largest, -2 * largest, w)  # the offset of 1 must not bring it back into range
    with pytest.raises(NonFiniteError, match="A scale of v_proj is beyond the range of float16"):
        quantize(w, BlockFormat.parse(text), name="v_proj")


@pytest.mark.parametrize("text", ["nf4/2:float32", "nf4/2:u8/2:float32", "nf4/2:u8+none/2:float32"])
@pytest.mark.parametrize("w", [[1.0, 1e300], [1e300, 1.0, 1e300], [1.0, 1.0, 1e300]], ids=str)
def test_float64_weights_beyond_float32_are_refused(xp, text, w):
    with pytest.raises(NonFiniteError, match="A scale of v_proj is beyond the range of float32"):
        quantize(on(xp, np.array(w)), BlockFormat.parse(text), name="v_proj")


def test_a_scale_that_overflows_when_it_is_decoded_is_refused():
    # bfloat16 rounds 3.37e38 up; with the offset added back the sum is beyond float32, and its block would be NaN.
    w = np.array([1.5e36, 3.4028235e38], dtype=np.float32)
    fmt = BlockFormat(NF4, 1, ScaleFormat(8, 4, "bfloat16"))
    with pytest.raises(NonFiniteError, match="v_proj"):
        quantize(w, fmt, name="v_proj")


@pytest.mark.parametrize("text", ["nf4/4:float16", "nf4/4:bfloat16", "nf4/4:u8/4:float16"])
def test_a_library_without_narrow_floats_says_so(text, strict):
    with pytest.raises(UnsupportedArrayError, match=r"array_api_strict has no b?float16"):
        quantize(strict.ones(8), BlockFormat.parse(text))


def test_the_check_of_finiteness_can_be_left_out(xp):
    w = on(xp, ramp(4, 4))
    assert stored(quantize(w, BlockFormat(NF4), check_finite=False)) == stored(quantize(w, BlockFormat(NF4)))


# --- dequantize


def test_dequantize_writes_into_an_array(xp):
    q = quantize(on(xp, ramp(6, 7)), BlockFormat(NF4, 5))
    out = on(xp, np.full((6, 7), 9.0, dtype=np.float32))
    assert dequantize(q, out=out) is out
    assert host(out).tobytes() == host(dequantize(q)).tobytes()


def test_dequantize_writes_into_float64(xp):
    q = quantize(on(xp, ramp(6, 7)), BlockFormat(NF4, 5))
    out = on(xp, np.zeros((6, 7)))
    np.testing.assert_array_equal(host(dequantize(q, out=out)), host(dequantize(q)))


def test_dequantize_refuses_an_array_of_another_shape(xp):
    q = quantize(on(xp, ramp(6, 7)), BlockFormat(NF4))
    with pytest.raises(InvalidArgumentError, match=r"out has shape \(7, 6\), the array has \(6, 7\)"):
        dequantize(q, out=on(xp, np.zeros((7, 6), dtype=np.float32)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dequantize_rounds_to_other_dtypes(xp, dtype):
    if dtype not in (*scale_dtypes(xp), "float64"):
        with pytest.raises(UnsupportedArrayError):
            dequantize(quantize(on(xp, ramp(6, 7)), BlockFormat(NF4)), dtype=dtype)
        return
    q = quantize(on(xp, ramp(6, 7)), BlockFormat(NF4))
    expected = host(dequantize(q)).astype(oracle.STORAGE.get(dtype, np.float64))
    assert host(dequantize(q, dtype=dtype)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["int8", "float8", "fp16"])
def test_dequantize_refuses_unknown_dtypes(xp, dtype):
    with pytest.raises((InvalidArgumentError, UnsupportedArrayError)):
        dequantize(quantize(on(xp, ramp(6, 7)), BlockFormat(NF4)), dtype=dtype)


# --- arrays of two libraries


def test_out_of_another_library_is_refused(torch):
    q = quantize(ramp(4, 4), BlockFormat(NF4))
    with pytest.raises(MixedArraysError):
        dequantize(q, out=torch.zeros(4, 4))
    with pytest.raises(MixedArraysError):
        dequantize(q.to(torch), out=np.zeros((4, 4), dtype=np.float32))


@pytest.mark.parametrize("text", ["nf4/4:float32", "nf5/4:float32", "nf4/4:u8/2:float32"])
@pytest.mark.parametrize("key", ["codes", "scales"])
def test_stored_arrays_of_two_libraries_are_refused(torch, text, key):
    q = quantize(ramp(4, 4), BlockFormat.parse(text))
    arrays = {name: torch.from_numpy(array) if name.startswith(key) else array for name, array in q.to_arrays().items()}
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        dequantize(QuantizedArray.from_arrays(arrays, q.format, q.shape))


def test_matmul_refuses_inputs_of_another_library(torch):
    q = quantize(ramp(4, 4), BlockFormat(NF4))
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        lq.matmul(torch.ones(2, 4), q)


# --- matmul


@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_matmul_is_that_of_the_dense_matrix(xp, scaling):
    rng = np.random.default_rng(0)
    x, lora_A, lora_B = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 8), (4, 8), (5, 4)))
    q = quantize(on(xp, ramp(5, 8)), BlockFormat(NF4, 8))
    dense = host(dequantize(q)) + scaling * lora_B @ lora_A
    y = lq.matmul(on(xp, x), q, on(xp, lora_A), on(xp, lora_B), scaling)
    np.testing.assert_allclose(host(y), x @ dense.T, rtol=1e-4, atol=1e-5)


def test_matmul_needs_both_factors_or_neither(xp):
    q = quantize(on(xp, ramp(4, 4)), BlockFormat(NF4))
    x = on(xp, ramp(1, 4))
    with pytest.raises(InvalidArgumentError, match="both lora_A and lora_B"):
        lq.matmul(x, q, lora_A=x)
    with pytest.raises(InvalidArgumentError, match="both lora_A and lora_B"):
        lq.matmul(x, q, lora_B=x)


# --- stored arrays


@given(data=st.data())
def test_stored_arrays_are_read_back(xp, data):
    w, fmt = draw_case(data, xp)
    q = quantize(on(xp, w), fmt)
    again = QuantizedArray.from_arrays(q.to_arrays(), fmt, w.shape)
    assert stored(again) == stored(q)
    np.testing.assert_array_equal(host(dequantize(again)), host(dequantize(q)))


@given(data=st.data())
def test_moving_to_numpy_and_back_keeps_every_byte(xp, data):
    w, fmt = draw_case(data, xp)
    q = quantize(on(xp, w), fmt)
    there = q.to(np)
    assert {type(array) for array in there.to_arrays().values()} == {np.ndarray}
    assert stored(there) == stored(there.to(xp)) == stored(q)


@pytest.fixture
def nested():
    q = quantize(ramp(5, 9), BlockFormat.parse("nf3/4:u8/3:float16"))
    return q.to_arrays(), q.format, q.shape


@pytest.mark.parametrize("name", ["codes", "scales.codes", "scales.scales", "scales.offset"])
def test_a_missing_array_is_refused(nested, name):
    arrays, fmt, shape = nested
    del arrays[name]
    with pytest.raises(FormatError, match=f"{name.split('.')[-1]}' is missing"):
        QuantizedArray.from_arrays(arrays, fmt, shape)


@pytest.mark.parametrize("name", ["offset", "scales", "scales.scales.codes", "extra"])
def test_an_array_left_over_is_refused(nested, name):
    arrays, fmt, shape = nested
    with pytest.raises(FormatError, match="has no array named"):
        QuantizedArray.from_arrays(arrays | {name: np.zeros(1, dtype=np.float32)}, fmt, shape)


@pytest.mark.parametrize("name", ["codes", "scales.codes", "scales.scales", "scales.offset"])
@pytest.mark.parametrize(
    "change", [lambda a: a[:-1], lambda a: np.append(a, a[:1]), lambda a: a[:, None]], ids=["short", "long", "2-d"]
)
def test_an_array_of_the_wrong_length_is_refused(nested, name, change):
    arrays, fmt, shape = nested
    arrays[name] = change(arrays[name])
    with pytest.raises(FormatError, match=r"should be .* of shape"):
        QuantizedArray.from_arrays(arrays, fmt, shape)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("codes", "int8"), ("scales.codes", "float32"), ("scales.scales", "float32"), ("scales.offset", "float64")],
)
def test_an_array_of_the_wrong_dtype_is_refused(nested, name, dtype):
    arrays, fmt, shape = nested
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(FormatError, match=f"not {dtype} of shape"):
        QuantizedArray.from_arrays(arrays, fmt, shape)


@pytest.mark.parametrize("value", [[0, 1], None, "codes"])
def test_what_is_no_array_is_refused_by_name(nested, value):
    arrays, fmt, shape = nested
    with pytest.raises(UnsupportedArrayError, match="'codes' is not an array"):
        QuantizedArray.from_arrays(arrays | {"codes": value}, fmt, shape)


@pytest.mark.parametrize("shape", [(-5, -9), (-1, 45), (5, 10), (9,)])
def test_a_shape_that_does_not_fit_is_refused(nested, shape):
    arrays, fmt, _ = nested
    with pytest.raises(InvalidArgumentError):
        QuantizedArray.from_arrays(arrays, fmt, shape)


@pytest.mark.parametrize(
    "fmt", [BlockFormat(Codebook([-1, 0, 1]), 4), BlockFormat(lq.uniform(4), 4)], ids=["ternary", "int4"]
)
def test_codes_beyond_the_codebook_are_refused(xp, fmt):
    arrays = quantize(on(xp, ramp(4, 4)), fmt).to_arrays()
    codes = np.full(arrays["codes"].shape, 255, dtype=np.uint8)
    with pytest.raises(FormatError, match=f"A code is beyond the {len(fmt.codebook)} levels of {fmt.codebook.name}"):
        QuantizedArray.from_arrays(arrays | {"codes": on(xp, codes)}, fmt, (4, 4))


def test_refused_arrays_are_left_alone(nested):
    arrays, fmt, shape = nested
    before = dict(arrays)
    with pytest.raises(FormatError):
        QuantizedArray.from_arrays(arrays | {"extra": np.zeros(1)}, fmt, shape)
    QuantizedArray.from_arrays(arrays, fmt, shape)
    assert arrays == before


@given(shape=shapes(), bits=st.sampled_from(ALL_CODEBOOKS))
def test_codes_have_the_dense_shape_and_lie_in_the_codebook(xp, shape, bits):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes = host(quantize(on(xp, w), BlockFormat(bits, 7)).codes)
    assert (codes.shape, codes.dtype) == (shape, np.uint8)
    assert codes.size == 0 or codes.max() < len(bits)


def test_the_codebook_of_an_array_is_that_of_its_format():
    assert quantize(ramp(4), BlockFormat(NF4)).codebook is NF4


def test_torch_parameters_are_quantized_without_a_graph(torch):
    w = torch.nn.Parameter(torch.from_numpy(ramp(6, 7)))
    q = quantize(w, BlockFormat.parse(DOUBLE))
    assert stored(q) == stored(quantize(ramp(6, 7), BlockFormat.parse(DOUBLE)))
    assert not any(array.requires_grad for array in q.to_arrays().values())


def test_levels_beyond_one_are_used_as_well_as_those_within():
    # The levels of FP4 are usually written from -6 to 6: the scale must map the largest weight to the largest level.
    levels = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    w = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    wide, unit = (dequantize(quantize(w, BlockFormat(Codebook(x)))) for x in (levels, levels / 6))
    np.testing.assert_allclose(np.linalg.norm(wide - w), np.linalg.norm(unit - w), rtol=1e-3)


def test_a_negative_offset_of_scales_is_refused():
    fmt = BlockFormat(NF4, 4, ScaleFormat(8, 4))
    arrays = quantize(np.ones(16), fmt).to_arrays()
    arrays["scales.offset"] = -arrays["scales.offset"]
    with pytest.raises(FormatError, match="negative"):
        QuantizedArray.from_arrays(arrays, fmt, (16,))


@pytest.mark.parametrize("fmt", ["nf4/64:float32", None, NF4])
def test_what_is_no_format_is_refused(fmt):
    with pytest.raises(InvalidArgumentError, match="A format is a BlockFormat"):
        quantize(np.ones(4), fmt)


@pytest.mark.parametrize("shape", [(3,), (2, 4), ()])
def test_rows_that_do_not_fit_a_weight_are_refused(shape):
    q = quantize(np.ones((2, 5)), BlockFormat(NF4))
    with pytest.raises(InvalidArgumentError, match="do not fit"):
        lq.matmul(np.ones(shape, dtype=np.float32), q)
