from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate

from lqlora.codebooks import AF4, abnormal_float
from lqlora.codebooks._block_normal import block_normal_density
from lqlora.codebooks._optimal_levels import Ends, optimal_levels
from lqlora.errors import InvalidArgumentError

#: Yoshida, arXiv 2306.06965, to the eight digits that the author's program prints, without -1, 0 and 1.
PUBLISHED = {
    32: [-0.72380075, -0.54068711, -0.3963985, -0.2723577, -0.15956821, -0.05258802,
         0.04554747, 0.13780891, 0.23375854, 0.33656744, 0.4508456, 0.58437857, 0.75299116],
    64: [-0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812,
         0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863],
    4096: [-0.5379003, -0.38399174, -0.27664257, -0.18850865, -0.10999076, -0.03618635,
           0.03129431, 0.09480323, 0.16126887, 0.23343416, 0.31577979, 0.41743354, 0.56468758],
}  # fmt: skip


def free(codebook):
    return codebook.levels[~np.isin(codebook.levels, [-1, 0, 1])]


@pytest.mark.parametrize("block_size", PUBLISHED)
def test_levels_are_the_published_ones(block_size):
    np.testing.assert_allclose(free(abnormal_float(4, block_size)), PUBLISHED[block_size], rtol=0, atol=5e-8)


def test_the_construction_gives_the_published_table_to_all_its_digits():
    density = block_normal_density(64, power=0)
    below, above = (optimal_levels(density, count, 1, Ends(zero_cuts=True)) for count in (6, 7))
    np.testing.assert_allclose([*-below[::-1], *above], PUBLISHED[64], rtol=0, atol=1e-8)


def test_four_bits_and_blocks_of_64_are_the_published_table():
    assert abnormal_float(4, 64) is AF4
    assert AF4.name == "af4"


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_medians_of_their_cells(bits):
    # In blocks of two, the smaller weight over the larger is the tangent of a uniform angle.
    levels = abnormal_float(bits, 2).levels.astype(np.float64)
    for side in (levels[levels >= 0], -levels[levels <= 0][::-1]):
        borders = (side[1:] + side[:-1]) / 2
        borders[0] = 0.0  # the rule of the published levels
        below, at, above = np.arctan(borders[:-1]), np.arctan(side[1:-1]), np.arctan(borders[1:])
        np.testing.assert_allclose(at - below, above - at, rtol=0, atol=2e-7)


@pytest.mark.parametrize("block_size", [2, 3, 16, 64, 1000])
def test_the_density_is_that_of_normal_weights_over_the_largest_of_their_block(block_size):
    def joint(m, x):  # density of the largest weight and of another weight divided by it
        outside = 1 - integrate.quad(lambda w: np.exp(-w * w / 2), -m, m)[0] / np.sqrt(2 * np.pi)
        return (1 - outside) ** (block_size - 2) * np.exp(-(m * m) * (1 + x * x) / 2) * m

    points = np.array([0.0, 0.3, 0.9])
    expected = [integrate.quad(joint, 0, 12, args=(x,), epsabs=0, limit=200)[0] for x in points]
    density = block_normal_density(block_size, power=0)(points)
    np.testing.assert_allclose(density / density[0], np.array(expected) / expected[0], rtol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_codes_are_used_and_the_ends_and_zero_are_levels(bits):
    codebook = abnormal_float(bits, 128)
    assert (len(codebook), codebook.bits, codebook.name) == (2**bits, bits, f"af{bits}-128")
    assert codebook.levels[[0, 2 ** (bits - 1) - 1, -1]].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_bits_out_of_range_are_refused(bits):
    abnormal_float(4, 64)  # a cache must not let 4.0 pass for 4
    with pytest.raises(InvalidArgumentError, match=f"^bits .*got {bits}"):
        abnormal_float(bits, 64)


@pytest.mark.parametrize("block_size", [1, 2**32 + 1, 64.0])
def test_block_sizes_out_of_range_are_refused(block_size):
    abnormal_float(4, 64)
    with pytest.raises(InvalidArgumentError, match=f"^block_size .*got {block_size}"):
        abnormal_float(4, block_size)
