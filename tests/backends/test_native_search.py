"""The compiled search for scales, and the errors of rounding, against their references: the same bytes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora import ops
from lqlora._threads import on_threads
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.backends.compiled import BOOKS, ran, same, zeros_of


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


@pytest.mark.sampled(60)
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


#: Boundaries and ratios that occur in no codebook and no search of this package.
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
