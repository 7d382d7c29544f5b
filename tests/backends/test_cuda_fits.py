"""The CUDA kernels of fits return the bytes of the reference: searches for ratios, and sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora.backends.cuda.fits import LONGEST_SEARCH
from lqlora.testing.strategies import formats
from tests.backends.test_cuda import draw_schedule, put, same
from tests.strategies import stored

seeds = st.integers(0, 2**32 - 1)

#: Lengths around the entries in registers of a thread, a warp and a block, and around multiples of the terms of a pass.
LONG = [256, 257, 300, 511, 512, 1000, 2047, 2049, 4095, 4096, 4097, 4111, 5000, 20_001]


def apart(cupy, array, start):
    """Copy rows to the device, ``start`` entries after an address that is aligned to sixteen bytes."""
    padded = np.concatenate([np.zeros(start, array.dtype), array.reshape(-1)])
    return put(cupy, padded)[start:].reshape(array.shape)


def terms_of(rng, shape, dtype):
    """Return terms of all sizes and zeros. Terms nearly cancel, so that another order of additions changes the sum."""
    drawn = rng.standard_normal(shape) ** 5 * 2.0 ** rng.integers(-12, 8, shape)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    special = rng.choice(np.array([0.0, -0.0, tiny, -5 * tiny, 1e30, -1e30]), shape)
    return np.where(rng.random(shape) < 0.3, special, drawn).astype(dtype)


# ---- Sums of rows ---------------------------------------------------------------------------------------------------


def check_row_sums(cupy, rows, start=0):
    there = apart(cupy, rows, start)
    assert ops.row_sums.select(there).implementation == "cuda.row_sums"
    same(ops.row_sums(there), ops.row_sums.reference(rows))


@given(
    data=st.data(),
    shape=st.tuples(st.integers(0, 70), st.integers(1, 300)),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=seeds,
    start=st.integers(0, 3),
)
def test_sums_of_rows_are_those_of_the_reference(cupy, data, shape, dtype, seed, start):
    draw_schedule(data, cupy)
    check_row_sums(cupy, terms_of(np.random.default_rng(seed), shape, dtype), start)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", LONG)
def test_long_rows_are_halved_in_passes(cupy, length, dtype):
    check_row_sums(cupy, terms_of(np.random.default_rng(length), (3, length), dtype))


def test_one_row_may_be_all_there_is(cupy):
    check_row_sums(cupy, terms_of(np.random.default_rng(0), (1, 100_003), np.float64))


def test_zeros_keep_their_sign(cupy):
    for length in (1, 5, 8, 100, 3000):
        check_row_sums(cupy, np.full((2, length), -0.0, np.float32))


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("length", [3, 48, 64, 700, 4099])
def test_teams_go_on_beyond_the_largest_grid(cupy, length):
    rows = terms_of(np.random.default_rng(length), (5 + 30_000 // length, length), np.float32)
    check_row_sums(cupy, rows)


# ---- Searches for ratios --------------------------------------------------------------------------------------------


def codebook(rng, bits):
    return lq.Codebook(np.unique(rng.standard_normal(int(rng.integers(2 ** (bits - 1) + 1, 2**bits + 1)))))


def search(rng, rows, length, book, *, weighted, affine, grid=(1.0, 0.7, 0.9, 1.1, -1.0)):
    """Return arguments of a search: rows at or next to boundaries times a ratio, zeros, and subnormal numbers."""
    entries = np.clip(rng.standard_normal((rows, length)), -4, 4).astype(np.float32)
    near = rng.random(entries.shape) < 0.4
    at = rng.choice(book.boundaries, entries.shape) * rng.choice(np.asarray(grid, np.float32), entries.shape)
    beside = np.nextafter(at, rng.choice(np.array([-9, 9], np.float32), at.shape))
    entries = np.where(near, np.where(rng.random(at.shape) < 0.5, at, beside), entries).astype(np.float32)
    entries[rng.random(entries.shape) < 0.1] = 0.0
    entries[rng.random(rows) < 0.1] *= np.float32(2.0**-140)
    weights = rng.choice(np.array([0.0, 1.0, 2.0**-140, 0.3], np.float32), entries.shape) if weighted else None
    zeros = rng.integers(0, len(book), (rows, 1)).astype(np.float32) if affine else None
    return entries, weights, book.levels, book.boundaries, zeros, grid, int(rng.integers(0, 4))


def check_search(cupy, arguments, start=0):
    entries, weights, levels, boundaries, zeros, grid, refinements = arguments
    there = (apart(cupy, entries, start), None if weights is None else apart(cupy, weights, start))
    others = (levels, boundaries, None if zeros is None else put(cupy, zeros), grid, refinements)
    assert ops.best_ratios.select(*there, *others).implementation == "cuda.best_ratios"
    same(ops.best_ratios(*there, *others), ops.best_ratios.reference(*arguments))


@given(
    data=st.data(),
    shape=st.tuples(st.integers(0, 40), st.one_of(st.sampled_from([8, 16, 32, 64, 128]), st.integers(1, 150))),
    bits=st.integers(1, 8),
    weighted=st.booleans(),
    affine=st.booleans(),
    seed=seeds,
    start=st.integers(0, 3),
)
def test_best_ratios_are_those_of_the_reference(cupy, data, shape, bits, weighted, affine, seed, start):
    draw_schedule(data, cupy)
    rng = np.random.default_rng(seed)
    book = lq.affine(max(bits, 2)) if affine else codebook(rng, bits)
    check_search(cupy, search(rng, *shape, book, weighted=weighted, affine=affine), start)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("length", [length for length in LONG if length <= LONGEST_SEARCH])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_rows_are_searched_by_several_warps(cupy, length, weighted):
    rng = np.random.default_rng(length)
    check_search(cupy, search(rng, 5, length, lq.normal_float(4), weighted=weighted, affine=False))


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("length", [16, 60, 64, 300])
def test_searches_go_on_beyond_the_largest_grid(cupy, length):
    rng = np.random.default_rng(length)
    rows = 9 + 10_000 // length
    check_search(cupy, search(rng, rows, length, lq.normal_float(3), weighted=True, affine=False))


def test_of_equal_errors_the_first_ratio_is_kept(cupy):
    rows = put(cupy, np.zeros((3, 20), np.float32))
    found = ops.best_ratios(rows, None, lq.NF4.levels, lq.NF4.boundaries, None, (0.5, 1.0, -0.5), 2)
    assert found.get().tolist() == [0.5] * 3


def nearly_equal(rng, length):
    """Return arguments of a search near the minimum of the error, where the last bits of every rounding decide."""
    row, weights = rng.standard_normal(length).astype(np.float32), rng.random(length, dtype=np.float32)
    best = np.float32(1)
    for _ in range(20):  # until the codes stay
        values = lq.NF4.levels[np.searchsorted(lq.NF4.boundaries, row / best)].astype(np.float64)
        best = np.float32((weights * values * row).sum() / (weights * values * values).sum())
    order = np.stack([rng.permutation(length) for _ in range(30)])
    grid = [float(best) * (1 + step * 2.0**-23) for step in range(-8, 9)]
    return row[order], weights[order], lq.NF4.levels, lq.NF4.boundaries, None, grid, 0


@pytest.mark.parametrize("length", [13, 64, 100, 700])
def test_every_rounding_of_an_error_is_that_of_the_reference(cupy, length):
    arguments = nearly_equal(np.random.default_rng(length), length)
    check_search(cupy, arguments)
    assert len(set(ops.best_ratios.reference(*arguments).tolist())) > 1


@pytest.mark.filterwarnings("ignore:overflow")
def test_errors_that_overflow_are_no_better(cupy):
    rows = np.float32(1e20) * np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (3, 13))
    tables = np.array([-1, 1], np.float32), np.zeros(1, np.float32)
    check_search(cupy, (rows, None, *tables, None, (1.0, 1e20, 1e38), 1))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("affine", [False, True])
def test_the_levels_of_every_number_of_bits_are_searched(cupy, bits, affine):
    if affine and bits == 1:
        pytest.skip("no affine format has one bit")
    rng = np.random.default_rng(bits)
    book = lq.affine(bits) if affine else codebook(rng, bits)
    check_search(cupy, search(rng, 30, 64, book, weighted=False, affine=affine))


# ---- Sums of bins ---------------------------------------------------------------------------------------------------


def check_bin_sums(cupy, terms, bins, count):
    there = put(cupy, terms), put(cupy, bins), count
    assert ops.bin_sums.select(*there).implementation == "cuda.bin_sums"
    same(ops.bin_sums(*there), ops.bin_sums.reference(terms, bins, count))


@given(data=st.data(), terms=st.integers(2, 700), bins=st.integers(1, 40), exponent=st.integers(-1100, 900), seed=seeds)
def test_sums_of_bins_are_those_of_the_reference(cupy, data, terms, bins, exponent, seed):
    draw_schedule(data, cupy)
    rng = np.random.default_rng(seed)
    drawn = np.ldexp(rng.standard_normal(terms) * 2.0 ** rng.integers(-60, 60, terms), exponent)
    drawn[rng.random(terms) < 0.1] = 0.0
    check_bin_sums(cupy, drawn, rng.integers(-1, bins + 1, terms), bins)  # bins that do not exist get nothing


@pytest.mark.parametrize("bins", [255, 256, 257, 2047, 2048, 2049, 5000])
def test_many_bins_have_fewer_copies_or_none(cupy, bins):
    rng = np.random.default_rng(bins)
    check_bin_sums(cupy, rng.standard_normal(9000), rng.integers(0, bins, 9000), bins)


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 1000])
def test_no_bit_of_the_promised_52_is_lost(cupy, terms):
    largest = 2 ** (52 - (terms - 1).bit_length()) - 1
    numbers = np.array([largest, *[1] * (terms - 1)], dtype=np.float64)
    check_bin_sums(cupy, numbers, np.zeros(terms, np.int64), 1)
    check_bin_sums(cupy, -numbers, np.zeros(terms, np.int64), 1)


def test_halves_of_a_unit_go_to_the_even_multiple(cupy):
    unit = 2.0**-50  # of three terms, of which the largest is one
    for multiple in (0.5, 1.5, 2.5, -0.5, -1.5, -2.5):
        check_bin_sums(cupy, np.array([1.0, multiple * unit, multiple * unit]), np.array([0, 1, 2]), 3)


def test_zeros_sum_to_zero(cupy):
    check_bin_sums(cupy, np.zeros(100), np.zeros(100, np.int64), 2)


@pytest.mark.usefixtures("few_blocks")
def test_bins_are_summed_beyond_the_largest_grid(cupy):
    rng = np.random.default_rng(0)
    check_bin_sums(cupy, rng.standard_normal(50_000), rng.integers(0, 16, 50_000), 16)


# ---- Sums by level --------------------------------------------------------------------------------------------------


def levels(rng, shape, size, count, *, weighted):
    rows, weights = rng.standard_normal(shape).astype(np.float32), rng.random(shape).astype(np.float32)
    rows[rng.random(shape) < 0.1] = np.float32(2.0**-140)
    importance, ratios = rng.random(shape[0]) ** 4, rng.uniform(-1.5, 1.5, shape[0]).astype(np.float32)
    codes, sets = rng.integers(0, size, shape).astype(np.uint8), rng.integers(0, count, shape[0])
    return rows, weights if weighted else None, importance, ratios, codes, sets, size, count


def check_level_sums(cupy, arguments):
    there = tuple(put(cupy, value) if isinstance(value, np.ndarray) else value for value in arguments)
    assert ops.level_sums.select(*there).implementation == "cuda.level_sums"
    with lq.forced("reference"):
        expected = ops.level_sums(*arguments)
    for found, own in zip(ops.level_sums(*there), expected, strict=True):
        same(found, own)


@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 40), st.integers(2, 100)),
    size=st.integers(1, 20),
    count=st.integers(1, 5),
    weighted=st.booleans(),
    seed=seeds,
)
def test_sums_by_level_are_those_of_the_reference(cupy, data, shape, size, count, weighted, seed):
    draw_schedule(data, cupy)
    check_level_sums(cupy, levels(np.random.default_rng(seed), shape, size, count, weighted=weighted))


@pytest.mark.parametrize(("size", "count"), [(256, 1), (256, 4), (16, 64), (16, 65), (16, 300), (7, 500)])
def test_sums_of_many_sets_of_levels_are_those_of_the_reference(cupy, size, count):
    rng = np.random.default_rng(size + count)
    check_level_sums(cupy, levels(rng, (600, 24), size, count, weighted=True))


def test_codes_and_sets_that_do_not_exist_are_left_out_as_by_the_reference(cupy):
    rows, weights, importance, ratios, codes, sets, size, count = levels(
        np.random.default_rng(0), (50, 20), 5, 3, weighted=True
    )
    codes[0, :3], sets[4:7] = 255, [-1, 3, -(2**40)]
    check_level_sums(cupy, (rows, weights, importance, ratios, codes, sets, size, count))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sums_that_overflow_are_those_of_the_reference(cupy):
    importance = np.array([1e300, 1.0])
    rows, ratios = np.full((2, 3), 1e30, np.float32), np.ones(2, np.float32)
    arguments = (
        rows,
        None,
        importance,
        ratios,
        np.array([[0, 1, 1], [2, 2, 2]], np.uint8),
        np.zeros(2, np.int64),
        3,
        1,
    )
    check_level_sums(cupy, arguments)
    terms, bins = np.array([np.inf, 1.0, 2.0]), np.array([0, 1, 1])
    check_bin_sums(cupy, terms, bins, 2)


# ---- Whole arrays ---------------------------------------------------------------------------------------------------


def quantized_alike(cupy, w, fmt, fit, weights):
    here = lq.quantize(w, fmt, fit=fit, weights=weights)
    own = None if weights is None else put(cupy, weights)
    there = lq.quantize(put(cupy, w), fmt, fit=fit, weights=own)
    assert stored(there) == stored(here)
    same(lq.dequantize(there), lq.dequantize(here))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("fit", ["scale", "levels+scale"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("text", ["nf4/64", "nf3/48:u8/256:float32", "bof4s-64/16", "nf2/100"])
def test_fits_store_the_bytes_of_numpy(cupy, text, fit, weighted):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((24, 100)).astype(np.float32)
    w[3] = 0
    weights = rng.random(w.shape).astype(np.float32) if weighted else None
    quantized_alike(cupy, w, lq.BlockFormat.parse(text), fit, weights)


@pytest.mark.parametrize("levels", [1, 5])
def test_levels_of_groups_of_lines_are_those_of_numpy(cupy, levels):
    w = np.random.default_rng(1).standard_normal((20, 64)).astype(np.float32)
    quantized_alike(cupy, w, lq.BlockFormat(lq.normal_float(3), 16, axis=-1, levels=levels), "levels+scale", None)


@pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")
@given(fmt=formats(), rows=st.integers(1, 20), columns=st.integers(1, 40), seed=seeds, weighted=st.booleans())
@settings(max_examples=20)
def test_scales_that_are_searched_are_those_of_numpy(emulated, fmt, rows, columns, seed, weighted):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    weights = rng.random(w.shape).astype(np.float32) if weighted else None
    quantized_alike(emulated, w, fmt, "scale", weights)


# ---- What is taken --------------------------------------------------------------------------------------------------


def typical(cupy):
    rng = np.random.default_rng(0)
    rows, weights, importance, ratios, codes, sets, size, count = levels(rng, (10, 64), 16, 2, weighted=True)
    zeros = put(cupy, np.zeros((10, 1), np.float32))
    rows, weights, importance, ratios, codes, sets = (
        put(cupy, array) for array in (rows, weights, importance, ratios, codes, sets)
    )
    return {
        "row_sums": (rows,),
        "best_ratios": (rows, weights, lq.NF4.levels, lq.NF4.boundaries, zeros, [1.0, 0.9], 2),
        "bin_sums": (importance, sets, 2),
        "level_sums": (rows, weights, importance, ratios, codes, sets, size, count),
    }


NAMES = ["row_sums", "best_ratios", "bin_sums", "level_sums"]


@pytest.mark.parametrize("name", NAMES)
def test_typical_arguments_run_a_kernel_that_changes_none_of_them(cupy, name):
    arguments = typical(cupy)[name]
    read = [value for value in arguments if isinstance(value, cupy.ndarray)]
    before = [array.get().tobytes() for array in read]
    assert lq.backends.explain(name, *arguments).implementation == f"cuda.{name}"
    getattr(ops, name)(*arguments)
    assert [array.get().tobytes() for array in read] == before


@pytest.mark.parametrize("name", NAMES)
def test_arrays_that_lie_apart_are_left_to_the_reference(cupy, name):
    first, *rest = typical(cupy)[name]
    assert lq.backends.explain(name, first[::-1], *rest).implementation == "reference"


def test_wrong_dtypes_shapes_and_sizes_are_left_to_the_reference(emulated):
    given = typical(emulated)
    (rows,) = given["row_sums"]
    _, weights, table, cuts, zeros, grid, steps = given["best_ratios"]
    importance, sets, count = given["bin_sums"]
    _, _, _, ratios, codes, _, size, _ = given["level_sums"]
    long = emulated.empty((1, LONGEST_SEARCH + 1), dtype="float32")
    none = emulated.empty((3, 0), dtype="float32")
    declined = [
        ("row_sums", (rows.astype(np.int32),)),
        ("row_sums", (none,)),
        ("row_sums", (rows.reshape(2, 5, 64),)),
        ("best_ratios", (rows.astype(np.float64), None, table, cuts, None, grid, steps)),
        ("best_ratios", (rows, weights[:9], table, cuts, None, grid, steps)),
        ("best_ratios", (rows, None, table, cuts, zeros.reshape(-1), grid, steps)),
        ("best_ratios", (rows, None, table, cuts[:-1], None, grid, steps)),
        ("best_ratios", (long, None, table, cuts, None, grid, steps)),
        ("best_ratios", (none, None, table, cuts, None, grid, steps)),
        ("bin_sums", (importance[:1], sets[:1], count)),
        ("bin_sums", (importance, sets[:9], count)),
        ("bin_sums", (importance.astype(np.float32), sets, count)),
        ("bin_sums", (importance, sets, 0)),
        ("level_sums", (rows, weights[:9], importance, ratios, codes, sets, size, count)),
        ("level_sums", (rows, weights, importance[:9], ratios, codes, sets, size, count)),
        ("level_sums", (rows, weights, importance, ratios, codes[:9], sets, size, count)),
        ("level_sums", (rows, weights, importance, ratios, codes, sets, size, 0)),
    ]
    for name, arguments in declined:
        assert lq.backends.explain(name, *arguments).implementation == "reference", (name, arguments)


def test_nothing_is_launched_for_no_rows(emulated):
    emulated.launched.clear()
    empty = emulated.empty((0, 64), dtype="float32")
    assert ops.row_sums(empty).shape == (0,)
    assert ops.best_ratios(empty, None, lq.NF4.levels, lq.NF4.boundaries, None, (1.0,), 2).shape == (0,)
    assert emulated.launched == []


def test_fits_run_on_the_memory_of_tensors(on_tensors, torch):
    fits, rng = on_tensors, np.random.default_rng(0)
    arrays = levels(rng, (30, 48), 16, 2, weighted=True)
    tensors = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in arrays]
    for found, expected in zip(fits.level_sums(*tensors), ops.level_sums.reference(*tensors), strict=True):
        assert torch.equal(found, expected)
    rows, weights = tensors[:2]
    assert torch.equal(fits.row_sums(rows), ops.row_sums.reference(rows))
    arguments = (rows, weights, lq.NF4.levels, lq.NF4.boundaries, None, (1.0, 0.8), 2)
    assert torch.equal(fits.best_ratios(*arguments), ops.best_ratios.reference(*arguments))
