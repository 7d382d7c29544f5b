"""Stored arrays: round trips, moves to other libraries, and errors for every way to corrupt them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook, QuantizedArray, dequantize, quantize, uniform
from lqlora.errors import FormatError, InvalidArgumentError, LQLoRAError, MixedArraysError, UnsupportedArrayError
from tests.quantized.cases import KINDS, draw_case, normal, quantized, ramp, restored, scales_of
from tests.strategies import host, on, stored

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")

NESTED = ("codes", "scales.codes", "scales.scales", "scales.offset")
#: Formats that together have every kind of stored array.
RICH = ("nf3/4:u8/3:float16", "affine3/4@0:d8/3:l8/2:float32", "bof2s-64+fit2/3@-1:i8/2:float32", "int3+fit/4:bfloat16")


@pytest.mark.slow_on_strict
@quiet
@given(data=st.data())
def test_stored_arrays_are_read_back(xp, data):
    w, fmt = draw_case(data, xp, fitted=True)
    q = quantize(on(xp, w), fmt)
    again = QuantizedArray.from_arrays(q.to_arrays(), fmt, w.shape)
    assert stored(again) == stored(q)
    assert all(own is other for own, other in zip(again.to_arrays().values(), q.to_arrays().values(), strict=True))
    np.testing.assert_array_equal(restored(again), restored(q))


@quiet
@given(data=st.data())
def test_moving_to_numpy_and_back_keeps_every_byte(xp, data):
    w, fmt = draw_case(data, xp, fitted=True)
    q = quantize(on(xp, w), fmt)
    there = q.to(np)
    assert {type(array) for array in there.to_arrays().values()} == {np.ndarray}
    assert stored(there) == stored(there.to(xp)) == stored(q)


@pytest.mark.parametrize("text", RICH)
@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_arrays_of_a_fit_are_read_back(text, fit, batch_dims):
    fmt = BlockFormat.parse(text)
    if fit == "levels+scale" and fmt.codebook.normalization == "affine":
        return
    w = normal(2, 5, 9) if batch_dims else normal(5, 9)
    q = quantize(w, fmt, fit=fit, batch_dims=batch_dims)
    again = QuantizedArray.from_arrays(q.to_arrays(), q.format, q.shape, batch_dims)
    assert stored(again) == stored(q)
    assert restored(again).tobytes() == restored(q).tobytes()


@pytest.mark.parametrize("text", KINDS)
def test_names_of_stored_arrays_say_their_depth(text):
    q = quantize(normal(5, 9), BlockFormat.parse(text))
    expected = {"codes"}
    expected |= {"levels"} if "+fit" in text else set()
    expected |= {"zero_points"} if text.startswith("affine") else set()
    prefix = ""
    for scales in text.split(":")[1:]:
        if scales == "float32":
            expected.add(f"{prefix}scales")
            break
        prefix += "scales."
        expected.add(f"{prefix}codes")
        expected |= {f"{prefix}offset"} if "+none" not in scales and (scales[0] in "ud" or "+" in scales) else set()
    assert set(q.to_arrays()) == expected


# --- every single corruption


@pytest.fixture(params=RICH)
def rich(request):
    q = quantize(normal(5, 9), BlockFormat.parse(request.param))
    return q.to_arrays(), q.format, q.shape


def refuse(rich, changed):
    arrays, fmt, shape = rich
    before = dict(arrays)
    with pytest.raises(LQLoRAError) as caught:
        QuantizedArray.from_arrays(changed, fmt, shape)
    assert arrays == before
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_any_missing_array_is_refused(rich):
    for name in rich[0]:
        message = refuse(rich, {key: array for key, array in rich[0].items() if key != name})
        assert f"{name!r}, which is missing" in message


def test_any_array_left_over_is_refused(rich):
    known = {name.rpartition(".")[2] for name in rich[0]}
    for name in (
        "extra",
        "scales.extra",
        "offset",
        "scales.levels",
        "scales.zero_points",
        *(f"x.{key}" for key in known),
    ):
        assert f"got also {name}." in refuse(rich, rich[0] | {name: np.zeros(1, dtype=np.float32)})


def test_any_array_of_the_wrong_length_is_refused(rich):
    changes = (
        lambda a: a[:-1],
        lambda a: np.concatenate([a, a[:1]]),
        lambda a: a[..., None],
        lambda a: a[None],
        lambda a: a[:0],
    )
    for name, array in rich[0].items():
        for change in changes:
            assert "of shape" in refuse(rich, rich[0] | {name: change(array)})


def test_any_array_of_the_wrong_dtype_is_refused(rich):
    for name, array in rich[0].items():
        for dtype in ("int8", "uint16", "float16", "float32", "float64"):
            if dtype != array.dtype.name:
                assert f"got {dtype} of shape" in refuse(rich, rich[0] | {name: array.astype(dtype)})


def test_anything_that_is_no_array_is_refused_by_name(rich):
    for name in rich[0]:
        for value in ([0, 1], None, "codes", 1.0, object()):
            assert f"{name!r} must be an array" in refuse(rich, rich[0] | {name: value})


def test_any_array_of_another_library_is_refused(rich, torch):
    for name, array in rich[0].items():
        if array.dtype.name == "bfloat16":
            continue
        with pytest.raises(MixedArraysError, match="numpy and torch"):
            QuantizedArray.from_arrays(rich[0] | {name: torch.from_numpy(array.copy())}, *rich[1:])


def test_numbers_that_are_not_finite_are_accepted(rich):
    # Users read arrays of a run that diverged to inspect them.
    for name, array in rich[0].items():
        if array.dtype.name == "uint8":
            continue
        changed = array.copy()
        changed.reshape(-1)[-1] = np.nan
        QuantizedArray.from_arrays(rich[0] | {name: changed}, *rich[1:])


def test_any_negative_scale_is_refused_unless_it_may_have_a_sign(rich):
    arrays, fmt, shape = rich
    for name, array in arrays.items():
        if array.dtype.name == "uint8" or name == "levels":
            continue
        changed = array.copy()
        changed[-1] = -1
        if name == "scales.offset" and fmt.codebook.normalization == "signed":
            QuantizedArray.from_arrays(arrays | {name: changed}, fmt, shape)
        else:
            assert "negative" in refuse(rich, arrays | {name: changed})


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("nf4/4:u8/2:float32", {"scales.scales": 3e38, "scales.offset": 3e38}),
        ("nf4/4:d8+none/2:u8/2:float32", {"scales.scales.scales": 3e38, "scales.scales.offset": 3e38}),
        ("bof4s-64/4:i8/2:u8/2:float32", {"scales.scales.scales": 3e38, "scales.scales.offset": 3e38}),
    ],
)
def test_finite_arrays_that_decode_to_infinite_scales_are_refused(xp, text, changes, batch_dims):
    q = quantized(
        xp, -np.geomspace(1, 1000, 64).astype(np.float32).reshape(2, 32), BlockFormat.parse(text), batch_dims=batch_dims
    )
    arrays = q.to_arrays()
    for name, value in changes.items():
        arrays[name] = on(xp, np.full_like(host(arrays[name]), value))
        if name != list(changes)[-1]:  # one of the two is within range
            QuantizedArray.from_arrays(arrays, q.format, q.shape, batch_dims)
    with pytest.raises(FormatError, match=r"'scales' .* overflow when decoded"):
        QuantizedArray.from_arrays(arrays, q.format, q.shape, batch_dims)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_infinite_scales_that_are_stored_as_such_are_let_through(xp, value):
    q = quantized(xp, normal(5, 9), BlockFormat.parse("nf4/4:u8/2:float32"))
    changed = np.full_like(host(q.scales.scales), value)
    QuantizedArray.from_arrays(q.to_arrays() | {"scales.scales": on(xp, changed)}, q.format, q.shape)


@pytest.mark.parametrize("text", ["nf4/4:d8/4:float32", "nf4/4:i8+mean/4:float32"])
def test_blocks_of_zeros_may_have_scales_that_decode_to_less_than_zero(xp, text):
    # A scale of zero becomes minus the mean, which is rounded to a level below it.
    w = normal(40, 4) * (np.arange(40) % 3 > 0)[:, None].astype(np.float32)
    q = quantized(xp, w, BlockFormat.parse(text))
    assert (scales_of(q) < 0).any()
    again = QuantizedArray.from_arrays(q.to_arrays(), q.format, q.shape)
    assert not restored(again)[::3].any()


def test_levels_out_of_order_are_refused(rich):
    if rich[1].levels == "codebook":
        return
    changed = rich[0]["levels"].copy()
    changed[-1, -2:] = changed[-1, -2:][::-1]
    assert "ascending order" in refuse(rich, rich[0] | {"levels": changed})


@pytest.mark.parametrize("shape", [(-5, -9), (-1, 45), (5, 10), (9,), (6, 9), (), (5, 9, 2)])
def test_a_shape_that_does_not_fit_is_refused(rich, shape):
    with pytest.raises(FormatError):
        QuantizedArray.from_arrays(*rich[:2], shape)


@pytest.mark.parametrize("shape", [(-5, -9), (-1, 45), (5, 10), (9,)])
def test_the_error_of_a_shape_is_one_for_arguments_too(rich, shape):
    with pytest.raises(InvalidArgumentError):
        QuantizedArray.from_arrays(*rich[:2], shape)


@pytest.mark.parametrize(
    "fmt",
    [
        BlockFormat(Codebook([-1, 0, 1]), 4),
        BlockFormat(uniform(4), 4),
        BlockFormat(Codebook([-1, 0, 1]), 4, levels="matrix"),
    ],
    ids=["ternary", "int4", "fitted"],
)
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_codes_beyond_the_codebook_are_refused(fast_xp, fmt, batch_dims):
    arrays = quantized(fast_xp, ramp(4, 4), fmt, batch_dims=batch_dims).to_arrays()
    codes = host(arrays["codes"])
    codes.reshape(-1)[-1] = 255
    with pytest.raises(FormatError, match=f"'codes' .* {len(fmt.codebook)}.* {fmt.codebook.name}"):
        QuantizedArray.from_arrays(arrays | {"codes": on(fast_xp, codes)}, fmt, (4, 4), batch_dims)


def test_codes_of_scales_beyond_their_codebook_are_refused():
    q = quantize(normal(5, 9), BlockFormat.parse("nf4/4:i3/4:float32"))
    arrays = q.to_arrays()
    arrays["scales.codes"] = np.full_like(arrays["scales.codes"], 255)
    with pytest.raises(FormatError, match=r"'codes' .* below 7.* int3"):
        QuantizedArray.from_arrays(arrays, q.format, q.shape)


@pytest.mark.parametrize("text", ["nf4/4:float32", "nf5/4:float32", "nf4/4:u8/2:float32"])
@pytest.mark.parametrize("key", ["codes", "scales"])
def test_stored_arrays_of_two_libraries_are_refused(torch, text, key):
    q = quantize(ramp(4, 4), BlockFormat.parse(text))
    arrays = {name: torch.from_numpy(array) if name.startswith(key) else array for name, array in q.to_arrays().items()}
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        dequantize(QuantizedArray.from_arrays(arrays, q.format, q.shape))


def test_an_array_of_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(UnsupportedArrayError, match=r"'codes' .* got list"):
        QuantizedArray.from_arrays({"codes": [0], "scales": np.ones(1, np.float32)}, BlockFormat(NF4), (2,))


def test_the_codebook_of_an_array_is_that_of_its_format():
    assert quantize(ramp(4), BlockFormat(NF4)).codebook is NF4
