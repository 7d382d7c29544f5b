"""The compiled kernels, on every instruction set of this machine, against the references: the same bytes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora._optional import is_installed
from lqlora._threads import num_threads, on_threads, set_num_threads
from lqlora.backends.cpu import loading
from lqlora.errors import InvalidArgumentError
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.backends.compiled import BOOKS, COUNTS, DTYPES, SIZES, ran, same, zeros_of
from tests.requirements import require_or_skip


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


@pytest.mark.parametrize("size", [2**62, 2**63, 2**64, 2**70])
def test_a_block_is_as_long_as_the_array_at_most(isa, size):
    flat = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    scale, levels, cuts = np.abs(flat).max(keepdims=True), lq.NF4.levels, lq.NF4.boundaries
    packed = ops.encode_packed.reference(flat, scale, None, cuts, 4, 100)
    same(ran(ops.encode_packed, flat, scale, None, cuts, 4, size), packed)
    same(ran(ops.encode_by_absmax, flat, cuts, 4, size)[1], packed)
    outs = [np.empty(100, dtype=np.float32) for _ in range(2)]
    same(
        ran(ops.decode, ops.PackedBlocks(packed, scale, None, levels, 4, size), outs[0]),
        ops.decode.reference(ops.PackedBlocks(packed, scale, None, levels, 4, 100), outs[1]),
    )
    x, y = np.eye(4, 8, dtype=np.float32), np.empty((4, 12), dtype=np.float32)
    ran(ops.matmul_packed, x, ops.PackedBlocks(packed[:48], scale, None, levels, 4, size), y)
    np.testing.assert_array_equal(y, outs[0][:96].reshape(12, 8).T[:4])


@pytest.mark.sampled(12)
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
        stored = ops.PackedBlocks(packed, scales, None, lq.NF4.levels, 4, 64)
        for operation, arguments in ((ops.decode, (stored, out)), (ops.matmul_packed, (x, stored, y))):
            assert not operation.select(*arguments).implementation.startswith("native.")
            with pytest.raises(ValueError, match="read-only"):
                operation(*arguments)

    @pytest.mark.parametrize("library", ["numpy", "torch"])
    def test_products_of_another_dtype_than_their_rows(self, library):
        require_or_skip("torch", library == "numpy" or is_installed("torch"))
        xp = importlib.import_module(library)
        packed, scales = xp.zeros(32, dtype=xp.uint8), xp.ones(1, dtype=xp.float32)
        stored = ops.PackedBlocks(packed, scales, None, lq.NF4.levels, 4, 64)
        x, wide = xp.ones((1, 64), dtype=xp.float16), xp.zeros((1, 1), dtype=xp.float32)
        assert ops.matmul_packed.select(x, stored, wide).implementation == "reference"
        same_dtype = ops.matmul_packed.select(x, stored, xp.zeros((1, 1), dtype=xp.float16))
        assert same_dtype.implementation.startswith("native.") == loading.status()[0]

    def test_forced_numpy_passes_them_over(self):
        with lq.forced("numpy"):
            assert ops.pack_codes.select(np.zeros(4, dtype=np.uint8), 4).implementation == "reference"


class TestThreads:
    def test_the_environment_is_read(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert num_threads() == 3
        monkeypatch.setenv("LQLORA_NUM_THREADS", "2")
        assert num_threads() == 2
        for text in ("", "0", "-1", "many", "9" * 5000, "4294967296", "٣"):
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
        with pytest.raises(InvalidArgumentError, match="count must be an integer"):
            set_num_threads(count)


class TestTheLibrary:
    def test_an_instruction_set_that_is_not_there_is_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"instruction_set.*'sse9'"), loading.using("sse9"):
            pass

    @pytest.mark.usefixtures("isa")
    def test_the_choice_ends_with_the_block(self):
        before = loading.status()
        with loading.using("baseline"):
            assert "baseline" in loading.status()[1]
        assert loading.status() == before

    def test_it_is_not_loaded_with_the_package(self):
        code = "import sys, lqlora; sys.exit('lqlora.backends.cpu' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
