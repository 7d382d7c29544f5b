"""Integers with a signed maximum: the same bytes on all array libraries, and errors of at most half a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.testing.strategies import weights
from tests.strategies import host, on


@given(
    w=weights(largest=1e30),
    bits=st.integers(2, 8),
    block_size=st.integers(1, 70),
    fit=st.sampled_from(["absmax", "scale"]),
)
def test_codes_and_scales_are_the_same_on_all_libraries(xp, w, bits, block_size, fit):
    fmt = lq.BlockFormat.parse(f"int{bits}s/{block_size}:float32")
    expected, found = lq.quantize(w, fmt, fit=fit), lq.quantize(on(xp, w), fmt, fit=fit)
    assert host(found.packed).tobytes() == expected.packed.tobytes()
    assert host(found.scales).tobytes() == expected.scales.tobytes()
    assert host(lq.dequantize(found)).tobytes() == lq.dequantize(expected).tobytes()


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_error_is_larger_than_half_a_step_or_one_at_the_lowest_level(bits):
    w = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    q = lq.quantize(w, lq.BlockFormat.parse(f"int{bits}s/32:float32"))
    steps = np.abs(q.scales).repeat(32).reshape(w.shape)
    # The level of opposite sign to the largest weight ends one step earlier.
    limits = np.where(np.sign(w) == np.sign(q.scales).repeat(32).reshape(w.shape), 0.5, 1.0)
    assert (np.abs(lq.dequantize(q) - w) <= (limits + 1e-6) * steps).all()
