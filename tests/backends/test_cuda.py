"""The CUDA kernels give the bytes of the reference: through the backend's own host code, emulated and on a device."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora.backends.cuda import kernel_text as source
from lqlora.backends.cuda import launching as launch
from lqlora.backends.cuda import operations as cuda
from lqlora.backends.cuda import registration as taken
from lqlora.errors import MixedArraysError
from lqlora.testing import check_backend
from lqlora.testing.strategies import formats
from tests.backends.kernels import KERNELS, MATMUL_SAMPLE, TENSOR_SAMPLE
from tests.emulator.cupy_stand_in import CuPyStandIn
from tests.requirements import require_or_skip
from tests.strategies import stored

FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
NARROW = ("float32", "float16", "bfloat16")


def put(cupy, array):
    """Copy an array to the device."""
    return cupy.asarray(array)


def apart(cupy, array, start):
    """Copy an array to the device, ``start`` entries after an address that is aligned to sixteen bytes."""
    padded = np.concatenate([np.zeros(start, array.dtype), array])
    return put(cupy, padded)[start:]


def values(rng, count, dtype, boundaries=()):
    """Draw numbers of all sizes, with zeros of both signs, subnormal numbers and boundaries among them."""
    drawn = rng.standard_normal(count) * 2.0 ** rng.integers(-12, 8)
    special = np.array([0.0, -0.0, 2.0**-140, -(2.0**-140), 2.0**-24, *boundaries])
    mixed = np.where(rng.random(count) < 0.2, rng.choice(special, count), drawn)
    return mixed.astype(dtype)


def codebook(bits):
    return lq.normal_float(bits) if bits > 1 else lq.Codebook(np.array([-1, 1], np.float32))


def draw_schedule(data, cupy):
    cupy.schedule = data.draw(st.sampled_from([0, 1, 7]), label="schedule")


def same(found, expected):
    found = found.get()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


sizes = st.tuples(st.integers(0, 700), st.sampled_from([1, 2, 3, 5, 7, 8, 13, 32, 63, 64, 100, 512, 5000]))
seeds = st.integers(0, 2**32 - 1)


# ---- Each operation -------------------------------------------------------------------------------------------------


@given(data=st.data(), size=sizes, dtype=st.sampled_from(sorted(FLOATS)), seed=seeds, start=st.integers(0, 8))
def test_block_statistics_are_those_of_the_reference(cupy, data, size, dtype, seed, start):
    draw_schedule(data, cupy)
    (count, block_size), rng = size, np.random.default_rng(seed)
    w = values(rng, count, FLOATS[dtype])
    there = apart(cupy, w, start)
    assert ops.block_absmax.select(there, block_size).implementation == "cuda.block_absmax"
    same(ops.block_absmax(there, block_size), ops.block_absmax.reference(w, block_size))
    for found, expected in zip(
        ops.block_extremes(there, block_size), ops.block_extremes.reference(w, block_size), strict=True
    ):
        same(found, expected)


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("block_size", [4096, 4097, 5000, 8192, 10_000, 20_000, 2**40])
def test_parts_of_long_blocks_meet(cupy, block_size, dtype):
    w = values(np.random.default_rng(block_size), 20_003, FLOATS[dtype])
    same(ops.block_absmax(put(cupy, w), block_size), ops.block_absmax.reference(w, block_size))
    low, high = ops.block_extremes(put(cupy, -abs(w)), block_size)
    same(low, -ops.block_absmax.reference(w, block_size))
    assert not high.get().any()


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("block_size", [1, 8, 64, 9000])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_makes_the_statistics_of_its_block_nan(cupy, block_size, dtype, sign):
    w = np.random.default_rng(0).standard_normal(9001).astype(FLOATS[dtype])
    w[[5, 130]] = np.inf
    w[130] = np.copysign(np.nan, sign)
    found = ops.block_absmax(put(cupy, w), block_size).get()
    low, high = (array.get() for array in ops.block_extremes(put(cupy, w), block_size))
    expected = np.isnan(ops.block_absmax.reference(w, block_size))
    assert expected.any()
    for statistic in (found, low, high):
        assert (np.isnan(statistic) == expected).all()


@given(
    data=st.data(),
    size=sizes,
    bits=st.integers(1, 8),
    dtype=st.sampled_from(sorted(FLOATS)),
    seed=seeds,
    start=st.integers(0, 8),
    affine=st.booleans(),
)
def test_packed_codes_are_those_of_the_reference(cupy, data, size, bits, dtype, seed, start, affine):
    draw_schedule(data, cupy)
    (count, block_size), rng = size, np.random.default_rng(seed)
    boundaries = codebook(bits).boundaries if not affine else lq.affine(max(bits, 2)).boundaries[: 2**bits - 1]
    blocks = -(-count // block_size)
    w = values(rng, count, FLOATS[dtype], boundaries)
    wide = np.float64 if dtype == "float64" else np.float32
    scales = (rng.choice([0.0, 1.0, -1.0, 0.5, 3.0], blocks) * 2.0 ** rng.integers(-3, 3, blocks)).astype(wide)
    near = np.flatnonzero(rng.random(count) < 0.4)
    at = (rng.choice(boundaries, len(near)) * scales[near // block_size]).astype(wide)
    w[near] = np.nextafter(at, rng.choice(np.array([-9e9, 9e9], wide), len(near))).astype(w.dtype)
    zeros = rng.integers(0, 2**bits, blocks).astype(np.uint8) if affine else None
    arguments = (apart(cupy, w, start), put(cupy, scales), None if zeros is None else put(cupy, zeros), boundaries)
    assert ops.encode_packed.select(*arguments, bits, block_size).implementation == "cuda.encode_packed"
    expected = ops.encode_packed.reference(w, scales, zeros, boundaries, bits, block_size)
    same(ops.encode_packed(*arguments, bits, block_size), expected)


@given(
    data=st.data(),
    size=sizes,
    bits=st.integers(1, 8),
    dtype=st.sampled_from(NARROW),
    seed=seeds,
    start=st.integers(0, 8),
    affine=st.booleans(),
)
def test_decoded_weights_are_those_of_the_reference(cupy, data, size, bits, dtype, seed, start, affine):
    draw_schedule(data, cupy)
    (count, block_size), rng = size, np.random.default_rng(seed)
    blocks = -(-count // block_size)
    levels = codebook(bits).levels if not affine else np.arange(2**bits, dtype=np.float32)
    packed = rng.integers(0, 256, ops.packed_size(count, bits)).astype(np.uint8)
    scales = (rng.standard_normal(blocks) * 2.0 ** rng.integers(-30, 16, blocks)).astype(np.float32)
    zeros = rng.integers(0, 2**bits, blocks).astype(np.uint8) if affine else None
    out = apart(cupy, np.zeros(count, FLOATS[dtype]), start)
    arguments = (apart(cupy, packed, start), put(cupy, scales), None if zeros is None else put(cupy, zeros), levels)
    assert ops.decode.select(ops.PackedBlocks(*arguments, bits, block_size), out).implementation == "cuda.decode"
    expected = np.empty(count, FLOATS[dtype])
    ops.decode.reference(ops.PackedBlocks(packed, scales, zeros, levels, bits, block_size), expected)
    assert ops.decode(ops.PackedBlocks(*arguments, bits, block_size), out) is out
    same(out, expected)


@given(data=st.data(), count=st.integers(0, 700), bits=st.integers(1, 8), seed=seeds, start=st.integers(0, 8))
def test_codes_are_packed_and_unpacked_as_by_the_reference(cupy, data, count, bits, seed, start):
    draw_schedule(data, cupy)
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    there = apart(cupy, codes, start)
    packed = ops.pack_codes(there, bits)
    same(packed, ops.pack_codes.reference(codes, bits))
    same(ops.unpack_codes(packed, bits, count), codes)
    assert ops.pack_codes.select(there, bits).implementation == "cuda.pack_codes"
    assert ops.unpack_codes.select(packed, bits, count).implementation == "cuda.unpack_codes"


@given(data=st.data(), count=st.integers(0, 700), length=st.integers(0, 255), seed=seeds, dtype=st.sampled_from("fd"))
def test_nearest_codes_are_those_of_the_reference(cupy, data, count, length, seed, dtype):
    draw_schedule(data, cupy)
    rng = np.random.default_rng(seed)
    boundaries = np.sort(rng.standard_normal(length)).astype(np.float32)
    near = np.concatenate([boundaries, [0.0]])
    found = values(rng, count, np.dtype(dtype), near)
    found[:2] = [np.inf, -np.inf][: len(found)]
    expected = np.searchsorted(boundaries, found, side="left").astype(np.uint8)
    same(ops.nearest_codes(put(cupy, found), boundaries), expected)
    same(ops.nearest_codes(put(cupy, found.reshape(-1, 1)), boundaries), expected.reshape(-1, 1))


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("bits", range(1, 9))
def test_threads_go_on_beyond_the_largest_grid(cupy, bits):
    count, block_size = 9_005, 24
    rng, book = np.random.default_rng(bits), codebook(bits)
    for dtype in FLOATS.values():
        w = values(rng, count, dtype)
        scales = ops.block_absmax(put(cupy, w), block_size)
        same(scales, ops.block_absmax.reference(w, block_size))
        packed = ops.encode_packed(put(cupy, w), scales, None, book.boundaries, bits, block_size)
        same(packed, ops.encode_packed.reference(w, scales.get(), None, book.boundaries, bits, block_size))
        codes = ops.unpack_codes(packed, bits, count)
        same(codes, ops.unpack_codes.reference(packed.get(), bits, count))
        same(ops.pack_codes(codes, bits), packed.get())
    for name in NARROW:
        own = scales.get().astype(np.float32)
        out, expected = put(cupy, np.zeros(count, FLOATS[name])), np.zeros(count, FLOATS[name])
        ops.decode(ops.PackedBlocks(packed, put(cupy, own), None, book.levels, bits, block_size), out)
        with np.errstate(over="ignore"):
            ops.decode.reference(ops.PackedBlocks(packed.get(), own, None, book.levels, bits, block_size), expected)
        same(out, expected)


# ---- Products -------------------------------------------------------------------------------------------------------


#: Numbers of rows of inputs for a kernel, by the number that its name ends with.
SHARES = {0: (5, 16), 1: (1, 1), 4: (2, 4), 16: (5, 16)}


def product_case(rng, kernel, rows, columns, block_size, affine):
    """Return arguments of a product whose sums are all integers that every dtype represents exactly."""
    bits, dtype, *most = kernel.partition("<")[2].removesuffix(">").split(", ")
    bits, fewest, most = int(bits), *SHARES[int(most[0]) if most else 0]
    name = {"float": "float32", "Float16": "float16", "BFloat16": "bfloat16"}[dtype]
    inputs = int(rng.integers(fewest, most + 1))
    levels = (np.arange(2**bits) % 4 - (0 if affine else 2)).astype(np.float32)
    blocks = -(-rows * columns // block_size)
    codes = rng.integers(0, 2**bits, rows * columns).astype(np.uint8)
    scales = rng.choice([0.0, 1.0, -1.0, 2.0], blocks).astype(np.float32)
    zeros = rng.integers(0, 3, blocks).astype(np.uint8) if affine else None
    x = np.zeros((inputs, columns))
    for row in x:  # a few ones, so that sums stay small
        row[rng.choice(columns, 8, replace=False)] = rng.choice([-1.0, 1.0], 8)
    weights = np.empty(rows * columns, np.float32)
    packed = ops.pack_codes.reference(codes, bits)
    ops.decode.reference(ops.PackedBlocks(packed, scales, zeros, levels, bits, block_size), weights)
    expected = x @ weights.reshape(rows, columns).T.astype(np.float64)
    return x.astype(FLOATS[name]), packed, scales, zeros, levels, bits, block_size, expected.astype(FLOATS[name])


def check_product(cupy, kernel, case):
    x, packed, scales, zeros, levels, bits, block_size, expected = case
    x, packed, scales, zeros = (None if array is None else put(cupy, array) for array in (x, packed, scales, zeros))
    out = put(cupy, np.full_like(expected, np.nan))
    arguments = x, ops.PackedBlocks(packed, scales, zeros, levels, bits, block_size), out
    assert ops.matmul_packed.select(*arguments).implementation == "cuda.matmul_packed"
    assert ops.matmul_packed(*arguments) is out
    if isinstance(cupy, CuPyStandIn):
        assert cupy.launched[-1][0] == kernel
    assert out.get().astype(np.float64).tolist() == expected.astype(np.float64).tolist()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", [*MATMUL_SAMPLE, *TENSOR_SAMPLE])
@given(
    data=st.data(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 70),
    block_size=st.sampled_from([1, 5, 8, 24, 64, 5000]),
    seed=seeds,
    affine=st.booleans(),
)
def test_products_of_integers_are_exact(emulated, kernel, data, rows, groups, block_size, seed, affine):
    draw_schedule(data, emulated)
    check_product(
        emulated, kernel, product_case(np.random.default_rng(seed), kernel, rows, 8 * groups, block_size, affine)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [*KERNELS["matmul"], *KERNELS["tensor"]])
def test_products_are_exact_for_all_bits_types_and_numbers_of_inputs(cupy, kernel):
    for seed, (rows, columns) in enumerate([(1, 8), (37, 256), (8, 1032)]):
        check_product(cupy, kernel, product_case(np.random.default_rng(seed), kernel, rows, columns, 40, seed % 2 == 0))


@pytest.mark.parametrize("kernel", [*MATMUL_SAMPLE, *TENSOR_SAMPLE])
def test_products_of_other_numbers_are_close(emulated, kernel):
    rng = np.random.default_rng(0)
    x, packed, scales, zeros, _, bits, block_size, expected = product_case(rng, kernel, 20, 512, 64, affine=False)
    x, levels = rng.standard_normal(x.shape).astype(x.dtype), codebook(bits).levels
    weights = np.empty(20 * 512, np.float32)
    ops.decode.reference(ops.PackedBlocks(packed, scales, zeros, levels, bits, block_size), weights)
    wide, weights = x.astype(np.float64), weights.reshape(20, 512).astype(np.float64)
    out = put(emulated, np.zeros_like(expected))
    ops.matmul_packed(
        put(emulated, x),
        ops.PackedBlocks(put(emulated, packed), put(emulated, scales), None, levels, bits, block_size),
        out,
    )
    sums = abs(wide) @ abs(weights).T
    bound = float(ml_dtypes.finfo(x.dtype).eps) * abs(wide @ weights.T) + 512 * 2.0**-24 * sums
    if kernel in TENSOR_SAMPLE:  # weights are rounded too
        bound += float(ml_dtypes.finfo(x.dtype).eps) / 2 * sums
    assert (abs(out.get().astype(np.float64) - wide @ weights.T) <= bound).all()


@pytest.mark.parametrize("kernel", [*MATMUL_SAMPLE, *TENSOR_SAMPLE])
@pytest.mark.parametrize("columns", [64, 72])
def test_infinite_inputs_reach_their_own_rows_only(cupy, kernel, columns):
    x, *stored, levels, bits, block_size, expected = product_case(
        np.random.default_rng(0), kernel, 20, columns, 64, affine=False
    )
    x[0, 0], x[-1, 7] = np.inf, -np.inf
    arguments = (*stored, np.abs(levels) + 1, bits, block_size)
    with np.errstate(invalid="ignore"):
        expected = ops.matmul_packed.reference(x, ops.PackedBlocks(*arguments), np.zeros_like(expected))
    arrays = [None if array is None else put(cupy, array) for array in stored]
    found = ops.matmul_packed(
        put(cupy, x),
        ops.PackedBlocks(*arrays, np.abs(levels) + 1, bits, block_size),
        put(cupy, np.zeros_like(expected)),
    )
    np.testing.assert_array_equal(found.get().astype(np.float64), expected.astype(np.float64))


# ---- Whole arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@given(fmt=formats(), rows=st.integers(1, 20), columns=st.integers(1, 40), seed=seeds)
def test_quantization_stores_the_bytes_of_numpy(emulated, fmt, rows, columns, seed):
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    here, there = lq.quantize(w, fmt), lq.quantize(put(emulated, w), fmt)
    assert stored(there) == stored(here)
    same(lq.dequantize(there), lq.dequantize(here))


@pytest.mark.parametrize("name", ["nf4/64", "nf3/64:u8/256:float32", "affine3/48", "nf8/16:float16"])
def test_quantization_of_both_kinds_of_device_is_that_of_numpy(cupy, name):
    fmt = lq.BlockFormat.parse(name)
    w = np.random.default_rng(0).standard_normal((50, 96)).astype(np.float32)
    here, there = lq.quantize(w, fmt), lq.quantize(put(cupy, w), fmt)
    assert stored(there) == stored(here)
    same(lq.dequantize(there), lq.dequantize(here))


@pytest.mark.slow
def test_the_suite_for_backends_finds_nothing(cupy):
    report = check_backend("cupy", max_examples=4)
    assert report.passed, str(report)


# ---- What is taken, and how it is launched --------------------------------------------------------------------------


def typical(cupy):
    """Return flat arguments by operation."""
    rng = np.random.default_rng(0)
    w, scales = rng.standard_normal(1000).astype(np.float32), np.ones(16, np.float32)
    codes = put(cupy, rng.integers(0, 16, 1000).astype(np.uint8))
    packed, scales, w = ops.pack_codes(codes, 4), put(cupy, scales), put(cupy, w)
    return {
        "block_absmax": (w, 64),
        "block_extremes": (w, 64),
        "nearest_codes": (w, lq.NF4.boundaries),
        "encode_packed": (w, scales, None, lq.NF4.boundaries, 4, 64),
        "decode": (packed, scales, None, lq.NF4.levels, 4, 64, cupy.empty(1000, dtype="float32")),
        "pack_codes": (codes, 4),
        "unpack_codes": (packed, 4, 1000),
    }


def explained(name, *flat):
    """Return the implementation that a call with some flat arguments would run."""
    return lq.backends.explain(name, *getattr(ops, name).arguments.unflatten(flat)).implementation


@pytest.mark.parametrize(
    "name", ["block_absmax", "block_extremes", "nearest_codes", "encode_packed", "decode", "pack_codes", "unpack_codes"]
)
def test_typical_arguments_run_a_kernel_that_changes_none_of_them(cupy, name):
    arguments = typical(cupy)[name]
    read = [a for a in (arguments[:-1] if name == "decode" else arguments) if isinstance(a, cupy.ndarray)]
    before = [array.get().tobytes() for array in read]
    assert explained(name, *arguments) == f"cuda.{name}"
    getattr(ops, name)(*getattr(ops, name).arguments.unflatten(arguments))
    assert [array.get().tobytes() for array in read] == before


@pytest.mark.parametrize("name", ["block_absmax", "encode_packed", "decode", "pack_codes", "unpack_codes"])
def test_arrays_that_lie_apart_are_left_to_the_reference(cupy, name):
    first, *rest = typical(cupy)[name]
    assert explained(name, first[::-1], *rest) == "reference"


def test_wrong_dtypes_shapes_and_sizes_are_left_to_the_reference(emulated):
    given = typical(emulated)
    w, scales, _, boundaries, bits, size = given["encode_packed"]
    packed, *_, out = given["decode"]
    declined = [
        ("block_absmax", (w.reshape(10, 100), 64)),
        ("block_absmax", (w.astype(np.int32), 64)),
        ("nearest_codes", (w.astype(np.float16), boundaries)),
        ("encode_packed", (w, scales[:15], None, boundaries, bits, size)),
        ("encode_packed", (w, scales.astype(np.float64), None, boundaries, bits, size)),
        ("encode_packed", (w, scales, None, boundaries, 3, size)),
        ("encode_packed", (w, scales, scales, boundaries, bits, size)),
        ("decode", (packed[:-1], scales, None, lq.NF4.levels, bits, size, out)),
        ("decode", (packed, scales, None, lq.NF4.levels, bits, size, out.astype(np.float64))),
        ("decode", (packed, scales, None, lq.NF4.levels, 3, size, out)),
        ("pack_codes", (w, 4)),
        ("unpack_codes", (packed, 4, 997)),
    ]
    for name, arguments in declined:
        assert explained(name, *arguments) == "reference", (name, arguments)


@pytest.mark.parametrize(("inputs", "columns"), [(17, 64), (1, 60), (0, 64), (1, 0)])
def test_products_of_many_rows_or_of_parts_of_groups_are_left_to_the_reference(emulated, inputs, columns):
    x, out = emulated.empty((inputs, columns), dtype="float32"), emulated.empty((inputs, 4), dtype="float32")
    packed = emulated.empty(ops.packed_size(4 * columns, 4), dtype="uint8")
    scales = emulated.empty(-(-4 * columns // 64), dtype="float32")
    stored = ops.PackedBlocks(packed, scales, None, lq.NF4.levels, 4, 64)
    found = lq.backends.explain("matmul_packed", x, stored, out)
    assert found.implementation == "reference"


def test_devices_without_units_for_matrices_decode_the_weight_first(emulated, monkeypatch):
    kernel = TENSOR_SAMPLE[0]
    x, packed, scales, zeros, levels, bits, block_size, expected = product_case(
        np.random.default_rng(0), kernel, 20, 64, 64, affine=False
    )
    x, packed, scales = (put(emulated, array) for array in (x, packed, scales))
    stored = ops.PackedBlocks(packed, scales, zeros, levels, bits, block_size)
    for own, last in ((80, kernel), (75, "decode<4, Float16>")):
        monkeypatch.setattr(cuda, "capability", lambda _, own=own: own)
        emulated.launched.clear()
        found = ops.matmul_packed(x, stored, put(emulated, np.zeros_like(expected)))
        assert emulated.launched[-1][0] == last
        assert found.get().tolist() == expected.tolist()


def test_arrays_of_two_libraries_are_refused(cupy):
    w, _, zeros, boundaries, bits, size = typical(cupy)["encode_packed"]
    with pytest.raises(MixedArraysError, match="cupy and numpy"):
        ops.encode_packed(w, np.ones(16, np.float32), zeros, boundaries, bits, size)


def test_nothing_is_launched_for_nothing(emulated):
    emulated.launched.clear()
    empty = emulated.empty(0, dtype="float32")
    assert ops.block_absmax(empty, 64).shape == (0,)
    assert ops.encode_packed(empty, empty, None, lq.NF4.boundaries, 4, 64).shape == (0,)
    assert emulated.launched == []


def test_kernels_are_compiled_without_fused_products_and_fast_divisions(emulated):
    ops.block_absmax(typical(emulated)["block_absmax"][0], 64)
    assert emulated.options == {(*source.OPTIONS, "--gpu-architecture=sm_90")}
    assert {"--fmad=false", "--prec-div=true", "--ftz=false"} <= set(source.OPTIONS)


def test_tables_are_copied_to_the_device_once(emulated):
    first = launch.table(0, lq.NF4.levels, 16, 0.0)
    assert launch.table(0, lq.NF4.levels, 16, 0.0) is first
    assert launch.table(0, lq.NF4.boundaries, 16, np.inf).get()[-1] == np.inf


def test_of_many_tables_all_are_given_up_when_the_device_is_done_with_them(emulated, monkeypatch):
    done, most = [], launch._MOST_TABLES
    monkeypatch.setattr(launch, "_tables", {})
    monkeypatch.setattr(launch, "_synchronize", lambda _, devices: done.append((devices, len(launch._tables))))
    for value in range(2 * most + 2):
        table = launch.table(0, np.full(3, value, np.float32), 4, 0.0)
        assert table.get().tolist() == [value, value, value, 0]
    assert done == [({0}, most), ({0}, most)]
    assert len(launch._tables) == 2


def test_without_a_device_the_reference_runs(emulated, monkeypatch):
    monkeypatch.setattr(emulated.cuda, "is_available", lambda: False)
    taken.kernels_run.cache_clear()
    w = put(emulated, np.ones(100, np.float32))
    assert lq.backends.explain("block_absmax", w, 64).implementation == "reference"
    assert ops.block_absmax(w, 64).get().tolist() == [1.0, 1.0]
    taken.kernels_run.cache_clear()


# ---- Torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("bits", [3, 4])
def test_kernels_run_on_the_memory_of_tensors(on_tensors, torch, dtype, bits):
    book = codebook(bits)
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    scales = on_tensors.block_absmax(torch.nn.Parameter(w), 64)
    assert torch.equal(scales, ops.block_absmax.reference(w, 64))
    arguments = (w, scales, None, book.boundaries, bits, 64)
    packed = on_tensors.encode_packed(*arguments)
    assert torch.equal(packed, ops.encode_packed.reference(*arguments))
    if dtype == "float64":
        return
    out, expected = torch.zeros_like(w), torch.zeros_like(w)
    arguments = (packed, scales, None, book.levels, bits, 64)
    assert on_tensors.decode(ops.PackedBlocks(*arguments), out) is out
    assert torch.equal(out, ops.decode.reference(ops.PackedBlocks(*arguments), expected))


def test_tensors_elsewhere_are_not_taken(torch, emulated):
    for device in ("cpu", "meta"):
        found = ops.block_absmax.select(torch.zeros(8, device=device), 4)
        assert not found.implementation.startswith("cuda")
        assert "cuda.block_absmax declined" in found.reason or found.implementation != "reference"


@pytest.mark.gpu
def test_tensors_on_a_device_take_the_kernels(torch):
    require_or_skip("cupy", torch.cuda.is_available() and taken.kernels_run())
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    fmt = lq.BlockFormat(lq.NF4)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = lq.quantize(w.cuda(), fmt)
        assert lq.backends.explain("block_absmax", w.cuda().reshape(-1), 64).implementation == "cuda.block_absmax"
        assert stored(there) == stored(lq.quantize(w, fmt))
