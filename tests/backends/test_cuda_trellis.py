"""CUDA kernels of trellis codes: the bytes of the reference, through the backend's own host code, emulated and on a device."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from tests.backends.kernels import KERNELS
from tests.emulator.cupy_stand_in import CuPyStandIn

NAMES = {"float": "float32", "Float16": "float16", "BFloat16": "bfloat16"}
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def stored_of(rng, lines, length, block_size, bits, state_bits, levels=None):
    """Return random codes of some lines."""
    packed = rng.integers(0, 256, ops.packed_size(lines * length, bits)).astype(np.uint8)
    scales = (rng.standard_normal(lines * -(-length // block_size)) * 2.0 ** rng.integers(-9, 9)).astype(np.float32)
    if levels is None:
        levels = rng.standard_normal(2**state_bits).astype(np.float32)
    return ops.PackedTrellis(packed, scales, levels, bits, block_size, length)


def there(cupy, stored):
    return stored._replace(packed=cupy.asarray(stored.packed), scales=cupy.asarray(stored.scales))


@given(
    data=st.data(),
    lines=st.integers(1, 5),
    length=st.integers(1, 700),
    block_size=st.sampled_from([1, 2, 3, 5, 8, 13, 64, 100, 256, 257, 300, 5000]),
    bits=st.integers(1, 8),
    dtype=st.sampled_from(sorted(FLOATS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_decoded_weights_are_those_of_the_reference(cupy, data, lines, length, block_size, bits, dtype, seed):
    cupy.schedule = data.draw(st.sampled_from([0, 1, 7]), label="schedule")
    state_bits = data.draw(st.integers(2 * bits, min(16, 2 * bits + 7)), label="state bits")
    stored = stored_of(np.random.default_rng(seed), lines, length, block_size, bits, state_bits)
    start, count = data.draw(st.integers(0, 8), label="start"), lines * length
    out = cupy.asarray(np.zeros(start + count, FLOATS[dtype]))[start:]
    given = there(cupy, stored)
    assert ops.decode_trellis.select(given, out).implementation == "cuda.decode_trellis"
    assert ops.decode_trellis(given, out) is out
    expected = ops.decode_trellis.reference(stored, np.empty(count, FLOATS[dtype]))
    assert out.get().tobytes() == expected.tobytes()


def test_threads_loop_over_more_weights_than_the_grid_has(emulated, few_blocks):
    stored = stored_of(np.random.default_rng(0), 3, 4000, 64, 2, 10)
    out = emulated.asarray(np.zeros(12_000, np.float32))
    ops.decode_trellis(there(emulated, stored), out)
    assert out.get().tobytes() == ops.decode_trellis.reference(stored, np.empty(12_000, np.float32)).tobytes()


@pytest.mark.parametrize("kernel", KERNELS["trellis_matmul"])
@pytest.mark.parametrize(
    ("columns", "block_size", "is_one_line"), [(8, 5, True), (264, 64, False), (1032, 300, False), (64, 256, True)]
)
def test_products_of_integers_are_exact(emulated, kernel, columns, block_size, is_one_line):
    dtype, most = kernel.partition("<")[2].removesuffix(">").split(", ")
    rng, rows, inputs = np.random.default_rng(0), 9, {1: 1, 4: 3, 16: 11}[int(most)]
    levels = (np.arange(2**10) % 5 - 2).astype(np.float32)
    lines = (1, rows * columns) if is_one_line else (rows, columns)
    stored = stored_of(rng, *lines, block_size, 2, 10, levels)._replace()
    stored = stored._replace(scales=rng.choice([0.0, 1.0, -1.0, 2.0], stored.scales.shape).astype(np.float32))
    x = np.zeros((inputs, columns))
    for row in x:  # a few ones, so that sums stay small
        row[rng.choice(columns, 8, replace=False)] = rng.choice([-1.0, 1.0], 8)
    weights = ops.decode_trellis.reference(stored, np.empty(rows * columns, np.float32)).reshape(rows, columns)
    own = FLOATS[NAMES[dtype]]
    out, there_x = emulated.asarray(np.full((inputs, rows), np.nan, own)), emulated.asarray(x.astype(own))
    arguments = there_x, there(emulated, stored), out
    assert ops.matmul_trellis.select(*arguments).implementation == "cuda.matmul_trellis"
    assert ops.matmul_trellis(*arguments) is out
    if isinstance(emulated, CuPyStandIn):
        assert emulated.launched[-1][0] == kernel
    assert out.get().astype(np.float64).tolist() == (x @ weights.T.astype(np.float64)).tolist()


def test_products_of_other_numbers_are_close(cupy):
    rng = np.random.default_rng(1)
    stored = stored_of(rng, 20, 512, 64, 2, 10)
    x, weights = rng.standard_normal((3, 512)).astype(np.float32), np.empty(20 * 512, np.float32)
    weights = ops.decode_trellis.reference(stored, weights).reshape(20, 512).astype(np.float64)
    found = ops.matmul_trellis(cupy.asarray(x), there(cupy, stored), cupy.asarray(np.zeros((3, 20), np.float32))).get()
    bound = 512 * 2.0**-24 * np.abs(x).astype(np.float64) @ np.abs(weights).T
    assert (np.abs(found - x.astype(np.float64) @ weights.T) <= bound).all()


def test_whole_arrays_are_decoded_by_the_kernels(cupy):
    w = np.random.default_rng(0).standard_normal((24, 200)).astype(np.float32)
    for text in ("tcq2/64:u8/16:float32", "tcq3-9/50@0:float16", "tcq1/300@-1~both:float32"):
        q = lq.quantize(w, lq.BlockFormat.parse(text))
        there = q.to(cupy)
        np.testing.assert_array_equal(lq.dequantize(there).get(), lq.dequantize(q))


def test_what_the_kernels_do_not_take(emulated):
    stored = there(emulated, stored_of(np.random.default_rng(0), 4, 64, 64, 2, 10))
    x, out = emulated.empty((1, 64), dtype="float32"), emulated.empty((1, 4), dtype="float32")
    flat = emulated.empty(256, dtype="float32")
    assert ops.matmul_trellis.select(x, stored, out).implementation == "cuda.matmul_trellis"
    for other in (
        stored._replace(scales=stored.scales[:3]),
        stored._replace(levels=stored.levels[:9]),
        stored._replace(length=63),
    ):
        assert ops.decode_trellis.select(other, flat).implementation == "reference"
        assert ops.matmul_trellis.select(x, other, out).implementation == "reference"
    many = emulated.empty((17, 64), dtype="float32"), emulated.empty((17, 4), dtype="float32")
    assert ops.matmul_trellis.select(many[0], stored, many[1]).implementation == "reference"
    assert ops.matmul_trellis.select(x.astype(np.float16), stored, out).implementation == "reference"
    assert ops.decode_trellis.select(stored, flat.astype(np.float64)).implementation == "reference"
    assert ops.matmul_trellis.select(x[:, :60], stored, out).implementation == "reference"
