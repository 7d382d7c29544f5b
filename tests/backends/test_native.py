"""The compiled kernels, on every instruction set of this machine, against the references: the same bytes."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora._optional import is_installed
from lqlora._threads import num_threads, on_threads, set_num_threads
from lqlora.backends import native
from lqlora.errors import InvalidArgumentError
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.requirements import require_or_skip

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
#: Lengths around those of registers and stripes.
COUNTS = st.sampled_from([0, 1, 7, 8, 9, 31, 32, 33, 63, 65, 100, 2047, 2048, 2049, 5000])
SIZES = st.sampled_from([1, 2, 3, 7, 8, 16, 63, 64, 65, 256, 2048, 2056, 10**6])
BOOKS = st.sampled_from(ALL_CODEBOOKS)


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def isa(request):
    require_or_skip("native", native.status()[0])
    if request.param not in native.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    with native.using(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    set_num_threads(1)
    yield
    set_num_threads(None)


@st.composite
def values(draw, dtype):
    """Draw values of any size, with zeros of both signs and subnormal numbers among them."""
    count, rng = draw(COUNTS), np.random.default_rng(draw(st.integers(0, 99)))
    spread = draw(st.sampled_from([0.0, 2.0, 30.0]))
    w = rng.standard_normal(count) * np.exp(spread * rng.standard_normal(count))
    w[rng.random(count) < 0.1] = 0.0
    w[rng.random(count) < 0.05] = -0.0
    with np.errstate(over="ignore"):
        w = w.astype(DTYPES[dtype])
    return np.where(np.isfinite(w.astype(np.float64)), w, w.dtype.type(1))


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def ran(operation, *arguments):
    """Run an operation, after making sure that a compiled kernel will."""
    assert operation.select(*arguments).implementation.startswith("native."), operation.select(*arguments).reason
    return operation(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), size=SIZES)
def test_statistics_of_blocks(isa, dtype, data, size):
    flat = data.draw(values(dtype))
    same(ran(ops.block_absmax, flat, size), ops.block_absmax.reference(flat, size))
    for found, expected in zip(
        ran(ops.block_extremes, flat, size), ops.block_extremes.reference(flat, size), strict=True
    ):
        same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=["nan", "-nan", "inf", "-inf"])
def test_statistics_show_what_is_not_finite(isa, dtype, bad):
    flat = np.ones(300, dtype=DTYPES[dtype])
    flat[150] = bad
    for found in (ops.block_absmax(flat, 64), *ops.block_extremes(flat, 64)):
        assert np.isfinite(found[[0, 1, 3, 4]]).all()
    assert not np.isfinite(ops.block_absmax(flat, 64)[2])
    low, high = (found[2] for found in ops.block_extremes(flat, 64))
    assert (np.isnan(low) and np.isnan(high)) if np.isnan(bad) else bad in (low, high)


def zeros_of(codebook, blocks):
    if codebook.normalization != "affine":
        return None
    return np.random.default_rng(blocks).integers(0, len(codebook), blocks).astype(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), size=SIZES, codebook=BOOKS, sign=st.sampled_from([1, -1]))
def test_codes(isa, dtype, data, size, codebook, sign):
    flat = data.draw(values(dtype))
    with np.errstate(over="ignore"):
        scales = (sign * ops.block_absmax.reference(flat, size)).astype(
            np.float64 if dtype == "float64" else np.float32
        )
    scales[1::5] = 0
    zeros = zeros_of(codebook, len(scales))
    arguments = (flat, scales, zeros, codebook.boundaries, codebook.bits, size)
    same(ran(ops.encode_packed, *arguments), ops.encode_packed.reference(*arguments))
    arguments = (flat, codebook.boundaries, codebook.bits, size)
    for found, expected in zip(
        ran(ops.encode_by_absmax, *arguments), ops.encode_by_absmax.reference(*arguments), strict=True
    ):
        same(found, expected)
    if dtype in ("float32", "float64"):
        arguments = (flat, scales, zeros, codebook.boundaries, size)
        same(ran(ops.encode, *arguments), ops.encode.reference(*arguments))
        same(ran(ops.nearest_codes, flat, codebook.boundaries), ops.nearest_codes.reference(flat, codebook.boundaries))


@pytest.mark.parametrize("codebook", ALL_CODEBOOKS, ids=lambda codebook: codebook.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codes_on_and_beside_every_boundary(isa, codebook, dtype):
    cuts = codebook.boundaries.astype(dtype)
    around = [
        cuts,
        np.nextafter(cuts, dtype(-np.inf)),
        np.nextafter(cuts, dtype(np.inf)),
        codebook.levels.astype(dtype),
    ]
    entries = np.concatenate([*around, [np.inf, -np.inf, 0.0, -0.0]]).astype(dtype)
    entries = np.resize(entries, -(-len(entries) // 32) * 32 + 5)
    same(
        ran(ops.nearest_codes, entries, codebook.boundaries), ops.nearest_codes.reference(entries, codebook.boundaries)
    )


@pytest.mark.parametrize("bits", range(1, 9))
@given(count=COUNTS, seed=st.integers(0, 99))
def test_packed_codes(isa, bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed = ops.pack_codes.reference(codes, bits)
    same(ran(ops.pack_codes, codes, bits), packed)
    if bits < 8:  # whole bytes are only copied
        same(ran(ops.unpack_codes, packed, bits, count), codes)


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
    same(ran(ops.decode, *arguments, outs[0]), ops.decode.reference(*arguments, outs[1]))


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
    ran(ops.decode, *arguments, found)
    same(found, ops.decode.reference(*arguments, expected))
    assert not memory[:begin].any()
    assert not memory[begin + count :].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 32, 40])
def test_every_narrow_number_is_read_and_written(isa, dtype, size):
    every = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    finite = every[np.isfinite(every.astype(np.float32))]
    assert ops.block_absmax(finite, 1).tobytes() == np.abs(finite.astype(np.float32)).tobytes()
    # As scales of a level of one, they and their neighbors in float32 are rounded to the narrow dtype.
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
                ran(ops.decode, packed, scales, None, levels, 1, size, out),
                np.repeat(scales.astype(DTYPES[dtype]), size),
            )


def tensor_of(array):
    """Return a tensor of the same memory."""
    torch = importlib.import_module("torch")
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (7, 300), (300, 9), (257, 264), (31, 33), (520, 512)])
def test_copies_across(isa, dtype, shape, library):
    require_or_skip("torch", library == "numpy" or is_installed("torch"))
    rng = np.random.default_rng(0)
    whole = rng.integers(-99, 99, (shape[1] + 3, shape[0] + 5)).astype(DTYPES[dtype])
    memory = np.zeros((shape[0] + 2, shape[1] + 7), dtype=DTYPES[dtype])
    sources = whole[: shape[1], : shape[0]].T, whole[3:, 5:].T
    for source, out in ((sources[0], memory[: shape[0], : shape[1]]), (sources[1], memory[1:-1, 3:-4])):
        memory[...] = 7
        for count in (1, 3):
            out[...] = 7
            with on_threads(count):
                if library == "numpy":
                    assert ran(ops.copy_across, source, out) is out
                else:
                    ran(ops.copy_across, tensor_of(source), tensor_of(out))
            np.testing.assert_array_equal(out, source)
        out[...] = 7
        assert (memory == 7).all()  # and nothing beside it was written
        ran(ops.copy_across, source.T, out.T)  # where rows and columns have changed places
        np.testing.assert_array_equal(out, source)


@given(count=st.integers(0, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_rows(isa, dtype, count, columns, seed):
    rows = np.exp(3 * np.random.default_rng(seed).standard_normal((count, columns))).astype(dtype)
    same(ran(ops.row_sums, rows), ops.row_sums.reference(rows))


@given(
    count=st.integers(0, 20),
    columns=st.sampled_from([1, 2, 7, 32, 63, 64, 100]),
    codebook=BOOKS,
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ratios(isa, count, columns, codebook, weighted, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, columns)).astype(np.float32)
    rows[::6] = 0
    weights = rng.random((count, columns)).astype(np.float32) if weighted else None
    affine = codebook.normalization == "affine"
    zeros = rng.integers(0, len(codebook), (count, 1)).astype(np.float32) if affine else None
    grid = (1.0, 0.5, 0.8, -1.0) if codebook.normalization == "signed" else (1.0, 0.25, 0.9)
    arguments = (rows, weights, codebook.levels, codebook.boundaries, zeros, grid, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        same(ran(ops.best_ratios, *arguments), ops.best_ratios.reference(*arguments))


@pytest.mark.parametrize("codebook", ALL_CODEBOOKS, ids=lambda codebook: codebook.name)
def test_ratios_of_many_rows(isa, codebook):
    grid = (1.0, *np.linspace(0.4, 1.1, 7).tolist(), -0.9, 3.0, 1e-9)
    for columns in (48, 64, 100):
        rng = np.random.default_rng(columns)
        rows = rng.standard_normal((50, columns)).astype(np.float32)
        rows /= np.abs(rows).max(axis=1, keepdims=True)
        affine = codebook.normalization == "affine"
        zeros = rng.integers(0, len(codebook), (50, 1)).astype(np.float32) if affine else None
        for weights in (None, rng.random(rows.shape).astype(np.float32)):
            arguments = (rows, weights, codebook.levels, codebook.boundaries, zeros, grid, 2)
            same(ran(ops.best_ratios, *arguments), ops.best_ratios.reference(*arguments))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("low", [2.0**-21, 0.1, 1.0, 100.0, 1e30])
def test_ratios_depend_on_the_side_of_a_boundary_to_the_last_bit(isa, low, sign):
    # Below the boundary the first ratio is the better one, above it the second.
    rng, levels = np.random.default_rng(0), np.array([0, 1], dtype=np.float32)
    steps = np.arange(-3, 4, dtype=np.int32)
    for ratio, cut in zip(
        rng.uniform(low, 2 * low, 100).astype(np.float32), rng.uniform(0.375, 0.425, 100), strict=True
    ):
        boundary = np.array([cut], dtype=np.float32)
        entries = np.repeat(((ratio * boundary).view(np.int32) + steps).view(np.float32), 3)
        rows = np.repeat(sign * entries[:, None], 64, axis=1)
        grid = (float(sign * ratio), float(sign * ratio * np.float32(0.9)))
        with np.errstate(over="ignore"):
            expected = ops.best_ratios.reference(rows, None, levels, boundary, None, grid, 0)
            same(ran(ops.best_ratios, rows, None, levels, boundary, None, grid, 0), expected)
        assert len(set(expected.tolist())) == 2 or low == 1e30  # whose squares are infinite


#: Boundaries and ratios that no codebook and no search of ours has.
ODD = [0.0, -0.0, 1e-45, 2.0**-60, 2.0**60, 3e38, -1e-45, -(2.0**-61), np.inf, -np.inf]


@given(data=st.data(), size=st.integers(1, 40), seed=st.integers(0, 99), weighted=st.booleans())
def test_ratios_of_any_tables(isa, data, size, seed, weighted):
    rng = np.random.default_rng(seed)
    cuts = rng.standard_normal(size - 1)
    odd = data.draw(st.lists(st.sampled_from(ODD), max_size=size - 1))
    cuts[: len(odd)] = odd
    levels, boundaries = np.sort(rng.standard_normal(size)).astype(np.float32), np.sort(cuts).astype(np.float32)
    ratios = st.sampled_from([0.5, -0.75, 1.0, 1.5, -1.5, 1.5000001, 2.0**-20, 2.0**-21, 0.0, np.inf, np.nan, 1e-45])
    grid = tuple(data.draw(st.lists(ratios, min_size=1, max_size=4)))
    rows = rng.standard_normal((40, 32)).astype(np.float32)
    rows[:, ::7] = rng.choice(np.array([0.0, -0.0, 1e-45, 1e30, -1e-45], np.float32), rows[:, ::7].shape)
    arguments = rows, np.abs(rows[::-1]).copy() if weighted else None, levels, boundaries, None, grid, 1
    with np.errstate(all="ignore"):
        expected = ops.best_ratios.reference(*arguments)
    found = ran(ops.best_ratios, *arguments)
    same(np.where(np.isnan(found), 0, found), np.where(np.isnan(expected), 0, expected))
    assert (np.isnan(found) == np.isnan(expected)).all()


@pytest.mark.parametrize("affine", [False, True])
def test_threads_change_no_ratio(isa, affine):
    rng = np.random.default_rng(0)
    rows = np.clip(rng.standard_normal((4001, 64)) / 3, -1, 1).astype(np.float32)
    zeros = rng.integers(0, 16, (4001, 1)).astype(np.float32) if affine else None
    tables = lq.NF4.levels, lq.NF4.boundaries
    arguments = rows, rng.random(rows.shape, dtype=np.float32), *tables, zeros, tuple(np.linspace(0.5, 1.1, 5)), 1
    expected = ops.best_ratios.reference(*arguments)
    for count in (1, 2, 5):
        with on_threads(count):
            same(ran(ops.best_ratios, *arguments), expected)


def test_a_search_among_flushed_numbers_ends(isa):
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no subnormal numbers")
    try:
        rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        levels, cuts = np.array([-1, -0.5, 0.5, 1], np.float32), np.array([-0.75, 0, 0.75], np.float32)
        start = time.process_time()
        found = ran(ops.best_ratios, rows, None, levels, cuts, None, tuple(np.linspace(0.5, 1.1, 13)), 0)
        spent = time.process_time() - start
    finally:
        torch.set_flush_denormal(False)
    same(found, ops.best_ratios.reference(rows, None, levels, cuts, None, tuple(np.linspace(0.5, 1.1, 13)), 0))
    assert spent < 0.05  # going through all subnormal numbers takes that long for three ratios


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(
    count=st.integers(0, 40),
    columns=st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 100, 2047, 2048, 2049, 5000]),
    codebook=BOOKS,
    weighted=st.sampled_from([None, np.float32, np.float64]),
    spread=st.sampled_from([0.0, 2.0, 8.0]),
    seed=st.integers(0, 99),
)
def test_errors_of_rounding(isa, dtype, count, columns, codebook, weighted, spread, seed):
    rng, count = np.random.default_rng(seed), min(count, 20000 // columns)
    rows = np.exp(spread * rng.standard_normal((count, columns))) * rng.standard_normal((count, columns))
    rows = rows.astype(dtype)
    scales = (np.abs(rows).max(axis=1) * rng.choice([-0.7, 0.4, 1.0, 1.1], count)).astype(np.float32)
    scales[::6] = rng.choice(np.array([0.0, -0.0, 1e-45, 3e38], np.float32), len(scales[::6]))
    weights = None if weighted is None else rng.random((count, columns)).astype(weighted)
    arguments = (rows, weights, scales, zeros_of(codebook, count), codebook.levels, codebook.boundaries)
    with np.errstate(over="ignore"):
        expected = ops.rounding_errors.reference(*arguments)
    assert not np.isnan(expected).any()
    same(ran(ops.rounding_errors, *arguments), expected)


def test_threads_change_no_error_of_rounding(isa):
    rows = np.random.default_rng(0).standard_normal((9001, 70)).astype(np.float32)
    arguments = (rows, np.abs(rows), ops.block_absmax(rows.reshape(-1), 70), None, lq.NF4.levels, lq.NF4.boundaries)
    expected = ops.rounding_errors.reference(*arguments)
    for count in (1, 2, 5):
        with on_threads(count):
            same(ran(ops.rounding_errors, *arguments), expected)


#: Blocks that fill registers, and blocks that do not; rows longer than stripes; as many rows as any kernel takes at once.
PRODUCTS = [
    (1, 5, 64, 64),
    (4, 3, 4104, 24),
    (3, 7, 8, 3),
    (0, 2, 8, 8),
    (1, 40, 2048 + 96, 32),
    (2, 9, 256, 96),
    (3, 33, 64, 4096),
    (5, 6, 4096, 64),
    (native.FEW_ROWS, 17, 160, 32),
    (3, 9, 40, 32),
    (3, 9, 96, 48),
    (3, 9, 64, 16),
]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("affine", [False, True])
def test_products_of_few_rows_are_exact_for_integers(isa, bits, affine):
    rng, levels = np.random.default_rng(bits), np.arange(2**bits, dtype=np.float32) - 2 ** (bits - 1)
    for batch, rows, columns, size in PRODUCTS:
        blocks = -(-rows * columns // size)
        codes = rng.integers(0, 2**bits, rows * columns).astype(np.uint8)
        scales = rng.choice(np.array([-0.5, 0.0, 1, 2], dtype=np.float32), blocks)
        zeros = rng.integers(0, 2**bits, blocks).astype(np.uint8) if affine else None
        shifted = levels[codes] - (np.repeat(zeros, size)[: codes.size].astype(np.float32) if affine else 0)
        dense = (shifted * np.repeat(scales, size)[: codes.size]).reshape(rows, columns)
        arguments = ops.pack_codes(codes, bits), scales, zeros, levels, bits, size
        for dtype in ("float32", "float16", "bfloat16"):
            x = rng.integers(-4, 5, (batch, columns)).astype(DTYPES[dtype])
            out = np.full((batch, rows), 7, dtype=x.dtype)
            ran(ops.matmul_packed, x, *arguments, out)
            with np.errstate(over="ignore"):  # in float16
                same(out, (x.astype(np.float32) @ dense.T + np.float32(0)).astype(x.dtype))


@pytest.mark.parametrize("size", [2**62, 2**63, 2**64, 2**70])
def test_a_block_is_as_long_as_the_array_at_most(isa, size):
    flat = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    scale, levels, cuts = np.abs(flat).max(keepdims=True), lq.NF4.levels, lq.NF4.boundaries
    packed = ops.encode_packed.reference(flat, scale, None, cuts, 4, 100)
    same(ran(ops.encode_packed, flat, scale, None, cuts, 4, size), packed)
    same(ran(ops.encode_by_absmax, flat, cuts, 4, size)[1], packed)
    outs = [np.empty(100, dtype=np.float32) for _ in range(2)]
    same(
        ran(ops.decode, packed, scale, None, levels, 4, size, outs[0]),
        ops.decode.reference(packed, scale, None, levels, 4, 100, outs[1]),
    )
    x, y = np.eye(4, 8, dtype=np.float32), np.empty((4, 12), dtype=np.float32)
    ran(ops.matmul_packed, x, packed[:48], scale, None, levels, 4, size, y)
    np.testing.assert_array_equal(y, outs[0][:96].reshape(12, 8).T[:4])


def test_products_may_overwrite_their_rows(isa):
    rng = np.random.default_rng(0)
    packed, scales = rng.integers(0, 256, 2048).astype(np.uint8), np.ones(64, dtype=np.float32)
    arguments = packed, scales, None, lq.NF4.levels, 4, 64
    x = rng.standard_normal((2, 64)).astype(np.float32)
    expected = ran(ops.matmul_packed, x, *arguments, np.empty_like(x))
    same(ran(ops.matmul_packed, x, *arguments, x), expected)


@pytest.mark.parametrize(("columns", "size"), [(4096, 64), (2080, 32), (1000, 40)])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_products_have_the_same_bytes_on_every_instruction_set_and_in_any_company(bits, columns, size):
    require_or_skip("native", native.status()[0])
    rng, rows = np.random.default_rng(bits), 70
    packed = rng.integers(0, 256, rows * columns * bits // 8).astype(np.uint8)
    weight = packed, rng.random(-(-rows * columns // size)).astype(np.float32), None, lq.normal_float(bits).levels
    x, found = rng.standard_normal((native.FEW_ROWS, columns)).astype(np.float32), {}
    for name in native.instruction_sets():
        for batch in range(1, native.FEW_ROWS + 1):
            out = np.empty((batch, rows), dtype=np.float32)
            with native.using(name):
                ran(ops.matmul_packed, x[:batch], *weight, bits, size, out)
            found[name, batch] = out
    expected = found["baseline", native.FEW_ROWS]
    for (_, batch), out in found.items():
        same(out, expected[:batch])
    dense = ops.decode(*weight, bits, size, np.empty(rows * columns, np.float32)).reshape(rows, columns)
    np.testing.assert_allclose(expected, x.astype(np.float64) @ dense.T.astype(np.float64), atol=1e-4)


@pytest.fixture(scope="module")
def last_page():
    """A page of memory before one that nobody may read: who reads beyond the end of an array does not live on."""
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
            same(ran(ops.decode, *arguments, outs[0]), ops.decode.reference(*arguments, outs[1]))
        if count % 32 == 0:
            x, out = np.ones((3, 32), dtype=np.float32), np.empty((3, count // 32), dtype=np.float32)
            ran(ops.matmul_packed, x, packed, scales, None, levels, bits, size, out)
            sums = ops.decode.reference(packed, scales, None, levels, bits, size, np.empty(count, np.float32))
            np.testing.assert_allclose(out[0], sums.reshape(-1, 32).sum(1), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text", ["nf4/64:float32", "nf3/50:float32", "affine2/64:u8/256:float32", "bof4s-64/64:float32"]
)
def test_threads_change_no_byte(isa, dtype, text):
    fmt = lq.BlockFormat.parse(text)
    w = np.random.default_rng(0).standard_normal((700, 1001)).astype(DTYPES[dtype])
    q = {}
    for count in (1, 2, 3, 16):
        with on_threads(count):
            q[count] = lq.quantize(w, fmt)
            assert lq.dequantize(q[count]).tobytes() == lq.dequantize(q[1]).tobytes()
    with lq.forced("reference"):
        expected = lq.quantize(w, fmt)
    for found in q.values():
        for name, array in expected.to_arrays().items():
            same(found.to_arrays()[name], array)


def test_many_threads_of_python_at_once(isa):
    w = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    expected, found = lq.quantize(w, lq.BlockFormat(lq.NF4)).packed.tobytes(), []
    threads = [
        threading.Thread(target=lambda: found.append(lq.quantize(w, lq.BlockFormat(lq.NF4)).packed.tobytes()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


class TestWhatIsLeftToOthers:
    def test_strided_and_unaligned_arrays(self):
        w = np.zeros(300, dtype=np.float32)
        unaligned = np.zeros(401, dtype=np.uint8)[1:].view(np.float32)
        assert ops.block_absmax.select(w[::2], 64).implementation == "reference"
        assert ops.block_absmax.select(unaligned, 64).implementation == "reference"
        assert ops.block_absmax(unaligned, 64).tolist() == [0.0, 0.0]

    def test_scales_of_another_number_or_dtype(self):
        flat, cuts = np.ones(100, dtype=np.float32), lq.NF4.boundaries
        for scales in (np.ones(3, dtype=np.float32), np.ones(2, dtype=np.float64)):
            assert ops.encode_packed.select(flat, scales, None, cuts, 4, 64).implementation == "reference"

    def test_errors_under_scales_or_weights_of_another_number(self):
        rows, tables = np.ones((3, 8), dtype=np.float32), (lq.NF4.levels, lq.NF4.boundaries)
        scales, zeros = np.ones(3, dtype=np.float32), np.zeros(3, dtype=np.uint8)
        one = slice(0, 1)  # each of these the reference spreads over all rows
        others = [(None, scales[one], None), (rows[one], scales, None), (None, scales, zeros[one])]
        expected = ops.rounding_errors(rows, None, scales, None, *tables)
        for given_arrays in others:
            assert ops.rounding_errors.select(rows, *given_arrays, *tables).implementation == "reference"
            same(ops.rounding_errors(rows, *given_arrays, *tables), expected)

    def test_results_that_may_not_be_written(self):
        packed, scales, out = np.zeros(32, dtype=np.uint8), np.ones(1, dtype=np.float32), np.zeros(64, np.float32)
        x, y = np.ones((1, 64), dtype=np.float32), np.zeros((1, 1), dtype=np.float32)
        out.flags.writeable = y.flags.writeable = False
        rest = packed, scales, None, lq.NF4.levels, 4, 64
        for operation, arguments in ((ops.decode, (*rest, out)), (ops.matmul_packed, (x, *rest, y))):
            assert not operation.select(*arguments).implementation.startswith("native.")
            with pytest.raises(ValueError, match="read-only"):
                operation(*arguments)

    @pytest.mark.parametrize("library", ["numpy", "torch"])
    def test_products_of_another_dtype_than_their_rows(self, library):
        require_or_skip("torch", library == "numpy" or is_installed("torch"))
        xp = importlib.import_module(library)
        packed, scales = xp.zeros(32, dtype=xp.uint8), xp.ones(1, dtype=xp.float32)
        rest = packed, scales, None, lq.NF4.levels, 4, 64
        x, wide = xp.ones((1, 64), dtype=xp.float16), xp.zeros((1, 1), dtype=xp.float32)
        assert ops.matmul_packed.select(x, *rest, wide).implementation == "reference"
        same_dtype = ops.matmul_packed.select(x, *rest, xp.zeros((1, 1), dtype=xp.float16))
        assert same_dtype.implementation.startswith("native.") == native.status()[0]

    def test_forced_numpy_passes_them_over(self):
        with lq.forced("numpy"):
            assert ops.pack_codes.select(np.zeros(4, dtype=np.uint8), 4).implementation == "reference"


class TestThreads:
    def test_the_environment_is_read(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert num_threads() == 3
        monkeypatch.setenv("LQLORA_NUM_THREADS", "2")
        assert num_threads() == 2
        for text in ("", "0", "-1", "many"):
            monkeypatch.setenv("LQLORA_NUM_THREADS", text)
            assert num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
        assert num_threads() == 4

    def test_a_setting_counts_more(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        set_num_threads(5)
        try:
            assert num_threads() == 5
        finally:
            set_num_threads(None)
        assert num_threads() == 3

    @pytest.mark.parametrize("count", [0, -1, 1.0, "2", True])
    def test_what_is_no_number_of_threads_is_refused(self, count):
        with pytest.raises(InvalidArgumentError, match="positive integer"):
            set_num_threads(count)


class TestTheLibrary:
    def test_an_instruction_set_that_is_not_there_is_refused(self):
        with pytest.raises(InvalidArgumentError, match="not 'sse9'"), native.using("sse9"):
            pass

    @pytest.mark.usefixtures("isa")
    def test_the_choice_ends_with_the_block(self):
        before = native.status()
        with native.using("baseline"):
            assert "baseline" in native.status()[1]
        assert native.status() == before

    def test_it_is_not_loaded_with_the_package(self):
        code = "import sys, lqlora; sys.exit('lqlora.backends.native' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
