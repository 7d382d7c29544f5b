"""Strategies of lqlora.testing: what they draw stays within the stated bounds and includes the hard cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from lqlora import NF4, Codebook, uniform
from lqlora.errors import InvalidArgumentError
from lqlora.testing.strategies import (
    LAYOUTS,
    block_weights,
    codebooks,
    hard_floats,
    lay_out,
    shapes,
    ties,
    weights,
)
from tests.strategies import host, on


@given(w=weights(), layout=st.sampled_from(LAYOUTS))
def test_a_layout_changes_no_entry(xp, w, layout):
    laid = lay_out(on(xp, w), layout)
    assert tuple(laid.shape) == w.shape
    assert host(laid).tobytes() == w.tobytes()


def test_layouts_have_the_strides_they_are_named_for():
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert {layout: lay_out(w, layout).strides for layout in LAYOUTS} == {
        "contiguous": (12, 4), "transposed": (4, 8), "every second": (24, 4), "reversed": (-12, 4),
    }  # fmt: skip


def test_an_unknown_layout_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"layout.*contiguous.*'diagonal'"):
        lay_out(np.zeros(2), "diagonal")


@given(data=st.data(), largest=st.floats(1e-40, 3.4e38), codebook=codebooks())
def test_hard_floats_are_float32_within_the_bound(data, largest, codebook):
    value = data.draw(hard_floats(largest, codebook))
    assert float(np.float32(value)) == value
    assert abs(value) <= largest


@pytest.mark.parametrize("wanted", [1e-45, 3e38, float(NF4.boundaries[3])])
def test_hard_values_are_drawn(wanted):
    assert find(hard_floats(codebook=NF4), lambda x: x == np.float32(wanted)) == np.float32(wanted)


@given(w=weights(np.float16, 6e4))
def test_weights_have_the_dtype_and_stay_within_the_bound(w):
    assert w.dtype == np.float16
    assert np.isfinite(w).all()


@given(data=st.data(), size=st.integers(0, 100), block_size=st.integers(1, 40))
def test_blocks_of_weights_are_never_all_zeros(data, size, block_size):
    w = data.draw(block_weights(block_size, st.just(size), 2.0**-4, 2.0**4))
    assert (w.dtype, w.shape) == (np.float32, (size,))
    for start in range(0, size, block_size):
        block = np.abs(w[start : start + block_size])
        assert 2.0**-4 <= block.max() < 2.0**4
        assert block[block > 0].min() >= block.max() * 2.0**-21


@given(w=block_weights(8))
def test_blocks_of_weights_are_one_to_six_whole_blocks_by_default(w):
    assert w.size in (8, 16, 24, 32, 40, 48)


@given(codebook=codebooks().filter(lambda codebook: codebook.widest == 1), data=st.data())
def test_ties_are_products_of_a_power_of_two_and_boundaries(codebook, data):
    w = data.draw(ties(codebook))
    assert np.frexp(w[0])[0] == 0.5
    assert sorted((w[1:] / w[0]).tolist()) == codebook.boundaries.tolist()


@given(codebook=codebooks(4))
def test_codebooks_have_few_levels_if_asked(codebook):
    assert isinstance(codebook, Codebook)
    assert 2 <= len(codebook) <= 4


def test_codebooks_with_and_without_a_name_are_drawn():
    assert find(codebooks(), lambda codebook: codebook == uniform(5)).name == "int5"
    unlike_any = find(codebooks(), lambda codebook: codebook.widest > 1 and codebook.normalization == "absmax")
    assert unlike_any.name == "custom"


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 5), (3, 1, 2)])
def test_every_kind_of_shape_is_drawn(wanted):
    assert find(shapes(), lambda shape: shape == wanted) == wanted
