from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.ops import block_absmax, block_extremes, from_blocks, to_blocks
from lqlora.testing.strategies import weights
from tests.oracles import quantize as oracle
from tests.strategies import host, on

flat = weights(shape=st.tuples(st.integers(0, 150)))
sizes = st.integers(1, 70)


@given(w=flat, size=sizes)
def test_absolute_maxima_equal_the_oracle(xp, w, size):
    expected = [oracle.absmax(block) for block in oracle.blocks_of(w, size)]
    found = host(block_absmax(on(xp, w), size))
    assert found.dtype == np.float32
    assert found.tolist() == expected


@given(w=weights(dtype=np.float64, shape=st.tuples(st.integers(0, 150))), size=sizes)
def test_float64_is_not_rounded(xp, w, size):
    found = host(block_absmax(on(xp, w), size))
    assert found.dtype == np.float64
    assert found.tolist() == [oracle.absmax(block) for block in oracle.blocks_of(w, size)]


@given(w=flat, size=sizes)
def test_cutting_into_blocks_is_undone(xp, w, size):
    blocks = to_blocks(on(xp, w), size)
    assert blocks.shape[0] == -(-len(w) // size)
    assert host(from_blocks(blocks, len(w))).tobytes() == w.tobytes()


def test_the_tail_is_padded_with_zeros(xp):
    blocks = to_blocks(on(xp, np.array([1.0, 2.0, 3.0], dtype=np.float32)), 2)
    assert host(blocks).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_a_block_far_longer_than_the_array_takes_no_memory(xp):
    # Four petabytes of padding, if there were padding.
    found = block_absmax(on(xp, np.array([1.0, -2.0], dtype=np.float32)), 10**15)
    assert host(found).tolist() == [2.0]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_nothing_has_no_blocks(xp, size):
    assert block_absmax(on(xp, np.zeros(0, dtype=np.float32)), size).shape == (0,)
    assert [found.shape for found in block_extremes(on(xp, np.zeros(0, dtype=np.float32)), size)] == [(0,), (0,)]


@given(w=flat, size=sizes)
def test_extremes_equal_the_oracle(xp, w, size):
    low, high = (host(found) for found in block_extremes(on(xp, w), size))
    expected = [oracle.extremes(block) for block in oracle.blocks_of(w, size)]
    assert low.dtype == high.dtype == np.float32
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == expected


@given(w=weights(dtype=np.float64, shape=st.tuples(st.integers(0, 150))), size=sizes)
def test_extremes_of_float64_are_not_rounded(xp, w, size):
    low, high = (host(found) for found in block_extremes(on(xp, w), size))
    assert low.dtype == high.dtype == np.float64
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [
        oracle.extremes(block) for block in oracle.blocks_of(w, size)
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [2, 3])
def test_what_is_not_finite_stays_visible(xp, bad, size):
    w = on(xp, np.array([1.0, 2.0, bad, 3.0, -1.0], dtype=np.float32))
    low, high = (host(found) for found in block_extremes(w, size))
    assert (np.isfinite(low) & np.isfinite(high)).sum() == len(low) - 1
    assert np.isfinite(host(block_absmax(w, size))).sum() == len(low) - 1
