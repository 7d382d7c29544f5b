from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook, ScaleFormat, normal_float, paper_grid
from lqlora.errors import FormatError, InvalidArgumentError
from lqlora.testing.strategies import formats, shapes


def counted_bits(fmt, count):
    """Bytes of codes, of scales and of offsets, level by level."""
    blocks = -(-count // fmt.block_size)
    codes = 8 * -(-count * fmt.bits // 8)
    if isinstance(fmt.scales, str):
        return codes + blocks * {"float32": 32, "float16": 16, "bfloat16": 16}[fmt.scales]
    return codes + counted_bits(fmt.scales.format, blocks) + (32 if fmt.scales.offset == "min" else 0)


@given(fmt=formats(depth=3))
def test_text_is_read_back(fmt):
    again = BlockFormat.parse(str(fmt))
    assert again == fmt
    assert str(again) == str(fmt)


@given(fmt=formats(depth=3), shape=shapes())
def test_storage_is_counted_exactly(fmt, shape):
    count = 1
    for length in shape:
        count *= length
    assert fmt.storage_bits(shape) == counted_bits(fmt, count)


@given(fmt=formats(depth=3))
def test_bits_per_weight_are_the_limit_of_storage(fmt):
    # A size that all blocks divide: nothing is padded, offsets vanish in the number of weights.
    count = 8 * 70 * 20**3 * fmt.block_size
    scales = fmt.scales
    while isinstance(scales, ScaleFormat):
        count *= scales.block_size
        scales = scales.dtype
    assert 0 <= fmt.storage_bits((count,)) - count * fmt.bits_per_weight <= 3 * 32


def test_bits_per_weight_of_the_paper():
    # LQ-LoRA's first example: 3 bits + 8 / 64 + 32 / (64 * 256).
    fmt = BlockFormat(normal_float(3), 64, ScaleFormat(8, 256, "float32"))
    assert fmt.bits_per_weight == 3 + Fraction(8, 64) + Fraction(32, 64 * 256)
    assert round(float(fmt.bits_per_weight), 3) == 3.127


@pytest.mark.parametrize(("which", "count"), [("code", 432), ("paper", 243)])
def test_the_grid_of_the_paper(which, count):
    grid = paper_grid(which)
    assert len(grid) == len(set(grid)) == len({str(fmt) for fmt in grid}) == count
    assert all(fmt.scales.offset == "min" for fmt in grid)


def test_another_grid_is_refused():
    with pytest.raises(InvalidArgumentError, match="'code' or 'paper', not 'both'"):
        paper_grid("both")


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("nf4/64", "nf4/64:float32"),
        (" nf4/64:float16\n", "nf4/64:float16"),
        ("nf4/64:u8+min/256:float32", "nf4/64:u8/256:float32"),
        ("int3/7:u8+none/256:u4/16:bfloat16", "int3/7:u8+none/256:u4/16:bfloat16"),
    ],
)
def test_spellings(text, spelling):
    assert str(BlockFormat.parse(text)) == spelling


MALFORMED = [
    "", "nf4", "nf4/", "/64", "nf4/64:", "nf4/-1", "nf4/0", "nf4/6.4", "nf4/64:float8", "nf4/64:float32:float32", "nf4/64:u8",
    "nf4/64:u8/256", "nf4/64:u8/256:", "nf4/64:u0/256:float32", "nf4/64:u9/256:float32", "nf4/64:u8/0:float32",
    "nf4/64:u8+max/256:float32", "nf4/64:n8/256:float32", "nf9/64", "fp8/64", "nf4/64 float32", "nf4//64",
    "nf4/64:u8/256:bogus", "nf4/" + "9" * 5000, "nf4/64:u8/" + "9" * 5000 + ":float32",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:24] or "empty")
def test_malformed_text_is_refused(text):
    with pytest.raises(FormatError) as caught:
        BlockFormat.parse(text)
    message = str(caught.value)
    # Words of Python's own do not help who wrote the text, and one nested level does not need to say it twice.
    assert "unpack" not in message
    assert message.count("is no block format") <= 1


def test_text_nested_beyond_reason_is_refused():
    with pytest.raises(FormatError):
        BlockFormat.parse("nf4/64:" + "u8/2:" * 5000 + "float32")


def test_a_codebook_without_a_known_name_is_given_beside_the_text():
    mine = Codebook([-1, 0, 1], name="ternary")
    fmt = BlockFormat(mine, 8)
    with pytest.raises(FormatError, match="Unknown codebook 'ternary'"):
        BlockFormat.parse(str(fmt))
    assert BlockFormat.parse(str(fmt), codebook=mine) == fmt


@pytest.mark.parametrize("codebook", ["nf4", None, [0.0, 1.0]])
def test_a_format_needs_a_codebook(codebook):
    with pytest.raises(FormatError, match="needs a Codebook, not"):
        BlockFormat(codebook)


@pytest.mark.parametrize("block_size", [0, -1, 64.0, True, "64", None])
def test_a_block_holds_at_least_one_weight(block_size):
    with pytest.raises(FormatError, match="at least 1 weight"):
        BlockFormat(NF4, block_size)


@pytest.mark.parametrize("scales", ["float64", "fp32", None, 32, ["float32"]])
def test_scales_are_stored_as_known(scales):
    with pytest.raises(FormatError, match="Scales are stored as float32, float16, bfloat16 or by a ScaleFormat"):
        BlockFormat(NF4, 64, scales)


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 0}, {"bits": 9}, {"block_size": 0}, {"dtype": "int8"}, {"offset": "mean"}, {"codebook": "nf"}],
    ids=str,
)
def test_scale_formats_are_checked_when_made(arguments):
    with pytest.raises(InvalidArgumentError):
        ScaleFormat(**({"bits": 8, "block_size": 256} | arguments))


def test_negative_lengths_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"no negative lengths: \(2, -1\)"):
        BlockFormat(NF4).storage_bits((2, -1))


@given(fmt=formats(), other=formats())
def test_equal_formats_have_equal_hashes(fmt, other):
    assert (fmt == other) == (str(fmt) == str(other))
    assert hash(fmt) == hash(BlockFormat.parse(str(fmt)))


@given(text=st.text("nfuit0123456789/:+ .x", max_size=30))
def test_any_text_is_a_format_or_refused(text):
    try:
        parsed = BlockFormat.parse(text)
    except FormatError:  # any other error fails the test
        parsed = BlockFormat(NF4)
    assert BlockFormat.parse(str(parsed)) == parsed
