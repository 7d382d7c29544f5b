from __future__ import annotations

import numpy as np
import pytest

from lqlora import affine, uniform
from lqlora.errors import InvalidArgumentError


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


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_to_a_maximum_with_its_sign_are_all_integers(bits):
    codebook = uniform(bits, normalization="signed")
    assert codebook.levels.tolist() == list(range(1 - 2 ** (bits - 1), 2 ** (bits - 1) + 1))
    assert (codebook.bits, codebook.name, codebook.normalization) == (bits, f"int{bits}s", "signed")


@pytest.mark.parametrize("signed", [True, False])
def test_uniform_refuses_other_normalizations(signed):
    with pytest.raises(InvalidArgumentError, match="normalization must"):
        uniform(4, signed=signed, normalization="affine" if signed else "signed")


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (9, True), (0, False), (9, False), (4.0, True), (True, False)])
def test_uniform_refuses_other_bits(bits, signed):
    uniform(4), uniform(1, signed=False)  # a cache must not let 4.0 pass for 4, nor True for 1
    with pytest.raises(InvalidArgumentError, match=f"^bits .*got {bits}"):
        uniform(bits, signed=signed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_levels_are_the_codes_themselves(bits):
    codebook = affine(bits)
    assert codebook.levels.tolist() == list(range(2**bits))
    assert (codebook.bits, codebook.name, codebook.normalization) == (bits, f"affine{bits}", "affine")
    assert codebook.widest == 2**bits - 1


def test_affine_levels_leave_room_for_zero_points():
    for bits, own in ((1, 8), (2, 4), (3, 3), (4, 6)):
        codebook = affine(bits, own)
        assert codebook.levels.tolist() == [code * 2 ** (own - bits) for code in range(2**bits)]
        assert (codebook.bits, codebook.zero_point_bits) == (bits, own)
        assert codebook.name == (f"affine{bits}" if own == bits else f"affine{bits}-{own}")
    assert affine(3, 3) == affine(3)
    assert affine(2, 4) != affine(2)
    assert uniform(4).zero_point_bits == 0
    for wrong in (1, 9, 4.0, True):
        with pytest.raises(InvalidArgumentError, match=f"^zero_point_bits .*got {wrong}"):
            affine(2, wrong)


@pytest.mark.parametrize("bits", [0, 9, 4.0, True])
def test_affine_refuses_other_bits(bits):
    affine(1), affine(4)
    with pytest.raises(InvalidArgumentError, match=f"^bits .* 1 to 8 .*got {bits}"):
        affine(bits)
