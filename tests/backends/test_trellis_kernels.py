"""Compiled kernels of trellis codes, on every instruction set of this machine, against the reference: the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora._threads import on_threads
from lqlora.backends.cpu import compiled, loading
from tests.backends.compiled import DTYPES, ran, same
from tests.requirements import require_or_skip

#: Lengths of lines, and block sizes: single weights, tails of a block, a sequence or a byte, and more than a sequence.
SHAPES = [
    (1, 1, 64),
    (3, 1, 1),
    (5, 2, 64),
    (40, 3, 7),
    (64, 9, 64),
    (100, 1, 1),
    (100, 2, 64),
    (300, 1, 300),
    (1060, 1, 1000),
    (256, 2, 10**30),
]


def computed_levels(state_bits):
    """Levels that are multiples of a unit: the sums of the bytes of a product of the state, minus 510."""
    mixed = (np.arange(2**state_bits, dtype=np.uint64) * 34038481 + 76625530) % 2**32
    sums = sum((mixed >> shift & 255).astype(np.int64) for shift in (0, 8, 16, 24))
    return (sums - 510).astype(np.float32) * np.float32(1.04 / 147.8)


def levels_of(state_bits, kind):
    if kind == "computed":
        return computed_levels(state_bits)
    return np.random.default_rng(state_bits).standard_normal(2**state_bits).astype(np.float32)


def weights_of(dtype, line, lines, size, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(line * lines).astype(DTYPES[dtype])
    scales = rng.uniform(0.5, 2, lines * -(-line // size)).astype(np.float64 if dtype == "float64" else np.float32)
    scales[1::3] = 0
    scales[2::5] *= -1
    return w, scales


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_codes(isa, dtype, bits, weighted):
    for line, lines, size in SHAPES:
        w, scales = weights_of(dtype, line, lines, size)
        importance = np.random.default_rng(1).random(w.size).astype(np.float32) if weighted else None
        arguments = (w, scales, importance, levels_of(2 * bits + line % 2, "table"), bits, size, line)
        same(ran(ops.encode_trellis, *arguments), ops.encode_trellis.reference(*arguments))


@pytest.mark.parametrize(("bits", "state_bits", "line"), [(2, 10, 700), (1, 11, 90), (3, 12, 40), (4, 11, 300)])
def test_codes_of_many_states(isa, bits, state_bits, line):
    w, scales = weights_of("float32", line, 1, 64)
    arguments = (w, scales, None, computed_levels(state_bits), bits, 64, line)
    same(ran(ops.encode_trellis, *arguments), ops.encode_trellis.reference(*arguments))


def test_the_code_that_kernels_compute_is_that_of_the_formats():
    same(lq.BlockFormat.parse("tcq2-12/64:float32").codebook.levels, computed_levels(12))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 16), (2, 16), (4, 16)])
def test_codes_of_so_many_states_that_decisions_are_marked(isa, bits, state_bits):
    w, scales = weights_of("float32", 270, 1, 256)
    importance = np.random.default_rng(1).random(w.size).astype(np.float32)
    arguments = (w, scales, importance, computed_levels(state_bits), bits, 256, 270)
    same(ran(ops.encode_trellis, *arguments), ops.encode_trellis.reference(*arguments))


def test_the_first_of_equal_sums_wins(isa):
    w, ones = np.zeros(96, dtype=np.float32), np.ones(2, dtype=np.float32)
    for levels in (np.zeros(64), np.tile([1.0, -1.0], 32), np.repeat([2.0, -2.0], 32)):
        arguments = (w, ones, None, levels.astype(np.float32), 2, 64, 96)
        same(ran(ops.encode_trellis, *arguments), ops.encode_trellis.reference(*arguments))


def test_weights_far_beyond_their_scale(isa):
    w = np.array([3e38, -3e38, 1e-45, 0, -0.0, 1, 2000, -1024], dtype=np.float32)
    for scale in (1e-45, 1.0, -0.0, 3e38):
        arguments = (w, np.array([scale], np.float32), None, levels_of(4, "table"), 2, 8, 8)
        with np.errstate(over="ignore"):
            same(ran(ops.encode_trellis, *arguments), ops.encode_trellis.reference(*arguments))


def stored_of(bits, state_bits, line, lines, size, kind="table", seed=0):
    rng, count = np.random.default_rng(seed), line * lines
    packed = rng.integers(0, 256, ops.packed_size(count, bits)).astype(np.uint8)
    scales = rng.standard_normal(lines * -(-line // size)).astype(np.float32)
    scales[::7] = 0
    return ops.PackedTrellis(packed, scales, levels_of(state_bits, kind), bits, size, line)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["table", "computed"])
@given(
    bits=st.integers(1, 4),
    more=st.integers(0, 8),
    shape=st.sampled_from([*SHAPES, (4096, 3, 64), (2000, 1, 8), (4800, 1, 16), (2400, 2, 300), (3000, 1, 40)]),
)
def test_values(isa, dtype, kind, bits, more, shape):
    stored = stored_of(bits, 2 * bits + more, *shape, kind=kind)
    found, expected = (np.full(shape[0] * shape[1] + 3, 7, dtype=DTYPES[dtype]) for _ in range(2))
    ran(ops.decode_trellis, stored, found[:-3])
    ops.decode_trellis.reference(stored, expected[:-3])
    same(found, expected)


def test_levels_that_differ_from_the_computed_ones_in_one_state(isa):
    stored = stored_of(2, 6, 4096, 1, 64, "computed")
    for state in (0, 17, 63):
        for change in (np.float32(1), -stored.levels[state]):
            levels = stored.levels.copy()
            levels[state] += change
            own, out = stored._replace(levels=levels), np.empty(4096, np.float32)
            same(ran(ops.decode_trellis, own, out), ops.decode_trellis.reference(own, np.empty_like(out)))


#: Rows of x, rows, columns and block size; lines are the rows of the matrix or all of it.
PRODUCTS = [
    (1, 5, 64, 64),
    (2, 3, 4104, 24),
    (3, 7, 8, 4),
    (0, 2, 8, 8),
    (3, 33, 256, 32),
    (compiled.FEW_ROWS, 17, 160, 32),
    (4, 9, 600, 300),
    (1, 3, 2400, 800),
    (2, 40, 2048 + 96, 32),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_products_of_few_rows_are_exact_for_integers(isa, bits):
    rng, levels = np.random.default_rng(bits), (np.arange(4**bits) % 7 - 3).astype(np.float32)
    for batch, rows, columns, size in PRODUCTS:
        for line in (columns, rows * columns):
            stored = stored_of(bits, 2 * bits, line, rows * columns // line, size)
            signs = rng.choice(np.array([-0.5, 0.0, 1, 2], dtype=np.float32), stored.scales.shape)
            stored = stored._replace(scales=signs, levels=levels)
            dense = ops.decode_trellis.reference(stored, np.empty(rows * columns, np.float32)).reshape(rows, columns)
            for dtype in ("float32", "float16", "bfloat16"):
                x = rng.integers(-4, 5, (batch, columns)).astype(DTYPES[dtype])
                out = np.full((batch, rows), 7, dtype=x.dtype)
                ran(ops.matmul_trellis, x, stored, out)
                same(out, (x.astype(np.float32) @ dense.T + np.float32(0)).astype(x.dtype))


@pytest.mark.parametrize("kind", ["table", "computed"])
@pytest.mark.parametrize(("columns", "size"), [(4096, 64), (2080, 32), (1000, 40), (700, 350)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_products_have_the_same_bytes_on_every_instruction_set_and_in_any_company(bits, columns, size, kind):
    require_or_skip("native", loading.status()[0])
    rows = 20
    stored, found = stored_of(bits, 10, columns, rows, size, kind), {}
    x = np.random.default_rng(bits).standard_normal((compiled.FEW_ROWS, columns)).astype(np.float32)
    for name in loading.instruction_sets():
        for batch in range(1, compiled.FEW_ROWS + 1):
            out = np.empty((batch, rows), dtype=np.float32)
            with loading.using(name):
                ran(ops.matmul_trellis, x[:batch], stored, out)
            found[name, batch] = out
    expected = found["baseline", compiled.FEW_ROWS]
    for (_, batch), out in found.items():
        same(out, expected[:batch])
    dense = ops.decode_trellis(stored, np.empty(rows * columns, np.float32)).reshape(rows, columns)
    np.testing.assert_allclose(expected, x.astype(np.float64) @ dense.T.astype(np.float64), atol=2e-3)


def test_threads_change_no_byte(isa):
    w, scales = weights_of("float32", 1001, 140, 64)
    levels, found = computed_levels(6), {}
    x = np.random.default_rng(0).standard_normal((2, 2048)).astype(np.float32)
    matrix = stored_of(2, 10, 2048, 300, 64, "computed")
    for count in (1, 3):
        with on_threads(count):
            packed = ran(ops.encode_trellis, w, scales, None, levels, 2, 64, 1001)
            dense, y = np.empty(300 * 2048, np.float32), np.empty((2, 300), np.float32)
            ran(ops.decode_trellis, matrix, dense)
            ran(ops.matmul_trellis, x, matrix, y)
        found[count] = packed.tobytes() + dense.tobytes() + y.tobytes()
    assert found[1] == found[3]


class TestWhatIsLeftToTheReference:
    W, SCALES = np.ones(64, dtype=np.float32), np.ones(1, dtype=np.float32)

    def chosen(self, levels, bits=2, length=64, block_size=64):
        arguments = self.W, self.SCALES, None, levels, bits, block_size, length
        return ops.encode_trellis.select(*arguments).implementation

    def test_wide_codes_and_other_levels(self):
        assert self.chosen(np.zeros(2**10, np.float32), 5) == "reference"
        assert self.chosen(np.zeros(16, np.float64)) == "reference"
        for states in (8, 17, 2**17):
            assert self.chosen(np.zeros(states, np.float32)) == "reference"

    @pytest.mark.parametrize(("length", "block_size"), [(0, 64), (63, 64), (64, 0), (64, -1)])
    def test_lines_and_blocks_that_do_not_fit(self, length, block_size):
        assert self.chosen(np.zeros(16, np.float32), 2, length, block_size) == "reference"

    @pytest.mark.usefixtures("isa")
    def test_strided_levels_are_copied(self):
        levels = levels_of(5, "table")[::2]
        arguments = self.W, self.SCALES, None, levels, 2, 64, 64
        same(ran(ops.encode_trellis, *arguments), ops.encode_trellis.reference(*arguments))

    def test_blocks_that_continue_in_the_next_row(self):
        stored, x = stored_of(2, 6, 120, 1, 64), np.ones((1, 40), np.float32)
        out = np.empty((1, 3), np.float32)
        assert ops.matmul_trellis.select(x, stored, out).implementation == "reference"
        dense = ops.decode_trellis(stored, np.empty(120, np.float32)).reshape(3, 40)
        np.testing.assert_allclose(ops.matmul_trellis(x, stored, out)[0], dense.sum(1), rtol=1e-4, atol=1e-4)

    def test_results_that_may_not_be_written(self):
        stored, out = stored_of(2, 6, 64, 1, 64), np.zeros(64, np.float32)
        out.flags.writeable = False
        assert ops.decode_trellis.select(stored, out).implementation == "reference"
        with pytest.raises(ValueError, match="read-only"):
            ops.decode_trellis(stored, out)
