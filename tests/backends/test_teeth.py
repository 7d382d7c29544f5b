"""The tests of the kernels find faults that are planted in the text of the kernels."""

from __future__ import annotations

from contextlib import ExitStack

import ml_dtypes
import numpy as np
import pytest

import lqlora as lq
from lqlora import ops
from lqlora.backends.cuda import compiling as binary
from lqlora.backends.cuda import kernel_text as source
from lqlora.backends.cuda import launching as launch
from tests.backends.conftest import TOGETHER, in_place
from tests.backends.kernels import TENSOR_SAMPLE
from tests.backends.test_cuda import product_case
from tests.backends.test_cuda_fits import nearly_equal
from tests.backends.test_cuda_lowrank import case as low_rank
from tests.emulator import build
from tests.emulator.build import EmulationError
from tests.emulator.cupy_stand_in import CuPyStandIn
from tests.requirements import require_or_skip

#: Planted faults: the module, the text that is replaced, its replacement, and words of the error that finds the fault.
#: None stands for results that differ, without an error.
FAULTS = {
    "no_barrier": ("decode", "  __syncthreads();\n}", "}", "shared memory"),
    "no_lanes": ("blocks", "__shfl_xor_sync(0xffffffffu, high", "__shfl_xor_sync(0xffffu, high", "not in its own mask"),
    "absent_lanes": ("blocks", "lane != 0 || turn + team >= parts) continue", "lane != 0 || turn + team >= parts) return", "returned"),
    "plain_maximum": ("blocks", "if (shared) atomicMax(to, key);\n  else *to", "*to", "what another thread wrote"),
    "all_lanes_write": ("blocks", "lane != 0 || turn + team >= parts", "turn + team >= parts", "what another thread wrote"),
    "tail_read": ("decode", "(count * bits + 7) / 8", "bits", "out of bounds"),
    "tail_written": ("decode", "if (i < count) narrow", "narrow", "out of bounds"),
    "always_aligned": ("encode", "is_aligned(flat, 16)", "true", "not a multiple of 16"),
    "reciprocal": ("encode", "values[i] / scaling.divisor", "values[i] * ((Wide)1 / scaling.divisor)", None),
    "upper_index": ("encode", "value > boundaries", "value >= boundaries", None),
    "zero_scale": ("encode", "scale != 0 ? scale :", "scale == scale ? scale :", None),
    "fused": ("decode", "(table[code_in<bits>(group, i)] - zero) * scale", "table[code_in<bits>(group, i)] * scale - zero * scale", None),
    "down": ("decode", "bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u", None),
    "no_next_block": ("encode", "if (i != next) return false;", "return false;", None),
    "sign_kept": ("blocks", "high = larger(high, key & ~K::SIGN);", "high = (Bits)larger((Signed)high, (Signed)key);", None),
    "nan_lost": ("blocks", "if (is_nan)", "if (false)", None),
    "positive_minimum": ("blocks", "if (low <= K::SIGN) low = 0;", "", None),
    "neighbors_first": ("sums", "terms[i] + terms[i + count / 2]", "terms[2 * i] + terms[2 * i + 1]", None),
    "other_lanes_first": ("sums", "lanes < 32 ? lanes / 2 : 16; distance > 0; distance /= 2", "1; distance < (lanes < 32 ? lanes : 32); distance *= 2", None),
    "no_barrier_before": ("sums", "      met[threadIdx.x] = own;\n      __syncthreads();", "      met[threadIdx.x] = own;", "shared memory"),
    "no_barrier_after": ("search", "(others);\n      __syncthreads();", "(others);", "shared memory"),
    "product_of_reciprocal": ("search", "nearest(entry / ratio)", "nearest(entry * (1.0f / ratio))", None),
    "last_of_equals": ("search", "left < error", "left <= error", None),
    "weight_first": ("search", "weight * (difference * difference)", "weight * difference * difference", None),
    "absent_entries": ("search", "present >> i & 1u ?", "true ?", None),
    "plain_addition": ("sums", "atomicAdd(own + entry.bin, integer(entry.term * factor))", "own[entry.bin] += integer(entry.term * factor)", "what another thread"),
    "sums_not_cleared": ("sums", "i < copies * all", "i < copies * all - 1", None),
    "halves_up": ("sums", "x + shift)", "x + 1e-9 + shift)", None),
    "all_bins": ("sums", "if (entry.bin < 0 || entry.bin >= bins) continue;", "", None),
    "sums_not_met": ("lowrank", "    __syncthreads();\n    if (threadIdx.x < most", "    if (threadIdx.x < most", "shared memory"),
    "sums_met_again": ("lowrank", "    __syncthreads();\n  }\n}", "  }\n}", "what another thread"),
    "inputs_beyond": ("lowrank", "const int own = first + m < inputs ? first + m : first", "const int own = first + m", "out of bounds"),
    "rows_beyond": ("lowrank", "turn < parts * rows ? turn : 0", "turn", "out of bounds"),
    "products_not_met": ("tensor", "    __syncthreads();\n    const int input", "    const int input", "shared memory"),
    "weights_beyond": ("tensor", "row < rows ? row : rows - 1", "row", "out of bounds"),
    "rows_of_inputs_beyond": ("tensor", "if (present && at < inputs) input", "if (present) input", "out of bounds"),
    "columns_beyond": ("tensor", "present && at < inputs", "at < inputs", None),
    "ranks_beyond": ("lowrank", "i < count ? widen(from[i]) : 0", "widen(from[i])", "out of bounds"),
}  # fmt: skip


def near_boundaries(scales, block_size):
    """Return weights at a boundary times their scale, or next to one."""
    rng = np.random.default_rng(1)
    cuts = rng.choice(lq.NF4.boundaries, (len(scales), block_size)) * scales[:, None]
    step = rng.choice([-np.inf, np.inf, 0.0], cuts.shape).astype(np.float32)
    return np.where(step == 0, cuts, np.nextafter(cuts, step)).astype(np.float32).reshape(-1)


def run(cupy):
    """Yield the results of kernels and of the references for arguments that reveal the faults."""
    rng = np.random.default_rng(0)
    size, bits = 20, 3
    scales = rng.choice([0.0, 1.0, 3.0, 0.7, 1.9], 450).astype(np.float32)
    zeros = rng.integers(0, 8, len(scales)).astype(np.uint8)
    w = near_boundaries(scales, size)
    encoding = (scales, None, lq.NF4.boundaries, 4, size)
    shifted = cupy.asarray(np.concatenate([w[:1], w]))[1:]
    yield ops.encode_packed(shifted, cupy.asarray(scales), *encoding[1:]), ops.encode_packed.reference(w, *encoding)
    w[[3, 5000]] = np.nan, -np.inf
    for block_size in (size, 5000):
        yield ops.block_absmax(cupy.asarray(w), block_size), ops.block_absmax.reference(w, block_size)
        both = zip(
            ops.block_extremes(cupy.asarray(w), block_size), ops.block_extremes.reference(w, block_size), strict=True
        )
        for found, expected in both:
            yield cupy.asarray(np.nan_to_num(found.get())), np.nan_to_num(expected)
    positive = abs(near_boundaries(scales, size))
    for found, expected in zip(
        ops.block_extremes(cupy.asarray(positive), size), ops.block_extremes.reference(positive, size), strict=True
    ):
        yield found, expected
    levels = np.array([-1.7, -1, -0.3, 0, 0.1, 1 + 2.0**-8, 1.2, 3], np.float32)
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        count = len(w) - 3
        codes = rng.integers(0, 256, ops.packed_size(count, bits)).astype(np.uint8)
        out, expected = np.zeros(count + 1, dtype), np.zeros(count, dtype)
        arrays = [cupy.asarray(array) for array in (codes, scales, zeros)]
        found = ops.decode(ops.PackedBlocks(*arrays, levels, bits, size), cupy.asarray(out)[1:])
        yield found, ops.decode.reference(ops.PackedBlocks(codes, scales, zeros, levels, bits, size), expected)
    yield from run_fits(cupy, rng)
    for sizes in ((5, 13, 100, 9), (1, 1, 2100, 3)):
        arguments = low_rank(rng, ("float16", "float32"), sizes)
        there = (*map(cupy.asarray, arguments[:4]), arguments[4])
        yield ops.add_low_rank(*there), ops.add_low_rank.reference(*arguments)
    x, *stored, levels, bits, size, expected = product_case(rng, TENSOR_SAMPLE[0], 21, 72, 40, affine=True)
    there, out = [cupy.asarray(array) for array in stored], cupy.asarray(np.zeros_like(expected))
    found = ops.matmul_packed(cupy.asarray(x), ops.PackedBlocks(*there, levels, bits, size), out)
    yield found, expected + expected.dtype.type(0)  # no zero is negative
    x[0, 0], (packed, scales, _), levels = np.inf, stored, abs(levels) + 1
    here = ops.PackedBlocks(packed, np.ones_like(scales), None, levels, bits, size)
    there = here._replace(packed=cupy.asarray(packed), scales=cupy.asarray(here.scales))
    found = ops.matmul_packed(cupy.asarray(x), there, cupy.asarray(np.zeros_like(expected)))
    yield found, ops.matmul_packed.reference(x, here, np.zeros_like(expected))


def run_fits(cupy, rng):
    """Yield the results of kernels and of the references for the operations of fits."""
    for length in (44, 64, 700):
        rows = rng.standard_normal((6, length)).astype(np.float32) ** 3
        rows[0] = 0
        yield ops.row_sums(cupy.asarray(rows)), ops.row_sums.reference(rows)
        book, weights = lq.normal_float(8), rng.random(rows.shape, dtype=np.float32)
        for ratio in (0.7, 0.9, 1.1):
            near = rng.choice(book.boundaries, rows.shape) * np.float32(ratio) * (rows != 0)
            others = (book.levels, book.boundaries, None, (ratio,), 3)  # later steps change errors in the last bits
            expected = ops.best_ratios.reference(near, weights, *others)
            yield ops.best_ratios(cupy.asarray(near), cupy.asarray(weights), *others), expected
        rows, weights, *others = nearly_equal(rng, length)
        expected = ops.best_ratios.reference(rows, weights, *others)
        yield ops.best_ratios(cupy.asarray(rows), cupy.asarray(weights), *others), expected
    signs = np.float32(1e20) * rng.choice(np.array([-1, 1], np.float32), (3, 13))
    others = (np.array([-1, 1], np.float32), np.zeros(1, np.float32), None, (1.0, 1e20), 0)
    yield ops.best_ratios(cupy.asarray(signs), None, *others), ops.best_ratios.reference(signs, None, *others)
    others = (lq.NF4.levels, lq.NF4.boundaries, None, (0.5, 1.0), 0)
    yield ops.best_ratios(cupy.asarray(0 * signs), None, *others), np.full(3, 0.5, np.float32)
    for count in (3, 3000):
        terms = np.concatenate([rng.standard_normal(1500), [4.0, 0.5 * 2.0**-38, 2.5 * 2.0**-38]])
        bins = np.concatenate([rng.integers(1, count, 1500), [0, 0, count]])
        with lq.forced("reference"):
            expected = ops.bin_sums(terms, bins, count)
        yield ops.bin_sums(cupy.asarray(terms), cupy.asarray(bins), count), expected


def differs(cupy) -> bool:
    with np.errstate(all="ignore"):
        return any(found.get().tobytes() != expected.tobytes() for found, expected in run(cupy))


@pytest.fixture
def planted(monkeypatch):
    """Return a function that plants a fault and returns the stand-in that runs the kernels with it."""
    require_or_skip("g++", build.is_available())
    with ExitStack() as stack:

        def plant(module, text, other):
            own = source.source

            def changed(name):
                assert text in own(module)
                return own(name).replace(text, other)

            monkeypatch.setattr(binary, "source", changed)
            monkeypatch.setattr(launch, "MOST_BLOCKS", 3)
            cupy = CuPyStandIn(TOGETHER)
            stack.enter_context(in_place(cupy))
            return cupy

        yield plant


def test_without_a_fault_nothing_is_found(planted):
    assert not differs(planted("decode", "__syncthreads", "__syncthreads"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    module, text, other, message = FAULTS[fault]
    cupy = planted(module, text, other)
    cupy.together.clear()
    if message is None:
        assert differs(cupy)
    else:
        with pytest.raises(EmulationError, match=message):
            differs(cupy)
