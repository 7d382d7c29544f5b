"""Compiled products of a few rows: exact for integers, and the same bytes on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

import lqlora as lq
from lqlora import ops
from lqlora.backends.cpu import compiled, loading
from tests.backends.compiled import DTYPES, ran, same
from tests.requirements import require_or_skip

#: Blocks that fill registers and blocks that do not, rows longer than stripes, and up to the most rows of any kernel.
PRODUCTS = [
    (1, 5, 64, 64),
    (4, 3, 4104, 24),
    (3, 7, 8, 3),
    (0, 2, 8, 8),
    (1, 40, 2048 + 96, 32),
    (2, 9, 256, 96),
    (3, 33, 64, 4096),
    (5, 6, 4096, 64),
    (compiled.FEW_ROWS, 17, 160, 32),
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
            ran(ops.matmul_packed, x, ops.PackedBlocks(*arguments), out)
            with np.errstate(over="ignore"):  # in float16
                same(out, (x.astype(np.float32) @ dense.T + np.float32(0)).astype(x.dtype))


def test_products_may_overwrite_their_rows(isa):
    rng = np.random.default_rng(0)
    packed, scales = rng.integers(0, 256, 2048).astype(np.uint8), np.ones(64, dtype=np.float32)
    arguments = packed, scales, None, lq.NF4.levels, 4, 64
    x = rng.standard_normal((2, 64)).astype(np.float32)
    expected = ran(ops.matmul_packed, x, ops.PackedBlocks(*arguments), np.empty_like(x))
    same(ran(ops.matmul_packed, x, ops.PackedBlocks(*arguments), x), expected)


@pytest.mark.parametrize(("columns", "size"), [(4096, 64), (2080, 32), (1000, 40)])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_products_have_the_same_bytes_on_every_instruction_set_and_in_any_company(bits, columns, size):
    require_or_skip("native", loading.status()[0])
    rng, rows = np.random.default_rng(bits), 70
    packed = rng.integers(0, 256, rows * columns * bits // 8).astype(np.uint8)
    weight = packed, rng.random(-(-rows * columns // size)).astype(np.float32), None, lq.normal_float(bits).levels
    x, found = rng.standard_normal((compiled.FEW_ROWS, columns)).astype(np.float32), {}
    for name in loading.instruction_sets():
        for batch in range(1, compiled.FEW_ROWS + 1):
            out = np.empty((batch, rows), dtype=np.float32)
            with loading.using(name):
                ran(ops.matmul_packed, x[:batch], ops.PackedBlocks(*weight, bits, size), out)
            found[name, batch] = out
    expected = found["baseline", compiled.FEW_ROWS]
    for (_, batch), out in found.items():
        same(out, expected[:batch])
    dense = ops.decode(ops.PackedBlocks(*weight, bits, size), np.empty(rows * columns, np.float32)).reshape(
        rows, columns
    )
    np.testing.assert_allclose(expected, x.astype(np.float64) @ dense.T.astype(np.float64), atol=1e-4)
