from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from lqlora import NF4, normal_float
from lqlora.errors import InvalidArgumentError

#: LQ-LoRA, arXiv 2311.12023: the values of its code, to four digits.
PUBLISHED = {
    2: [-1, 0, 0.3379, 1],
    3: [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1],
}


def formula(bits):
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    below = [quantile(1 - 0.9677083 + i * (0.9677083 - 0.5) / (half - 1)) for i in range(half - 1)]
    above = [quantile(0.5 + i * (0.9677083 - 0.5) / half) for i in range(1, half + 1)]
    return np.array([*below, 0.0, *above]) / quantile(0.9677083)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_normal_float_has_the_published_values(bits):
    np.testing.assert_allclose(normal_float(bits).levels, PUBLISHED[bits], atol=5.1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_follows_the_rule(bits):
    # NF4 is the published table, which was made in float32: its last digits differ.
    np.testing.assert_allclose(normal_float(bits).levels, formula(bits), rtol=0, atol=2e-7)


def test_nf4_is_the_table_of_bitsandbytes():
    # The middle of its 16 values, as QLoRA's appendix E and bitsandbytes print them.
    assert NF4.levels[6:9].tolist() == [-0.09105003625154495, 0.0, 0.07958029955625534]
    assert normal_float(4) is NF4


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_uses_all_codes_ends_at_one_and_has_a_zero(bits):
    codebook = normal_float(bits)
    assert (len(codebook), codebook.bits, codebook.name) == (2**bits, bits, f"nf{bits}")
    assert (codebook.levels[0], codebook.levels[-1]) == (-1.0, 1.0)
    assert codebook.levels[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_normal_float_refuses_other_bits(bits):
    normal_float(4)  # a cache must not let 4.0 pass for 4
    with pytest.raises(InvalidArgumentError, match=f"^bits .*got {bits!r}"):
        normal_float(bits)
