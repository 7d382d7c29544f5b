from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import NF4, Codebook, normal_float, uniform
from lqlora.codebooks import by_name
from lqlora.errors import FormatError, InvalidArgumentError

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


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_levels_are_symmetric_about_an_exact_zero(bits):
    codebook = uniform(bits)
    assert (len(codebook), codebook.bits, codebook.name) == (2**bits - 1, bits, f"int{bits}")
    assert codebook.levels.tolist() == (-codebook.levels[::-1]).tolist()
    assert codebook.levels[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_levels_go_from_zero_to_one(bits):
    codebook = uniform(bits, signed=False)
    assert codebook.levels.tolist() == [float(np.float32(k / (2**bits - 1))) for k in range(2**bits)]
    assert (codebook.bits, codebook.name) == (bits, f"uint{bits}")


@given(levels=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=256, unique=True))
def test_boundaries_are_midpoints_between_their_levels(levels):
    codebook = Codebook(sorted(levels))
    low, high = codebook.levels[:-1], codebook.levels[1:]
    assert codebook.boundaries.tolist() == ((low.astype(float) + high) / 2).astype(np.float32).tolist()
    assert ((low <= codebook.boundaries) & (codebook.boundaries <= high)).all()


@pytest.mark.parametrize(("count", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (255, 8), (256, 8)])
def test_bits_hold_the_number_of_levels(count, bits):
    assert Codebook(range(count)).bits == bits


def test_a_codebook_does_not_change():
    levels = np.array([-1.0, 1.0], dtype=np.float32)
    codebook = Codebook(levels)
    levels[0] = 5.0
    assert codebook.levels.tolist() == [-1.0, 1.0]
    for array in (codebook.levels, codebook.boundaries):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


def test_equality_compares_levels_only():
    assert Codebook([0, 1], name="one") == Codebook([0, 1], name="another")
    assert hash(Codebook([0, 1])) == hash(Codebook([0.0, 1.0]))
    assert Codebook([0, 1]) != Codebook([0, 2])
    assert Codebook([0, 1]) != "uint1"


@pytest.mark.parametrize("levels", [[], [1.0], [[0.0, 1.0]], list(range(257))])
def test_a_wrong_number_of_levels_is_refused(levels):
    with pytest.raises(InvalidArgumentError, match="2 to 256 levels in one dimension"):
        Codebook(levels)


@pytest.mark.parametrize("levels", [[1, 0], [0, 0], [0, 1e-46], [0, np.nan], [-np.inf, 0], [0, 1e39]])
def test_levels_that_do_not_increase_in_float32_are_refused(levels):
    with pytest.raises(InvalidArgumentError, match="finite and strictly increasing in float32"):
        Codebook(levels)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_normal_float_refuses_other_bits(bits):
    normal_float(4)  # a cache must not let 4.0 pass for 4
    with pytest.raises(InvalidArgumentError, match="2 to 8 bits"):
        normal_float(bits)


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (9, True), (0, False), (9, False), (4.0, True), (True, False)])
def test_uniform_refuses_other_bits(bits, signed):
    uniform(4), uniform(1, signed=False)  # a cache must not let 4.0 pass for 4, nor True for 1
    with pytest.raises(InvalidArgumentError, match="Uniform codebooks take"):
        uniform(bits, signed=signed)


@pytest.mark.parametrize("family", ["nf", "int", "uint"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_names_are_read_back(family, bits):
    assert by_name(f"{family}{bits}").name == f"{family}{bits}"


@pytest.mark.parametrize(
    "name", ["", "nf", "4", "fp4", "nf9", "nf1", "int1", "uint0", "NF4", "nf4 ", "nf-4", "nf" + "4" * 5000]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(FormatError, match="Unknown codebook"):
        by_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a:b", "4nf"])
def test_names_that_a_format_cannot_spell_are_refused(name):
    with pytest.raises(InvalidArgumentError, match="is named by"):
        Codebook([-1, 1], name=name)
