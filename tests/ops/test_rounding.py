"""Errors of rounding, against a loop over Python's numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.ops import rounding_errors, wide_errors
from lqlora.testing.strategies import ALL_CODEBOOKS
from tests.oracles.quantize import halved_sum, nearest
from tests.strategies import host, on


def error_of(row, weights, scale, zero, levels):
    """Round each entry in the dtype of the row, decode it in float32, and add squares of float64 up by halves."""
    dtype, squares = row.dtype.type, []
    for entry, weight in zip(row, weights, strict=True):
        normalized = (entry / dtype(scale) if scale else dtype(0)) + dtype(zero)
        value = (levels[nearest(float(normalized), levels)] - np.float32(zero)) * scale
        difference = float(entry) - float(value)  # its power 2 may differ in the last bit from the product
        squares.append(difference * difference * float(weight))
    return float(halved_sum(squares)) if squares else 0.0


@given(
    count=st.integers(0, 4),
    columns=st.sampled_from([0, 1, 2, 5, 8, 13]),
    codebook=st.sampled_from(ALL_CODEBOOKS),
    dtype=st.sampled_from([np.float32, np.float64]),
    weighted=st.sampled_from([None, np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_errors_are_those_of_a_loop(xp, count, columns, codebook, dtype, weighted, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, columns)).astype(dtype)
    weights = None if weighted is None else rng.random((count, columns)).astype(weighted)
    scales = rng.choice(np.array([0.0, -0.75, 0.3, 1.0, 2.5], dtype=np.float32), count)
    affine = codebook.normalization == "affine"
    zeros = rng.integers(0, len(codebook), count).astype(np.uint8) if affine else None
    given_arrays = [None if array is None else on(xp, array) for array in (rows, weights, scales, zeros)]
    found = host(rounding_errors(*given_arrays, codebook.levels, codebook.boundaries))
    assert (found.dtype, found.shape) == (np.float64, (count,))
    for i, error in enumerate(found):
        own = np.ones(columns) if weights is None else weights[i]
        assert error == error_of(rows[i], own, scales[i], 0 if zeros is None else zeros[i], codebook.levels)


@pytest.mark.parametrize("text", ["nf4/16:float32", "affine3/16:float32", "bof4s-64/16:float32"])
def test_they_are_what_an_array_loses_that_is_restored(xp, text):
    fmt = lq.BlockFormat.parse(text)
    w = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    q = lq.quantize(w, fmt)
    zeros = None if q.zero_points is None else lq.ops.unpack_codes(q.zero_points, fmt.codebook.zero_point_bits, 6)
    arrays = [None if array is None else on(xp, array) for array in (w, None, q.scales, zeros)]
    lost = (w.astype(np.float64) - lq.dequantize(q)) ** 2
    found = rounding_errors(*arrays, fmt.codebook.levels, fmt.codebook.boundaries)
    np.testing.assert_allclose(host(found), lost.sum(axis=1), rtol=1e-12)


def test_a_difference_below_float32_is_seen(xp):
    # In float32 the square of the second would be that of the first.
    rows = on(xp, np.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-40]]))
    found = host(wide_errors(rows, None, on(xp, np.full((2, 2), 0.5, dtype=np.float32))))
    assert found.tolist() == [0.5, 0.25 + (0.5 + 2.0**-40) ** 2]


def test_weights_count_as_often(xp):
    rows, values = on(xp, np.array([[3.0, 1.0]], dtype=np.float32)), on(xp, np.array([[1.0, 1.5]], dtype=np.float32))
    for dtype in (np.float32, np.float64):
        weights = on(xp, np.array([[2.0, 4.0]], dtype=dtype))
        assert host(wide_errors(rows, weights, values)).tolist() == [2 * 4.0 + 4 * 0.25]
