from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.ops import put_flat, take_flat
from lqlora.testing.strategies import LAYOUTS, lay_out, shapes
from tests.strategies import host, on


@st.composite
def stretches(draw):
    shape = draw(shapes(max_dims=4, max_side=5))
    if not shape:
        return shape, 0, 1
    size = int(np.prod(shape))
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(start, size))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(case=stretches())
def test_a_stretch_is_read_in_row_major_order(xp, layout, case):
    shape, start, stop = case
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found = take_flat(lay_out(on(xp, array), layout), start, stop)
    assert host(found).tolist() == array.reshape(-1)[start:stop].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@given(case=stretches())
def test_a_stretch_is_written_and_nothing_else(xp, layout, case):
    shape, start, stop = case
    if layout == "reversed" and "torch" in xp.__name__:
        layout = "transposed"  # torch has no negative strides
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    target = lay_out(on(xp, array), layout)
    values = -1 - np.arange(stop - start, dtype=np.float32)
    put_flat(target, start, on(xp, values))
    expected = array.reshape(-1).copy()
    expected[start:stop] = values
    assert host(target).reshape(-1).tolist() == expected.tolist()


def test_a_stretch_of_a_contiguous_array_is_a_view(fast_xp):
    array = on(fast_xp, np.arange(12.0).reshape(3, 4))
    part = take_flat(array, 2, 9)
    array[1, 1] = 99.0
    assert float(part[3]) == 99.0


@pytest.mark.parametrize("shape", [(1, 512, 1024), (2, 8, 64, 512)])
def test_a_stretch_takes_memory_of_its_own_size_only(shape):
    # Of each entry of the first axis there are many pieces: what each of them copies adds up to the square of the size.
    array = np.swapaxes(np.zeros((*shape[:-2], shape[-1], shape[-2]), dtype=np.float32), -1, -2)
    tracemalloc.start()
    try:
        take_flat(array, 0, 1024)
        put_flat(array, 0, np.zeros(1024, dtype=np.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 4
