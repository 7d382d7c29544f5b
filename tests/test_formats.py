from __future__ import annotations

import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lqlora import NF4, BlockFormat, Codebook, ScaleFormat, affine, normal_float, quantize
from lqlora.errors import FormatError, InvalidArgumentError, ScaleUnderflowWarning
from lqlora.formats import float_bits
from lqlora.testing.strategies import formats, shapes

AXES = (None, 0, 1, -1, -2, 17)
any_format = formats(depth=3, axes=AXES, fitted=True, rotated=True)


def needed(fmt):
    """Return the number of axes that a rotation needs."""
    return {None: 0, "in": 1, "out": 2, "both": 2}[fmt.rotation and fmt.rotation.side]


def lines_of(fmt, shape):
    """Return the length of each line that is cut into blocks."""
    array = np.empty(shape, dtype=np.int8)
    if fmt.axis is None:
        return [array.size]
    others = np.delete(shape, fmt.axis)
    return [shape[fmt.axis]] * int(np.prod(others))


def counted_bits(fmt, shape):
    """Return the bits of codes, zero points, levels, scales and offsets, in whole bytes, depth by depth."""
    lines = lines_of(fmt, shape)
    blocks = sum(-(-length // fmt.block_size) for length in lines)
    bits = 8 * -(-sum(lines) * fmt.bits // 8)
    if fmt.codebook.normalization == "affine":
        bits += 8 * -(-blocks * (fmt.bits + int(np.log2(fmt.codebook.levels[1]))) // 8)
    if fmt.levels != "codebook":
        sets = 1 if fmt.levels == "matrix" else len(range(0, len(lines), fmt.levels))
        bits += 32 * sets * len(fmt.codebook.levels)
    if isinstance(fmt.scales, str):
        return bits + blocks * {"float32": 32, "float16": 16, "bfloat16": 16}[fmt.scales]
    return bits + counted_bits(fmt.scales.format, (blocks,)) + (0 if fmt.scales.offset == "none" else 32)


@given(fmt=any_format)
def test_text_is_read_back(fmt):
    again = BlockFormat.parse(str(fmt))
    assert again == fmt
    assert str(again) == str(fmt)


@given(fmt=any_format, shape=shapes())
def test_storage_is_counted_exactly(fmt, shape):
    if fmt.rotation is not None and len(shape) < needed(fmt):
        with pytest.raises(InvalidArgumentError, match="no axis for the rotation"):
            fmt.storage_bits(shape)
        return
    if fmt.axis is not None and not -len(shape) <= fmt.axis < len(shape):
        with pytest.raises(InvalidArgumentError, match=f"axis {fmt.axis} .* does not exist"):
            fmt.storage_bits(shape)
        return
    assert fmt.storage_bits(shape) == counted_bits(fmt, shape)
    lines = lines_of(fmt, shape)
    assert fmt.lines(shape) == (len(lines), lines[0] if lines else shape[fmt.axis])


@given(data=st.data(), fmt=any_format, batch=st.sampled_from([(), (3,), (2, 1)]))
def test_stored_arrays_are_those_that_quantize_returns(data, fmt, batch):
    assume(fmt.axis != 17)
    least = max(needed(fmt), 0 if fmt.axis is None else fmt.axis + 1 if fmt.axis >= 0 else -fmt.axis)
    shape = data.draw(hnp.array_shapes(min_dims=least, max_dims=3, max_side=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleUnderflowWarning)
        q = quantize(np.ones((*batch, *shape), dtype=np.float32), fmt, batch_dims=len(batch))
    found = {name: (array.dtype.name, array.shape) for name, array in q.to_arrays().items()}
    assert list(found.items()) == list(fmt.stored_arrays(shape, batch).items())


def test_a_pickle_holds_the_fields_of_a_format_only():
    fmt = BlockFormat.parse("nf4/64:u8/256:float32")
    kept = hash(fmt), str(fmt), fmt.scales.format
    assert kept[2] is fmt.scales.format
    again = pickle.loads(pickle.dumps(fmt))
    assert set(vars(again)) == {"codebook", "block_size", "scales", "axis", "levels", "rotation"}
    assert set(vars(again.scales)) == {"bits", "block_size", "dtype", "offset", "codebook"}
    assert (again, hash(again), str(again)) == (fmt, *kept[:2])


@given(fmt=formats(depth=3))
def test_bits_per_weight_are_the_limit_of_storage(fmt):
    # All blocks divide the number of weights, so nothing is padded. Only offsets are left, at most 32 bits a depth.
    count = 8 * 70 * fmt.block_size
    scales = fmt.scales
    while isinstance(scales, ScaleFormat):
        count *= 8 * scales.block_size
        scales = scales.dtype
    assert 0 <= fmt.storage_bits((count,)) - count * fmt.bits_per_weight <= 3 * 32


def test_bits_per_weight_of_the_paper():
    # LQ-LoRA's first example: 3 bits + 8 / 64 + 32 / (64 * 256).
    fmt = BlockFormat(normal_float(3), 64, ScaleFormat(8, 256, "float32"))
    assert fmt.bits_per_weight == 3 + Fraction(8, 64) + Fraction(32, 64 * 256)
    assert round(float(fmt.bits_per_weight), 3) == 3.127


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("nf4/64", "nf4/64:float32"),
        (" nf4/64:float16\n", "nf4/64:float16"),
        ("nf4/64:u8+min/256:float32", "nf4/64:u8/256:float32"),
        ("int3/7:u8+none/256:u4/16:bfloat16", "int3/7:u8+none/256:u4/16:bfloat16"),
        ("nf4/64@-1", "nf4/64@-1:float32"),
        ("nf4/64@+1", None),
        ("affine4/64@0:d8+mean/256:float32", "affine4/64@0:d8/256:float32"),
        ("nf2+fit/64", "nf2+fit/64:float32"),
        ("nf2+fit16/64@-1:float16", "nf2+fit16/64@-1:float16"),
        ("bof4s-64+fit/64:i8+none/16:l4+none/4:float32", "bof4s-64+fit/64:i8/16:l4/4:float32"),
        ("sf4-3/32:i6+mean/256:l8+min/16:bfloat16", "sf4-3/32:i6+mean/256:l8+min/16:bfloat16"),
    ],
)
def test_spellings(text, spelling):
    if spelling is None:
        with pytest.raises(FormatError):
            BlockFormat.parse(text)
        return
    assert str(BlockFormat.parse(text)) == spelling


MALFORMED = [
    "", "nf4", "nf4/", "/64", "nf4/64:", "nf4/-1", "nf4/0", "nf4/6.4", "nf4/64:float8", "nf4/64:float32:float32",
    "nf4/64:u8", "nf4/64:u8/256", "nf4/64:u8/256:", "nf4/64:u0/256:float32", "nf4/64:u9/256:float32",
    "nf4/64:u8/0:float32", "nf4/64:u8+max/256:float32", "nf4/64:n8/256:float32", "nf9/64", "fp8/64", "nf4/64 float32",
    "nf4//64", "nf4+fit16/64", "nf4+fit0/64@0", "nf4+fit-1/64@0", "nf4+fits/64", "nf4@0/64", "nf4/64@", "nf4/64@a",
    "nf4/64@100", "+fit/64", "affine4+fit/64", "nf4/64:l2/256:float32", "nf4/64:l9/256:float32",
    "nf4/64:d4/256:float32", "nf4/64:i1/256:float32", "nf4/64:u8+mean/256:float32", "nf4/64:l8+mean/256:float32",
    "bof4s-64/64:u8/256:float32", "bof4s-64/64:i8+min/256:float32", "nf4/64:u8/256@0:float32",
    "nf4/64:u8+fit/256:float32", "nf4/64:u8/256:bogus", "nf4/" + "9" * 5000, "nf4/64:u8/" + "9" * 5000 + ":float32",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:24] or "empty")
def test_malformed_text_is_refused(text):
    with pytest.raises(FormatError) as caught:
        BlockFormat.parse(text)
    message = str(caught.value)
    # The message must be ours and not Python's, and must not repeat itself for nested scales.
    assert "unpack" not in message
    assert message.count("block format") <= 1


def test_text_nested_beyond_reason_is_refused():
    with pytest.raises(FormatError):
        BlockFormat.parse("nf4/64:" + "u8/2:" * 5000 + "float32")


def test_a_codebook_without_a_known_name_is_given_beside_the_text():
    mine = Codebook([-1, 0, 1], name="ternary")
    fmt = BlockFormat(mine, 8)
    with pytest.raises(FormatError, match=r"^codebook .*'ternary'"):
        BlockFormat.parse(str(fmt))
    assert BlockFormat.parse(str(fmt), codebook=mine) == fmt


@pytest.mark.parametrize("codebook", ["nf4", None, [0.0, 1.0]])
def test_a_format_needs_a_codebook(codebook):
    with pytest.raises(FormatError, match=r"codebook must be .* got"):
        BlockFormat(codebook)


@pytest.mark.parametrize("block_size", [0, -1, 64.0, True, "64", None])
def test_a_block_holds_at_least_one_weight(block_size):
    with pytest.raises(FormatError, match=r"block_size must be .* got"):
        BlockFormat(NF4, block_size)


@pytest.mark.parametrize("scales", ["float64", "fp32", None, 32, ["float32"]])
def test_scales_are_stored_as_known(scales):
    with pytest.raises(FormatError, match=r"scales must be float32, .* got"):
        BlockFormat(NF4, 64, scales)


def test_factors_are_stored_as_known():
    assert [float_bits(dtype) for dtype in ("float32", "float16", "bfloat16")] == [32, 16, 16]
    with pytest.raises(FormatError, match=r"dtype must be .* got 'float64'"):
        float_bits("float64")


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 8.0},
        {"bits": True},
        {"bits": "8"},
        {"block_size": 0},
        {"dtype": "int8"},
        {"offset": "mean"},
        {"offset": "max"},
        {"codebook": "nf"},
        {"codebook": "log", "bits": 2},
        {"codebook": "log", "offset": "mean"},
        {"codebook": "dynamic", "bits": 4},
        {"codebook": "int", "bits": 1},
    ],
    ids=str,
)
def test_scale_formats_are_checked_when_made(arguments):
    with pytest.raises(InvalidArgumentError):
        ScaleFormat(**({"bits": 8, "block_size": 256} | arguments))


@pytest.mark.parametrize(
    ("codebook", "offset", "signed"),
    [("uint", "min", False), ("int", "none", True), ("dynamic", "mean", False), ("log", "none", False)],
)
def test_each_codebook_of_scales_has_an_offset_of_its_own(codebook, offset, signed):
    scales = ScaleFormat(8, 256, codebook=codebook)
    assert (scales.offset, scales.signed) == (offset, signed)
    assert scales.offset_bits == (0 if offset == "none" else 32)
    assert not ScaleFormat(8, 256, codebook=codebook, offset="min").signed
    assert len(scales.levels) == {"int": 255}.get(codebook, 256)


@pytest.mark.parametrize("axis", [1.0, "0", True, (0,)])
def test_an_axis_is_a_whole_number(axis):
    with pytest.raises(FormatError, match="axis must be an int"):
        BlockFormat(NF4, axis=axis)


@pytest.mark.parametrize("levels", ["row", 0, -1, True, 1.0, None])
def test_levels_are_shared_by_what_is_known(levels):
    with pytest.raises(FormatError, match=r"levels must be 'codebook', .* got"):
        BlockFormat(NF4, axis=-1, levels=levels)


def test_levels_of_lines_need_lines():
    with pytest.raises(FormatError, match=r"levels=16 .* axis"):
        BlockFormat(NF4, levels=16)


def test_levels_of_integers_are_not_fitted():
    with pytest.raises(FormatError, match=r"levels of affine4 .*'matrix'"):
        BlockFormat(affine(4), levels="matrix")


@pytest.mark.parametrize(("levels", "sets"), [("codebook", 0), ("matrix", 1), (1, 100), (16, 7), (100, 1), (101, 1)])
def test_sets_of_levels_are_counted(levels, sets):
    assert BlockFormat(NF4, axis=-1, levels=levels).level_sets((100, 640)) == sets


@pytest.mark.parametrize(
    ("axis", "lines"), [(None, (1, 60)), (0, (12, 5)), (1, (15, 4)), (2, (20, 3)), (-1, (20, 3)), (-3, (12, 5))]
)
def test_lines_follow_the_axis(axis, lines):
    assert BlockFormat(NF4, axis=axis).lines((5, 4, 3)) == lines


def test_negative_lengths_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"shape must have .* \(2, -1\)"):
        BlockFormat(NF4).storage_bits((2, -1))


@given(fmt=formats(axes=AXES, fitted=True), other=formats(axes=AXES, fitted=True))
def test_equal_formats_have_equal_hashes(fmt, other):
    assert (fmt == other) == (str(fmt) == str(other))
    assert hash(fmt) == hash(BlockFormat.parse(str(fmt)))


@given(text=st.text("nfuitdlmea0123456789/:+@- .x", max_size=30))
def test_any_text_is_a_format_or_refused(text):
    try:
        parsed = BlockFormat.parse(text)
    except FormatError:  # any other error fails the test
        parsed = BlockFormat(NF4)
    assert BlockFormat.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", [None, 4, b"nf4/64:float32", ["nf4/64:float32"]])
def test_a_format_is_parsed_from_a_text_only(text):
    with pytest.raises(FormatError, match=r"^text must"):
        BlockFormat.parse(text)


@pytest.mark.parametrize("codebook", ["nf4", [-1.0, 1.0], np.ones(2)])
def test_a_text_is_parsed_with_a_codebook_only(codebook):
    with pytest.raises(FormatError, match=r"^codebook must"):
        BlockFormat.parse("own/64:float32", codebook)


def test_integers_of_numpy_become_those_of_python():
    found = BlockFormat(NF4, np.int64(16), ScaleFormat(np.int8(8), np.int64(256)), np.int8(-1), np.uint8(4))
    assert found == BlockFormat(NF4, 16, ScaleFormat(8, 256), -1, 4)
    assert {type(own) for own in (found.block_size, found.axis, found.levels, found.scales.bits)} == {int}
    assert found.level_sets((8, 16)) == 2


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nf3", "a block size must follow"),
        ("nf3:u8/256:float32", "a block size must follow"),
        ("nf3+level/64", "codebook 'nf3.level' may"),
        ("nf3/sixty", "block size 'sixty' must"),
        ("nf3/64x@-1", "block size '64x' must"),
        ("nf3/64~both@-1", "'~both@-1' must be an axis"),
        ("nf3/64@x", "'@x' must be an axis"),
        ("nf3/64" + ":u8/4" * 8 + ":float32", "scales may be quantized 7 times"),
    ],
)
def test_a_text_that_is_no_format_is_told_which_part_is_wrong(text, fault):
    with pytest.raises(FormatError, match=f"^text must be a block format.*{fault}"):
        BlockFormat.parse(text)
