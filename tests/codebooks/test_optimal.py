from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate

from lqlora import normal_float
from lqlora.codebooks import block_optimal
from lqlora.codebooks._block_normal import block_normal_density
from lqlora.codebooks._optimal_levels import Ends, optimal_levels
from lqlora.errors import InvalidArgumentError

#: BOF4, arXiv 2505.06653, table 8, blocks of 64: integrated numerically ("theoretical solution").
BOF4_64 = [-1, -0.7535689203869577, -0.5792681492535123, -0.4386720084478466, -0.3168191039791481, -0.2060291109696586,
           -0.1015640796456471, 0, 0.0887646748673216, 0.1794535266886747, 0.274249773841407, 0.375951029286045,
           0.4885925268369112, 0.6187715546288008, 0.7790828367844242, 1]  # fmt: skip

#: The same paper, table 7: BOF4-S by block size, fitted to samples.
BOF4_S = {
    32: [-0.8732797503471375, -0.6907446384429932, -0.5437039136886597, -0.4173701703548431, -0.3038933575153351,
         -0.1986017823219299, -0.0981557220220566, 0, 0.0925938412547112, 0.187048003077507, 0.2855197489261627,
         0.3907126188278198, 0.506283164024353, 0.6379748582839966, 0.7956376671791077, 1],
    64: [-0.8568463921546936, -0.6692874431610107, -0.5235266089439392, -0.4004882574081421, -0.2910638153553009,
         -0.1900092959403992, -0.0938529595732689, 0, 0.0887671709060669, 0.1794802695512772, 0.2743096053600311,
         0.3760197460651398, 0.4886530041694641, 0.6188603639602661, 0.7791395783424377, 1],
    128: [-0.83739173412323, -0.6462452411651611, -0.5028634667396545, -0.3836247622966766, -0.2783779501914978,
          -0.1815713942050934, -0.0896477326750755, 0, 0.0850915610790253, 0.1720834821462631, 0.2632072865962982,
          0.3613293170928955, 0.4707452654838562, 0.5988966822624207, 0.761027991771698, 1],
    256: [-0.8146829009056091, -0.6221838593482971, -0.4820549190044403, -0.3669650852680206, -0.2659871876239777,
          -0.1733742356300354, -0.0855776593089104, 0, 0.0815095230937004, 0.1649149656295776, 0.2524392008781433,
          0.3470274209976196, 0.4531534314155579, 0.578848659992218, 0.7418596744537354, 1],
}  # fmt: skip


def normalized(block_size, signed, count=2**20):
    """Return normal weights divided by the largest of their block, and these divisors."""
    weights = np.random.default_rng(7).standard_normal((count // block_size, block_size))
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=1)[:, None], axis=1)
    scales = largest if signed else np.abs(largest)
    return weights / scales, scales


def squared_error(codebook, block_size):
    """Return the mean squared error of normal weights rounded to a codebook."""
    x, scales = normalized(block_size, codebook.normalization == "signed")
    levels = codebook.levels.astype(np.float64)
    rounded = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return float((((rounded - x) * scales) ** 2).mean())


def test_absolute_normalization_gives_the_levels_the_paper_integrated():
    codebook = block_optimal(4, 64)
    np.testing.assert_allclose(codebook.levels, BOF4_64, rtol=0, atol=3e-6)
    assert (codebook.name, codebook.normalization) == ("bof4-64", "absmax")


@pytest.mark.parametrize("block_size", BOF4_S)
def test_signed_normalization_gives_the_levels_the_paper_sampled(block_size):
    codebook = block_optimal(4, block_size, signed=True)
    np.testing.assert_allclose(codebook.levels, BOF4_S[block_size], rtol=0, atol=4e-4)
    assert (codebook.name, codebook.normalization) == (f"bof4s-{block_size}", "signed")


@pytest.mark.parametrize(
    ("bits", "signed", "change"),
    [(4, False, -0.05), (4, True, -0.13), (3, False, -0.04), (3, True, -0.23), (2, False, 0.0), (2, True, -0.56)],
)
def test_squared_error_falls_below_that_of_normal_float(bits, signed, change):
    error = squared_error(block_optimal(bits, 64, signed=signed), 64)
    assert error / squared_error(normal_float(bits), 64) - 1 == pytest.approx(change, abs=0.012)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "block_size"), [(2, 16), (3, 64), (4, 64), (5, 256)])
def test_levels_are_means_of_their_cells_weighted_by_the_squared_scale(bits, block_size, signed):
    codebook = block_optimal(bits, block_size, signed=signed)
    x, scales = normalized(block_size, signed)
    cells = np.searchsorted(codebook.boundaries, x).reshape(-1)
    weights = np.broadcast_to(scales**2, x.shape).reshape(-1)
    means = np.bincount(cells, weights * x.reshape(-1)) / np.bincount(cells, weights)
    movable = ~np.isin(codebook.levels, [-1, 0, 1])
    np.testing.assert_allclose(codebook.levels[movable], means[movable], rtol=0, atol=2e-3)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_means_of_their_cells_in_blocks_of_two(bits, signed):
    # The smaller weight over the larger, weighted by the larger squared, has the density 1 / (1 + x**2)**2.
    levels = block_optimal(bits, 2, signed=signed).levels.astype(np.float64)
    borders = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
    for level, low, high in zip(levels, borders[:-1], borders[1:], strict=True):
        if level not in (-1, 0, 1):
            mass = integrate.quad(lambda x: (1 + x * x) ** -2, low, high)[0]
            moment = integrate.quad(lambda x: x * (1 + x * x) ** -2, low, high)[0]
            assert level == pytest.approx(moment / mass, abs=2e-7)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 64, 2**16, 2**32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_codes_are_used_whatever_the_block_size(bits, block_size, signed):
    codebook = block_optimal(bits, block_size, signed=signed)
    assert (len(codebook), codebook.bits, codebook.widest) == (2**bits, bits, 1.0)
    assert codebook.levels[[2 ** (bits - 1) - 1, -1]].tolist() == [0.0, 1.0]
    assert (codebook.levels[0] == -1.0) == (not signed)


def test_both_normalizations_share_the_levels_above_zero():
    assert block_optimal(4, 64).levels[8:].tolist() == block_optimal(4, 64, signed=True).levels[8:].tolist()


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_bits_out_of_range_are_refused(bits):
    block_optimal(4, 64)  # a cache must not let 4.0 pass for 4
    with pytest.raises(InvalidArgumentError, match=f"^bits .*got {bits}"):
        block_optimal(bits, 64)


@pytest.mark.parametrize("block_size", [1, 2**32 + 1, True])
def test_block_sizes_out_of_range_are_refused(block_size):
    block_optimal(4, 64)
    with pytest.raises(InvalidArgumentError, match=f"^block_size .*got {block_size}"):
        block_optimal(4, block_size)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_a_flat_density_gives_equal_steps(count, power):
    levels = optimal_levels(np.ones_like, count, power, Ends())
    np.testing.assert_allclose(levels, np.arange(1, count + 1) / (count + 1), atol=1e-12)
    free = optimal_levels(np.ones_like, count, power, Ends(zero_cuts=True, free=True))
    np.testing.assert_allclose(free, (np.arange(count) + 0.5) / count, atol=1e-12)


def test_a_density_that_is_never_the_same_twice_has_no_optimal_levels():
    noise = np.random.default_rng(0)
    with pytest.raises(InvalidArgumentError, match=r"^density .* 3 optimal"):
        optimal_levels(lambda x: noise.uniform(1, 2, x.shape), 3, 2, Ends())


def test_the_density_of_blocks_of_two_is_known():
    x = np.linspace(0, 1, 11)
    for power, exponent in ((0, 1), (2, 2)):
        density = block_normal_density(2, power)(x)
        np.testing.assert_allclose(density / density[0], (1 + x * x) ** -exponent, rtol=1e-13)
