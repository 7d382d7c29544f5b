from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import MixedArraysError
from lqlora.ops import PackedBlocks, add_low_rank, low_rank_product, matmul_dense, matmul_packed, pack_codes
from lqlora.ops.matmul import _TILE, _WIDENED
from tests.strategies import host, on, on_device, scale_dtypes

NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def factors(rng):
    shapes = {"x": (2, 3, 8), "y": (2, 3, 5), "lora_A": (4, 8), "lora_B": (5, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.125])
def test_factors_act_like_the_dense_sum(xp, factors, scaling):
    y = add_low_rank(*(on(xp, factors[name]) for name in ("y", "x", "lora_A", "lora_B")), scaling)
    product = scaling * factors["lora_B"].astype(np.float64) @ factors["lora_A"]
    np.testing.assert_allclose(host(y), factors["y"] + factors["x"] @ product.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", ["own", "float32"])
def test_many_narrow_rows_are_widened_a_few_at_a_time(xp, rng, dtype, factor):
    if dtype not in scale_dtypes(xp):
        pytest.skip(f"has no {dtype}")
    wide = _WIDENED // 20  # so that 20 rows are widened at a time, of 21
    shapes = {"y": (3, 7, 5), "x": (3, 7, wide), "lora_A": (4, wide), "lora_B": (5, 4)}
    given = {name: rng.integers(-1, 2, shape).astype(NARROW[dtype]) for name, shape in shapes.items()}
    expected = (
        given["y"] + 0.5 * given["x"].astype(np.float64) @ (given["lora_B"].astype(np.float64) @ given["lora_A"]).T
    )
    if factor == "float32":
        given |= {name: given[name].astype(np.float32) for name in ("lora_A", "lora_B")}
    y = host(add_low_rank(*(on(xp, array) for array in given.values()), 0.5))
    assert y.dtype == NARROW[dtype]
    assert y.tolist() == expected.astype(NARROW[dtype]).tolist()  # sums of integers are exact before they are rounded


def test_low_rank_product(xp, factors):
    product = low_rank_product(on(xp, factors["lora_B"]), on(xp, factors["lora_A"]), 0.5)
    np.testing.assert_allclose(host(product), 0.5 * factors["lora_B"] @ factors["lora_A"], rtol=1e-4, atol=1e-5)
    product = low_rank_product(on(xp, factors["lora_B"]), on(xp, factors["lora_A"]))
    np.testing.assert_allclose(host(product), factors["lora_B"] @ factors["lora_A"], rtol=1e-4, atol=1e-5)


def test_rank_zero_is_a_matrix_of_zeros(xp):
    empty_B, empty_A = on(xp, np.ones((3, 0), dtype=np.float32)), on(xp, np.ones((0, 4), dtype=np.float32))
    assert host(low_rank_product(empty_B, empty_A)).tolist() == np.zeros((3, 4)).tolist()


@pytest.mark.parametrize("position", ["x", "y", "lora_A", "lora_B"])
def test_two_libraries_do_not_mix(factors, position, torch):
    mixed = factors | {position: torch.from_numpy(factors[position])}
    with pytest.raises(MixedArraysError, match="numpy and torch"):
        add_low_rank(mixed["y"], mixed["x"], mixed["lora_A"], mixed["lora_B"], 1.0)


class TestDense:
    def test_rows_times_a_weight(self, xp, factors):
        x, weight = factors["x"][0], factors["lora_A"]
        np.testing.assert_allclose(host(matmul_dense(on(xp, x), on(xp, weight))), x @ weight.T, rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_narrow_rows_are_rounded_once_at_the_end(self, xp, factors, dtype):
        if dtype not in scale_dtypes(xp):
            pytest.skip(f"has no {dtype}")
        x, weight = factors["x"][0].astype(NARROW[dtype]), factors["lora_A"]
        if on_device(on(xp, x)):
            pytest.skip("On a device the weight is rounded too.")
        y = host(matmul_dense(on(xp, x), on(xp, weight)))
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, (x.astype(np.float32) @ weight.T).astype(x.dtype))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_narrow_rows_are_off_by_the_rounding_of_their_dtype(self, xp, rng, dtype):
        # On a device of the weight and of the result, on the host of the result alone.
        if dtype not in scale_dtypes(xp):
            pytest.skip(f"has no {dtype}")
        x, weight = rng.standard_normal((7, 64)).astype(NARROW[dtype]), rng.standard_normal((9, 64)).astype(np.float32)
        y = host(matmul_dense(on(xp, x), on(xp, weight)))
        assert y.dtype == x.dtype
        wide = x.astype(np.float64)
        bound = 2 * float(ml_dtypes.finfo(x.dtype).eps) * (np.abs(wide) @ np.abs(weight).T)
        assert (np.abs(y.astype(np.float64) - wide @ weight.T) <= bound).all()

    def test_wide_rows_stay_wide(self, xp, factors):
        x, weight = factors["x"][0].astype(np.float64) + 1e-12, factors["lora_A"]
        y = host(matmul_dense(on(xp, x), on(xp, weight)))
        np.testing.assert_allclose(y, x @ weight.T.astype(np.float64), rtol=1e-14)


def small_integers(rng, shape):
    """Numbers of few bits: sums of their products are exact, in whatever order they are added."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def packed_weight(rng, rows, columns, bits, block_size, *, zeros):
    """Arguments of matmul_packed between the rows and the result, and the dense weight."""
    blocks = -(-rows * columns // block_size)
    levels = np.arange(2**bits, dtype=np.float32) - 2 ** (bits - 1)
    levels.flags.writeable = False
    codes = rng.integers(0, 2**bits, rows * columns).astype(np.uint8)
    scales = rng.choice(np.array([-0.5, 0.0, 0.25, 1, 2], dtype=np.float32), blocks)
    shifts = rng.integers(0, 2**bits, blocks).astype(np.uint8) if zeros else None
    dense = levels[codes] - (0 if shifts is None else np.repeat(shifts, block_size)[: codes.size].astype(np.float32))
    dense = (dense * np.repeat(scales, block_size)[: codes.size]).reshape(rows, columns)
    return (pack_codes(codes, bits), scales, shifts, levels, bits, block_size), dense


@pytest.mark.sampled(84)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "block_size"),
    [(1, 7, 5, 3), (2, 1, 1, 64), (3, 16, 64, 32), (0, 4, 4, 4), (2, 0, 8, 8), (2, 3, 0, 8), (17, 33, 31, 7)],
)
def test_products_of_integers_are_exact(xp, batch, rows, columns, block_size, bits, zeros):
    rng = np.random.default_rng(bits)
    packed, dense = packed_weight(rng, rows, columns, bits, block_size, zeros=zeros)
    x = small_integers(rng, (batch, columns))
    out = on(xp, np.full((batch, rows), 9, dtype=np.float32))
    moved = [on(xp, part) if isinstance(part, np.ndarray) and part.flags.writeable else part for part in packed]
    y = matmul_packed(on(xp, x), PackedBlocks(*moved), out)
    assert y is out
    np.testing.assert_array_equal(host(y), x @ dense.T)


@pytest.mark.parametrize(("columns", "block_size"), [(1000, 64), (1001, 8), (1024, 4096), (257, 100_000)])
def test_tiles_end_where_they_should(fast_xp, columns, block_size):
    rng, rows = np.random.default_rng(0), 2 * _TILE // columns + 3
    packed, dense = packed_weight(rng, rows, columns, 3, block_size, zeros=False)
    x = small_integers(rng, (2, columns))
    moved = [on(fast_xp, part) if isinstance(part, np.ndarray) and part.flags.writeable else part for part in packed]
    y = matmul_packed(on(fast_xp, x), PackedBlocks(*moved), on(fast_xp, np.empty((2, rows), dtype=np.float32)))
    np.testing.assert_array_equal(host(y), x @ dense.T)


@pytest.mark.sampled(32)
@pytest.mark.parametrize("text", ["nf4/64:float32", "nf3/32@0:float32", "int4/7@-1:float32", "nf4/64:u8/256:float32"])
@pytest.mark.parametrize("fit", ["absmax", "levels+scale"])
@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3)])
def test_every_layout_multiplies_like_its_dense_weight(xp, text, fit, lead):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 40), (*lead, 40)))
    if "int4" in text and fit != "absmax":
        pytest.skip("levels of integers are not fitted")
    made = lq.quantize(w, lq.BlockFormat.parse(text), fit=fit)  # in NumPy: on a strict library fits take long
    arrays = {name: on(xp, array) for name, array in made.to_arrays().items()}
    q = lq.QuantizedArray.from_arrays(arrays, made.format, w.shape)
    y = host(lq.matmul(on(xp, x), q))
    assert (y.shape, y.dtype) == ((*lead, 24), np.float32)
    np.testing.assert_allclose(y, x @ host(lq.dequantize(q)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_low_rank_part_keeps_the_dtype(dtype):
    ones = np.ones((2, 2), dtype=NARROW.get(dtype, dtype))
    found = add_low_rank(ones, ones, ones, ones, 0.5)
    assert found.dtype == ones.dtype
    assert found.astype(float).tolist() == [[3.0, 3.0], [3.0, 3.0]]
