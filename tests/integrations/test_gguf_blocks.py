"""Blocks of GGUF: what is written is what the library gguf decodes, and is read back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import FormatError, InvalidArgumentError, NonFiniteError
from lqlora.integrations.gguf_blocks import (
    block_type,
    from_gguf_blocks,
    gguf_bytes,
    gguf_fault,
    to_gguf_blocks,
)
from tests.requirements import require_module

gguf = require_module("gguf")

KINDS = {"int4s": "Q4_0", "int5s": "Q5_0", "int8s": "Q8_0"}


def quantized(text, shape=(5, 64), seed=0, magnitude=1.0, fit="absmax"):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(magnitude)
    return lq.quantize(w, lq.BlockFormat.parse(text), fit=fit)


def decoded(blocks, kind):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def with_arrays(q, **arrays):
    return lq.QuantizedArray.from_arrays(q.to_arrays() | arrays, q.format, q.shape)


@given(
    codebook=st.sampled_from(sorted(KINDS)),
    axis=st.sampled_from(["", "@-1", "@1"]),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    magnitude=st.floats(1e-4, 1e4),
    fit=st.sampled_from(["absmax", "scale"]),
    seed=st.integers(0, 99),
)
def test_gguf_decodes_to_equal_numbers_and_back(codebook, axis, rows, blocks, magnitude, fit, seed):
    q = quantized(f"{codebook}/32{axis}:float16", (rows, 32 * blocks), seed, magnitude, fit)
    kind = block_type(q)
    assert kind == KINDS[codebook]
    own = to_gguf_blocks(q)
    assert own.nbytes == gguf_bytes(kind, q.shape)
    np.testing.assert_array_equal(decoded(own, kind), lq.dequantize(q))
    back = from_gguf_blocks(own, kind)
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.scales, q.scales)
    np.testing.assert_array_equal(to_gguf_blocks(back), own)


@given(kind=st.sampled_from(["Q4_0", "Q5_0", "Q8_0"]), seed=st.integers(0, 99), exponent=st.integers(-20, 10))
def test_what_gguf_quantizes_is_read_and_written_again(kind, seed, exponent):
    w = np.random.default_rng(seed).standard_normal((3, 96)).astype(np.float32) * np.float32(2.0**exponent)
    blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    q = from_gguf_blocks(blocks, kind)
    np.testing.assert_array_equal(lq.dequantize(q), decoded(blocks, kind))
    np.testing.assert_array_equal(to_gguf_blocks(q), blocks)


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_affine_codes_around_the_middle(bits, seed):
    rng = np.random.default_rng(seed)
    q = quantized(f"affine{bits}/32@-1:float16")
    zeros = np.full(10, 2 ** (bits - 1), np.uint8)
    codes = rng.integers(0, 2**bits, 5 * 64).astype(np.uint8)
    q = with_arrays(q, zero_points=lq.ops.pack_codes(zeros, bits), codes=lq.ops.pack_codes(codes, bits))
    assert block_type(q) == {4: "Q4_0", 8: "Q8_0"}[bits]
    np.testing.assert_array_equal(decoded(to_gguf_blocks(q), block_type(q)), lq.dequantize(q))


@given(seed=st.integers(0, 99))
def test_affine_codes_with_minima(seed):
    rng = np.random.default_rng(seed)
    q = quantized("affine4/32@-1:float16", seed=seed)
    assert "zero points" in gguf_fault(q)
    # Products of 7 bits and 4 bits have 11, as many as float16.
    scales = (rng.integers(64, 128, 10) * 2.0 ** rng.integers(-12, 3, 10)).astype(np.float16)
    q = with_arrays(q, scales=scales)
    assert block_type(q) == "Q4_1"
    np.testing.assert_array_equal(decoded(to_gguf_blocks(q), "Q4_1"), lq.dequantize(q))


@pytest.mark.parametrize(
    ("text", "shape", "match"),
    [
        ("nf4/32:float16", (4, 64), "codebook must be"),
        ("int4/32:float16", (4, 64), "codebook must be"),
        ("int6s/32:float16", (4, 64), "codebook must be"),
        ("affine3/32:float16", (4, 64), "codebook must be"),
        ("int4s+fit/32:float16", (4, 64), "codebook must be"),
        ("int4s/64:float16", (4, 64), "block_size must be 32"),
        ("int4s/32@0:float16", (32, 64), "blocks must be along"),
        ("int4s/32:float16", (4, 48), "blocks must be along"),
        ("int4s/32:float32", (4, 64), "scales must be such"),
        ("int4s/32:i8/256:float32", (4, 64), "scales must be such"),
        ("affine4/32:float32", (4, 64), "scales must be such"),
        ("affine8/32:float16", (4, 64), "zero points must all"),
        ("int4s/32~both:float16", (64, 64), "rotation must be None"),
        ("int4s/32:float16", (64,), "q must be one matrix"),
    ],
)
def test_what_no_type_holds_is_refused(text, shape, match):
    q = quantized(text, shape)
    assert match in gguf_fault(q)
    for call in (to_gguf_blocks, block_type):
        with pytest.raises(FormatError, match=match):
            call(q)


@pytest.mark.parametrize("magnitude", [1e-5, 1e-4, 1e5])
def test_scales_at_the_ends_of_float16(magnitude):
    q = quantized("int8s/32:float16", magnitude=magnitude)
    np.testing.assert_array_equal(decoded(to_gguf_blocks(q), "Q8_0"), lq.dequantize(q))


@pytest.mark.parametrize(
    ("blocks", "kind", "error"),
    [
        (np.zeros((2, 17), np.uint8), "Q4_0", FormatError),
        (np.zeros((2, 0), np.uint8), "Q4_0", FormatError),
        (np.zeros(18, np.uint8), "Q4_0", FormatError),
        (np.zeros((2, 18), np.int8), "Q4_0", FormatError),
        (np.zeros((2, 20), np.uint8), "Q4_1", InvalidArgumentError),
        (np.full((1, 18), 0x7C, np.uint8), "Q4_0", NonFiniteError),
    ],
)
def test_bytes_that_are_no_blocks_are_refused(blocks, kind, error):
    with pytest.raises(error, match=" must "):
        from_gguf_blocks(blocks, kind)
