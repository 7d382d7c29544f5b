"""Decoded rows of a matrix: the bits of the whole decoded matrix, in every format whose blocks follow the rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import BlockFormat, dequantize, quantize
from lqlora.errors import InvalidArgumentError
from lqlora.quantized._rows import decode_rows
from tests.quantized.cases import KINDS, draw_case, normal
from tests.strategies import host, on

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")


def _assert_same(q, rows, xp, dtype="float32"):
    found = decode_rows(q, on(xp, np.array(rows, dtype=np.int64)), dtype)
    whole = host(dequantize(q, dtype=dtype))
    np.testing.assert_array_equal(host(found), whole[rows].reshape(len(rows), whole.shape[1]))
    assert found.dtype == dequantize(q, dtype=dtype).dtype


@pytest.mark.slow_on_strict
@quiet
@given(data=st.data())
def test_rows_have_the_bits_of_the_whole(xp, data):
    w, fmt = draw_case(data, xp, fitted=True, axes=(None, -1))
    if w.ndim != 2 or not w.shape[0]:
        w, fmt = normal(5, 12), BlockFormat.parse("nf3/8:u8/4:float32")
    rows = data.draw(st.lists(st.integers(0, len(w) - 1), max_size=6), label="rows")
    _assert_same(quantize(on(xp, w), fmt), rows, xp)


@pytest.mark.parametrize("columns", [9, 16])  # a row of 9 codes of 3 bits ends within a byte
@pytest.mark.parametrize("fmt", [own for own in KINDS if not re.search("@0|@1|~out|~both", own)])
@quiet
def test_every_kind_of_format(fmt, columns):
    q = quantize(normal(7, columns), BlockFormat.parse(fmt))
    _assert_same(q, [6, 0, 3, 3], np)
    _assert_same(q, [2], np, "float16")
    _assert_same(q, [], np, "float64")
    _assert_same(q, [5, 1], np, "float64")


@pytest.mark.parametrize(
    "fmt", ["nf4/64@0:float32", "nf4/64@-2:float32", "nf4/64~out:float32", "nf4/64@-1~both:float32"]
)
def test_blocks_along_columns_are_refused(fmt):
    with pytest.raises(InvalidArgumentError, match="blocks along its rows"):
        decode_rows(quantize(normal(64, 4), BlockFormat.parse(fmt)), np.array([0]))


def test_vectors_and_stacks_are_refused():
    fmt = BlockFormat.parse("nf4/4:float32")
    for q in (quantize(normal(8), fmt), quantize(normal(2, 4, 4), fmt, batch_dims=1)):
        with pytest.raises(InvalidArgumentError, match="must be a matrix"):
            decode_rows(q, np.array([0]))


@pytest.mark.parametrize("row", [-1, 8])
def test_rows_beyond_the_matrix_are_refused(xp, row):
    q = quantize(on(xp, normal(8, 4)), BlockFormat.parse("nf4/4:float32"))
    with pytest.raises(InvalidArgumentError, match=f"from 0 to 7, got {row}"):
        decode_rows(q, on(xp, np.array([3, row])))
