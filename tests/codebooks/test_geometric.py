from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import logarithmic
from lqlora.errors import InvalidArgumentError


def nearest(codebook, value):
    return float(codebook.levels[int((np.float32(value) > codebook.boundaries).sum())])


@pytest.mark.parametrize("bits", range(3, 9))
def test_levels_are_zero_and_a_geometric_sequence_of_sixteen_octaves(bits):
    codebook = logarithmic(bits)
    levels = codebook.levels.astype(np.float64)
    assert (len(codebook), codebook.bits, codebook.name) == (2**bits, bits, f"log{bits}")
    assert (levels[0], levels[1], levels[-1]) == (0.0, 2.0**-16, 1.0)
    np.testing.assert_allclose(levels[2:] / levels[1:-1], 2 ** (16 / (2**bits - 2)), rtol=3e-7)


@given(bits=st.integers(3, 8), scale=st.floats(2.0**-16, 1.0, width=32))
def test_relative_error_is_bounded_over_sixteen_octaves(bits, scale):
    ratio = 2 ** (16 / (2**bits - 2))
    assert abs(nearest(logarithmic(bits), scale) - scale) <= scale * (ratio - 1) / (ratio + 1) * (1 + 1e-5)


def test_the_error_of_eight_bits_is_about_two_percent():
    ratio = 2 ** (16 / 254)
    assert (ratio - 1) / (ratio + 1) == pytest.approx(0.0218, abs=5e-5)


def test_only_scales_that_are_tiny_beside_the_largest_become_zero():
    codebook = logarithmic(8)
    assert [nearest(codebook, x) for x in (0.0, 2.0**-17, 2.0**-17 * 1.001)] == [0.0, 0.0, 2.0**-16]


@pytest.mark.parametrize("bits", [2, 9, 8.0, True])
def test_other_bits_are_refused(bits):
    logarithmic(8)
    with pytest.raises(InvalidArgumentError, match=f"^bits .*got {bits}"):
        logarithmic(bits)
