"""Rows of quantized matrices: the same numbers without a copy, or an error where a row does not begin a block or byte."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import BlockFormat, QuantizedArray, quantize
from lqlora.errors import InvalidArgumentError
from tests.quantized.cases import draw_case, normal, restored
from tests.strategies import on, stored

quiet = pytest.mark.filterwarnings("ignore::lqlora.errors.ScaleUnderflowWarning")


@pytest.mark.slow_on_strict
@quiet
@given(data=st.data())
def test_rows_decode_to_the_same_numbers_or_are_refused(xp, data):
    w, fmt = draw_case(data, xp, fitted=True)
    q = quantize(on(xp, w), fmt)
    if len(w.shape) not in (1, 2):
        with pytest.raises(InvalidArgumentError, match="vector or a matrix"):
            q.rows(0, 0)
        return
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, w.shape[0])] * 2), label="rows"))
    part = None
    with suppress(InvalidArgumentError):
        part = q.rows(start, stop)
    if part is None:
        return
    assert part.shape == (stop - start, *w.shape[1:])
    np.testing.assert_array_equal(restored(part), restored(q)[start:stop])
    assert stored(QuantizedArray.from_arrays(part.to_arrays(), fmt, part.shape)) == stored(part)


@pytest.mark.parametrize(
    ("fmt", "step"),
    [
        ("nf4/64:float32", 1),
        ("nf3/8:u8/4:float32", 1),  # 8 blocks a row
        ("nf3/16:u8/8:float32", 2),  # 4 blocks a row, in blocks of 8 scales
        ("affine3/16:float16", 2),  # 4 zero points of 3 bits a row: 12 bits
        ("nf2/96:float32", 3),
        ("nf4/32@-1:float32", 1),
        ("nf4+fit/64:float32", 1),
        ("nf4/4@0:float32", 12),
        ("nf4+fit4/64@-1:float32", 12),
        ("nf4/48@-1:float32", 12),
    ],
)
def test_rows_begin_with_blocks_bytes_and_second_blocks(fmt, step):
    q = quantize(normal(12, 64), BlockFormat.parse(fmt))
    whole = restored(q)
    for start in range(13):
        for stop in range(start, 13):
            if start % step or (stop % step and stop != 12):
                with pytest.raises(InvalidArgumentError, match="whole blocks"):
                    q.rows(start, stop)
            elif step < 12:
                part = q.rows(start, stop)
                np.testing.assert_array_equal(restored(part), whole[start:stop])
                assert start == stop or np.shares_memory(part.packed, q.packed)


def test_rows_beyond_the_end_and_rows_of_stacks_are_refused():
    fmt = BlockFormat.parse("nf4/8:float32")
    for start, stop in ((-1, 2), (2, 1), (0, 5)):
        with pytest.raises(InvalidArgumentError, match="from 0 to 4"):
            quantize(normal(4, 8), fmt).rows(start, stop)
    with pytest.raises(InvalidArgumentError, match="vector or a matrix"):
        quantize(normal(4, 8), fmt, batch_dims=1).rows(0, 1)
