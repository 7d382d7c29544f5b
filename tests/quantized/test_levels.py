"""Levels that are fitted and stored with the array: one set for the whole array, or one for a group of lines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook, affine, normal_float, quantize
from lqlora.codebooks import by_name
from lqlora.errors import FormatError
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.oracles import quantize as oracle
from tests.quantized.cases import block_errors, draw_case, normal, quantized, restored, scales_of
from tests.strategies import host, on, stored

pytestmark = [
    pytest.mark.slow_on_strict,
    pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning"),
]

BOOKS = [book for book in ALL_CODEBOOKS if book.normalization != "affine" and book.bits <= 4]


@given(data=st.data())
@settings(max_examples=20)
def test_codes_are_nearest_to_the_levels_that_are_stored(fast_xp, data):
    w, fmt = draw_case(data, fast_xp, codebooks=BOOKS, fitted=True)
    q = quantized(fast_xp, w, fmt, fit="levels+scale")
    levels, scales = host(q.levels), scales_of(q)
    assert levels.shape == (q.format.level_sets(w.shape), len(fmt.codebook))
    assert (np.diff(levels) >= 0).all()
    assert np.isfinite(levels).all()
    codes = oracle.codes_of(w if w.dtype == np.float64 else w.astype(np.float32), scales, q.format, levels=levels)
    assert stored(q)["codes"] == oracle.pack(codes, fmt.bits)
    assert restored(q).tobytes() == oracle.decode(codes, scales, q.format, w.shape, levels=levels).tobytes()


@pytest.mark.parametrize(
    "text", ["nf2/16", "nf3/16@0", "nf3/16@-1", "bof4s-64/16", "nf3/16:u8/16:float32", "int3/16:d8/16:float32"]
)
def test_the_largest_level_is_one(fast_xp, text):
    q = quantized(fast_xp, normal(32, 48), BlockFormat.parse(text), fit="levels+scale")
    levels = host(q.levels)
    assert np.abs(levels).max(axis=1).tolist() == [1.0] * len(levels)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("lines", [1, 3, 4, 12, 100])
def test_each_group_of_lines_has_levels_of_its_own(axis, lines):
    w = normal(12, 40) * np.geomspace(1e-3, 1e3, 12, dtype=np.float32)[:, None]
    w[3:6] = np.sign(w[3:6])  # two levels are enough for these
    w = w if axis == -1 else np.ascontiguousarray(w.T)
    q = quantize(w, BlockFormat(normal_float(2), 8, axis=axis, levels=lines), fit="levels+scale")
    assert q.levels.shape == (-(-12 // lines), 4)
    rows = w if axis == -1 else w.T
    for index in range(len(q.levels)):
        part = rows[index * lines : (index + 1) * lines]
        alone = quantize(part, BlockFormat(normal_float(2), 8, axis=-1, levels="matrix"), fit="levels+scale")
        # All groups are fitted in one pass: sums are rounded to a common unit, which may differ. Scales are bounded by
        # the largest of the whole array, which may be in another group.
        np.testing.assert_allclose(q.levels[index], alone.levels[0], rtol=1e-4)
        mine = restored(q) if axis == -1 else restored(q).T
        own, other = (
            ((dense - part) ** 2).sum() for dense in (mine[index * lines : (index + 1) * lines], restored(alone))
        )
        assert own <= 1.01 * other + 1e-12


def test_more_sets_of_levels_leave_less_error():
    rng = np.random.default_rng(0)
    w = np.concatenate(
        [rng.standard_normal((8, 256)), rng.uniform(-1, 1, (8, 256)), rng.laplace(size=(8, 256))]
    ).astype(np.float32)
    errors = [
        math.fsum(
            block_errors(w, quantize(w, BlockFormat(normal_float(3), 64, axis=-1, levels=levels), fit="levels+scale"))
        )
        for levels in ("matrix", 8)
    ]
    assert errors[1] < 0.98 * errors[0]


def test_levels_of_two_values_are_found_exactly(xp):
    values = np.array([-0.7, -0.1, 0.3, 1.0], dtype=np.float32)
    w = np.random.default_rng(0).choice(values, (16, 32)).astype(np.float32)
    w[:, 0] = 1.0
    q = quantized(xp, w, BlockFormat(normal_float(2), 32), fit="levels+scale")
    np.testing.assert_allclose(restored(q), w, rtol=1e-5)
    np.testing.assert_allclose(host(q.levels)[0], values, rtol=1e-5)


@pytest.mark.parametrize("fmt", [BlockFormat(NF4, 8, levels="matrix"), BlockFormat(NF4, 8, axis=0, levels=3)], ids=str)
@pytest.mark.parametrize("fit", ["absmax", "scale"])
def test_without_a_fit_the_levels_are_those_of_the_codebook(xp, fmt, fit):
    w = normal(10, 14)
    q = quantized(xp, w, fmt, fit=fit)
    plain = quantized(xp, w, BlockFormat(NF4, 8, axis=fmt.axis), fit=fit)
    assert host(q.levels).tolist() == [NF4.levels.tolist()] * fmt.level_sets(w.shape)
    assert {name: content for name, content in stored(q).items() if name != "levels"} == stored(plain)
    assert restored(q).tobytes() == restored(plain).tobytes()


def test_a_fit_of_levels_makes_the_format_one_with_levels(xp):
    q = quantized(xp, normal(4, 8), BlockFormat(NF4, 8), fit="levels+scale")
    assert q.format == BlockFormat(NF4, 8, levels="matrix")
    assert q.codebook is NF4
    assert 8 * q.nbytes == q.format.storage_bits((4, 8))


def test_a_block_of_one_weight_comes_back_exactly(xp):
    w = normal(20)
    q = quantized(xp, w, BlockFormat(NF4, 1), fit="levels+scale")
    np.testing.assert_allclose(restored(q), w, rtol=1e-6)


def test_fitted_scales_that_the_format_cannot_hold_are_not_taken():
    # The scales are those of levels up to six; fitted levels end at one, and their scales would be beyond float16.
    w = (normal(64, 16) * 1e5).clip(-3.5e5, 3.5e5).astype(np.float32)
    fmt = BlockFormat(Codebook(normal_float(2).levels * 6), 16, "float16")
    q = quantize(w, fmt, fit="levels+scale")
    assert np.isfinite(restored(q)).all()
    assert math.fsum(block_errors(w, q)) <= math.fsum(block_errors(w, quantize(w, fmt)))


@pytest.mark.parametrize("factor", [6.0, 0.75, 1 / 3])
@pytest.mark.parametrize("normalization", ["absmax", "signed"])
def test_levels_that_do_not_end_at_one_are_no_worse_a_start(factor, normalization):
    w = normal(30, 32)
    book = np.array([-1, -0.4, 0.1, 0.5, 1.0])
    wide, unit = (
        quantize(w, BlockFormat(Codebook(book * f, normalization=normalization), 16), fit="levels+scale")
        for f in (factor, 1.0)
    )
    assert math.fsum(block_errors(w, wide)) == pytest.approx(math.fsum(block_errors(w, unit)), rel=1e-2)


@pytest.mark.parametrize("fit", ["absmax", "scale", "levels+scale"])
def test_an_array_without_lines_stays_empty(fit):
    fmt = BlockFormat(NF4, 4, axis=-1, levels=2)
    q = quantize(np.zeros((0, 5), dtype=np.float32), fmt, fit=fit)
    assert restored(q).shape == (0, 5)


@pytest.mark.parametrize("fit", ["absmax", "levels+scale"])
def test_levels_of_integers_are_not_fitted(fit):
    with pytest.raises(FormatError, match=r"levels of affine4 .* cannot be fitted"):
        quantize(np.ones(4), BlockFormat(affine(4), levels="matrix" if fit == "absmax" else "codebook"), fit=fit)


@pytest.mark.parametrize("levels", ["codebook", "matrix"])
def test_zero_becomes_the_zero_without_a_sign(xp, levels):
    # FP4 of bitsandbytes has both zeros; the codebook says where between them the boundary is.
    book = by_name("fp4-bnb")
    q = quantize(on(xp, np.array([1.0, 0.0, -0.0], dtype=np.float32)), BlockFormat(book, 3, levels=levels))
    assert not np.signbit(restored(q)).any()
