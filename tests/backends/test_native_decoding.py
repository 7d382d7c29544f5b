"""Compiled decoding, on every instruction set of this machine, against the reference: the same bytes, and no others read."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora._threads import set_num_threads
from tests.backends.compiled import BOOKS, COUNTS, DTYPES, SIZES, ran, same, zeros_of


@pytest.fixture
def one_thread():
    set_num_threads(1)
    yield
    set_num_threads(None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(count=COUNTS, size=SIZES, codebook=BOOKS, seed=st.integers(0, 99))
def test_values(isa, dtype, count, size, codebook, seed):
    rng, blocks = np.random.default_rng(seed), -(-count // size)
    codes = rng.integers(0, len(codebook), count).astype(np.uint8)
    scales = (rng.standard_normal(blocks) * np.exp(8 * rng.standard_normal(blocks))).astype(np.float32)
    scales[::7] = 0
    packed, zeros = ops.pack_codes.reference(codes, codebook.bits), zeros_of(codebook, blocks)
    outs = [np.empty(count, dtype=DTYPES[dtype]) for _ in range(2)]
    arguments = (packed, scales, zeros, codebook.levels, codebook.bits, size)
    same(
        ran(ops.decode, ops.PackedBlocks(*arguments), outs[0]),
        ops.decode.reference(ops.PackedBlocks(*arguments), outs[1]),
    )


@pytest.mark.sampled(12)
@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("codebook", [lq.NF4, lq.normal_float(3), lq.affine(4)], ids=lambda book: book.name)
@pytest.mark.parametrize(("size", "more"), [(64, 1013), (64, 1024), (40, 1024), (20, 1024)])
def test_values_that_are_streamed_past_the_caches(isa, one_thread, codebook, start, size, more):
    count, rng = 2**23 + more, np.random.default_rng(0)
    packed = rng.integers(0, 256, ops.packed_size(count, codebook.bits)).astype(np.uint8)
    scales = rng.standard_normal(-(-count // size)).astype(np.float32)
    zeros, memory = zeros_of(codebook, len(scales)), np.zeros(count + 32, np.float32)
    begin = (-memory.ctypes.data % 64) // 4 + start
    found, expected = memory[begin : begin + count], np.empty(count, np.float32)
    arguments = (packed, scales, zeros, codebook.levels, codebook.bits, size)
    ran(ops.decode, ops.PackedBlocks(*arguments), found)
    same(found, ops.decode.reference(ops.PackedBlocks(*arguments), expected))
    assert not memory[:begin].any()
    assert not memory[begin + count :].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 32, 40])
def test_every_narrow_number_is_read_and_written(isa, dtype, size):
    every = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    finite = every[np.isfinite(every.astype(np.float32))]
    assert ops.block_absmax(finite, 1).tobytes() == np.abs(finite.astype(np.float32)).tobytes()
    # With a level of one, the scale itself and its neighbors in float32 are rounded to the narrow dtype.
    levels = np.array([1.0], dtype=np.float32)
    near = finite.astype(np.float32)
    between = ((near[1:].astype(np.float64) + near[:-1]) / 2).astype(np.float32)
    others = np.array([np.inf, -np.inf, np.nan, -np.nan], dtype=np.float32)
    payload = np.array([0x7FC12345, 0xFFC54321], dtype=np.uint32).view(np.float32)
    up, down = (np.nextafter(between, np.float32(end)) for end in (np.inf, 0))
    for scales in (near, between, up, down, np.concatenate([others, payload] * 3)):
        packed = np.zeros(-(-len(scales) * size // 8), dtype=np.uint8)
        out = np.empty(len(scales) * size, dtype=DTYPES[dtype])
        with np.errstate(over="ignore"):
            same(
                ran(ops.decode, ops.PackedBlocks(packed, scales, None, levels, 1, size), out),
                np.repeat(scales.astype(DTYPES[dtype]), size),
            )


@pytest.fixture(scope="module")
def last_page():
    """Return a page of memory before a page that may not be read: reading beyond the end of an array ends the process."""
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is protected by mprotect")
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    page = np.frombuffer(memory, np.uint8)
    second = ctypes.c_void_p(page.ctypes.data + mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(second, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    yield page[: mmap.PAGESIZE]
    ctypes.CDLL(None).mprotect(second, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 8, 33, 64, 96, 100, 2080])
def test_no_byte_is_read_beyond_the_codes(isa, last_page, bits, count):
    rng, levels = np.random.default_rng(count), np.linspace(-1, 1, 2**bits, dtype=np.float32)
    packed = last_page[mmap.PAGESIZE - ops.packed_size(count, bits) :]
    packed[:] = ops.pack_codes(rng.integers(0, len(levels), count).astype(np.uint8), bits)
    for size in (1, 8, 20, 32, 64, 4096):
        scales = rng.random(-(-count // size)).astype(np.float32)
        for dtype in ("float32", "float16", "bfloat16"):
            outs = [np.empty(count, dtype=DTYPES[dtype]) for _ in range(2)]
            arguments = (packed, scales, None, levels, bits, size)
            same(
                ran(ops.decode, ops.PackedBlocks(*arguments), outs[0]),
                ops.decode.reference(ops.PackedBlocks(*arguments), outs[1]),
            )
        if count % 32 == 0:
            x, out = np.ones((3, 32), dtype=np.float32), np.empty((3, count // 32), dtype=np.float32)
            ran(ops.matmul_packed, x, ops.PackedBlocks(packed, scales, None, levels, bits, size), out)
            sums = ops.decode.reference(
                ops.PackedBlocks(packed, scales, None, levels, bits, size), np.empty(count, np.float32)
            )
            np.testing.assert_allclose(out[0], sums.reshape(-1, 32).sum(1), atol=1e-5)
