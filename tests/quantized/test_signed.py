"""Signed formats: blocks divided by their entry of largest magnitude, sign included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import BlockFormat, Codebook, quantize
from lqlora.codebooks import by_name
from lqlora.errors import FormatError, NonFiniteError
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.oracles import quantize as oracle
from tests.quantized.cases import draw_case, normal, quantized, restored, scales_of
from tests.strategies import host, on, stored

pytestmark = pytest.mark.slow_on_strict

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
BOOKS = [book for book in ALL_CODEBOOKS if book.normalization == "signed"]
BOF4S = by_name("bof4s-64")


@quiet
@given(data=st.data())
def test_bytes_and_values_equal_the_oracle(xp, data):
    w, fmt = draw_case(data, xp, codebooks=BOOKS, fitted=True)
    expected_bytes, expected = oracle.quantize(w, fmt)
    q = quantized(xp, w, fmt)
    assert stored(q) == expected_bytes
    np.testing.assert_array_equal(restored(q), expected)


def test_the_scale_is_the_entry_of_largest_magnitude(xp):
    w = normal(20, 16)
    q = quantized(xp, w, BlockFormat(BOF4S, 16))
    peaks = np.abs(w).argmax(axis=1)
    assert host(q.scales).tolist() == w[range(20), peaks].tolist()
    assert restored(q)[range(20), peaks].tolist() == w[range(20), peaks].tolist()
    assert (host(q.scales) < 0).any()


@pytest.mark.parametrize(("w", "scale"), [([1, -1], 1), ([-1, 1], 1), ([-1, 0.5], -1), ([0.5, -1], -1), ([-2, -2], -2)])
def test_of_two_entries_of_largest_magnitude_the_positive_one_counts(xp, w, scale):
    q = quantize(on(xp, np.array(w, dtype=np.float32)), BlockFormat(BOF4S, 2))
    assert host(q.scales).tolist() == [scale]


def test_turning_all_signs_turns_the_scales_only(xp):
    w = normal(20, 16)
    q, turned = quantized(xp, w, BlockFormat(BOF4S, 16)), quantized(xp, -w, BlockFormat(BOF4S, 16))
    assert stored(q)["codes"] == stored(turned)["codes"]
    assert host(turned.scales).tolist() == (-host(q.scales)).tolist()


def test_signed_levels_leave_less_error_than_those_for_both_signs():
    # BOF4-S has one more level to place, because -1 needs none: arXiv 2505.06653, table 2.
    w = normal(4096, 64)
    signed, plain = (
        ((restored(quantize(w, BlockFormat(by_name(name), 64))) - w) ** 2).mean() for name in ("bof4s-64", "bof4-64")
    )
    assert signed < 0.93 * plain


@quiet
@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
@pytest.mark.parametrize("scales", ["float32", "float16", "i8/4:float32", "i6/4:float32", "d8+none/4:float32"])
def test_scales_of_both_signs_are_stored_in_every_format_for_them(fast_xp, fit, scales):
    w = normal(40, 16)
    q = quantized(fast_xp, w, BlockFormat.parse(f"bof3s-64/16:{scales}"), fit=fit)
    found = scales_of(q)
    assert (found < 0).any()
    assert (found > 0).any()
    assert ((restored(q) - w) ** 2).mean() < 0.1


@pytest.mark.parametrize("scales", ["u8/4:float32", "l8/4:float32", "i8+min/4:float32", "d8+min/4:float32"])
def test_scales_that_have_no_sign_are_refused(scales):
    with pytest.raises(FormatError, match=r"scales of bof4s-64 .* cannot hold"):
        BlockFormat.parse(f"bof4s-64/64:{scales}")


@pytest.mark.parametrize("w", [[0.0, 0.0], [0.0, -0.0], [-0.0, 0.0], [1.0, -0.0]])
def test_zeros_come_back_zero(xp, w):
    dense = restored(quantize(on(xp, np.array(w, dtype=np.float32)), BlockFormat(BOF4S, 2)))
    assert dense.tolist() == w


def test_a_block_of_negative_zeros_is_all_zero(xp):
    for w in ([-0.0, -0.0], [0.0, -0.0], [-0.0, 0.0]):
        q = quantize(on(xp, np.array(w, dtype=np.float32)), BlockFormat(BOF4S, 2))
        assert stored(q)["scales"] == bytes(4)


@pytest.mark.parametrize("scales", ["d8/4:float32", "i8+mean/4:float32", "u8/4:float32", "l8/4:float32"])
def test_scales_that_might_turn_their_sign_are_refused(scales):
    with pytest.raises(FormatError, match=r"scales of bof4s-64 .* cannot hold"):
        BlockFormat.parse(f"bof4s-64/4:{scales}")


@pytest.mark.parametrize("normalization", ["absmax", "signed"])
def test_scales_beyond_float32_because_the_levels_are_narrow_are_refused(normalization):
    book = Codebook([-0.5, 0.0, 0.5], normalization=normalization)
    with pytest.raises(NonFiniteError, match=r"scales of v_proj .* float32"):
        quantize(np.array([3.4e38], dtype=np.float32), BlockFormat(book, 1), name="v_proj")
