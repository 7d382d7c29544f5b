"""Bad input raises an error that names the array and says the value."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora import NF4, BlockFormat, QuantizedArray, ScaleFormat, affine, dequantize, matmul, quantize
from lqlora.errors import FormatError, InvalidArgumentError, NonFiniteError, UnsupportedArrayError
from tests.quantized.cases import ramp
from tests.strategies import on, stored

ALL_FITS = pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("text", ["nf4/64", "nf4/2@0:u8/2:float32", "affine4/2", "bof4s-64/2", "nf4/1"])
def test_weights_that_are_not_finite_are_named_counted_and_located(fast_xp, bad, dtype, text):
    w = np.zeros((3, 5), dtype=dtype)
    w[1, 2] = w[2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"q_proj has 2 non-finite value\(s\), the first at index \(1, 2\)"):
        quantize(on(fast_xp, w), BlockFormat.parse(text), name="q_proj")


@ALL_FITS
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf]])
def test_no_fit_takes_weights_that_are_not_finite(xp, fit, bad):
    w = np.ones((4, 8), dtype=np.float32)
    w[2, : len(bad)] = bad
    with pytest.raises(
        NonFiniteError, match=rf"q_proj has {len(bad)} non-finite value\(s\), the first at index \(2, 0\)"
    ):
        quantize(on(xp, w), BlockFormat(NF4, 8), fit=fit, name="q_proj")


def test_a_nan_scalar_is_refused(xp):
    with pytest.raises(NonFiniteError, match=r"1 non-finite value\(s\), the first at index \(\)"):
        quantize(on(xp, np.array(np.nan, dtype=np.float32)), BlockFormat(NF4))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.bool_, np.complex64])
def test_other_dtypes_are_refused(xp, dtype):
    with pytest.raises(UnsupportedArrayError, match=rf"k_proj must be .* got {np.dtype(dtype).name}"):
        quantize(on(xp, np.ones(3, dtype=dtype)), BlockFormat(NF4), name="k_proj")


@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, None, "weights", (1.0,), {"w": 1.0}])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(UnsupportedArrayError, match=r"^w must"):
        quantize(value, BlockFormat(NF4))


@pytest.mark.parametrize("fmt", ["nf4/64:float32", None, NF4, 4])
def test_what_is_no_format_is_refused(fmt):
    with pytest.raises(InvalidArgumentError, match="fmt must be a BlockFormat"):
        quantize(np.ones(4), fmt)


@ALL_FITS
@pytest.mark.parametrize("largest", [65520.0, 1e30])
@pytest.mark.parametrize(
    "text", ["nf4/2:float16", "nf4/2:u8/2:float16", "nf4/2:u8+none/2:float16", "nf4/2:l8/2:float16"]
)
def test_a_scale_beyond_its_storage_is_refused(text, largest, fit):
    w = np.array([1.0, 1.0, -largest, 2.0], dtype=np.float32)
    w = np.where(np.abs(w) == largest, -2 * largest, w)  # the offset of 1 must not bring it back into range
    with pytest.raises(NonFiniteError, match=r"scales of v_proj .* float16"):
        quantize(w, BlockFormat.parse(text), name="v_proj", fit=fit)


@pytest.mark.parametrize(
    "text", ["nf4/2:float32", "nf4/2:u8/2:float32", "nf4/2:u8+none/2:float32", "bof4s-64/2", "affine4/2"]
)
@pytest.mark.parametrize("w", [[1.0, 1e300], [1e300, 1.0, 1e300], [1.0, 1.0, 1e300]], ids=str)
def test_float64_weights_beyond_float32_are_refused(xp, text, w):
    with pytest.raises(NonFiniteError, match=r"scales of v_proj .* float32"):
        quantize(on(xp, np.array(w)), BlockFormat.parse(text), name="v_proj")


def test_a_scale_that_overflows_when_it_is_decoded_is_refused():
    # bfloat16 rounds 3.37e38 up. With the offset added the scale is beyond float32, and its block would be NaN.
    w = np.array([1.5e36, 3.4028235e38], dtype=np.float32)
    fmt = BlockFormat(NF4, 1, ScaleFormat(8, 4, "bfloat16"))
    with pytest.raises(NonFiniteError, match="v_proj"):
        quantize(w, fmt, name="v_proj")


def test_a_range_beyond_float32_is_refused(xp):
    w = on(xp, np.array([-3e38, 3e38], dtype=np.float32))
    with pytest.raises(NonFiniteError, match=r"scales of v_proj .* float32"):
        quantize(w, BlockFormat(affine(4), 2), name="v_proj")


@pytest.mark.parametrize("text", ["nf4/4:bfloat16", "nf4/4:u8/4:float16"])
def test_a_library_without_narrow_floats_says_so(text, strict):
    with pytest.raises(UnsupportedArrayError, match=r"dtype b?float16.*array_api_strict"):
        quantize(strict.ones(8), BlockFormat.parse(text))


@pytest.mark.parametrize("text", ["nf4/8", "affine4/8", "bof4s-64/8", "nf4/8@0:u8/4:float32"])
def test_the_check_of_finiteness_can_be_left_out(xp, text):
    w, fmt = on(xp, ramp(4, 4)), BlockFormat.parse(text)
    assert stored(quantize(w, fmt, check_finite=False)) == stored(quantize(w, fmt))


def test_torch_parameters_are_quantized_without_a_graph(torch):
    w = torch.nn.Parameter(torch.from_numpy(ramp(6, 7)))
    fmt = BlockFormat.parse("nf4/16:u8/4:float32")
    q = quantize(w, fmt)
    assert stored(q) == stored(quantize(ramp(6, 7), fmt))
    assert not any(array.requires_grad for array in q.to_arrays().values())


@pytest.mark.parametrize("text", ["nf4/4:float32", "nf4/2:u8/2:float32", "affine4/4:float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_without_the_check_a_scale_that_is_not_finite_is_refused_all_the_same(xp, text, bad):
    w = np.array([1.0, 2.0, bad, 0.0], dtype=np.float32)
    with pytest.raises(NonFiniteError, match="scales of q_proj"):
        quantize(on(xp, w), BlockFormat.parse(text), check_finite=False, name="q_proj")


def test_what_is_not_quantized_is_refused(xp):
    w = on(xp, np.ones((2, 4), dtype=np.float32))
    for call in (lambda: dequantize(w), lambda: matmul(w, w)):
        with pytest.raises(InvalidArgumentError, match=r"^q must be "):
            call()


@pytest.mark.parametrize(("sides", "dtype"), [((3, 2), "float32"), ((2, 2), "float64")])
def test_factors_that_do_not_fit_a_product_are_refused(xp, sides, dtype):
    x, q = on(xp, np.ones((1, 4), dtype=np.float32)), quantize(on(xp, np.ones((2, 4), np.float32)), BlockFormat(NF4, 4))
    lora_A, lora_B = on(xp, np.ones((2, 4), dtype)), on(xp, np.ones(sides, dtype))
    with pytest.raises((InvalidArgumentError, UnsupportedArrayError), match=r"^lora_[AB] "):
        matmul(x, q, lora_A=lora_A, lora_B=lora_B)


@pytest.mark.parametrize(
    ("change", "name"), [({"fmt": "nf4/4"}, "fmt"), ({"arrays": []}, "arrays"), ({"shape": 8}, "shape")]
)
def test_arguments_of_another_kind_are_named(change, name):
    q = quantize(np.ones((2, 4), dtype=np.float32), BlockFormat(NF4, 4))
    with pytest.raises(FormatError, match=f"^{name} must be "):
        QuantizedArray.from_arrays(**{"arrays": q.to_arrays(), "fmt": q.format, "shape": q.shape} | change)
