from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lqlora import fp4, small_float
from lqlora.codebooks import FP4_BNB, NF4
from lqlora.errors import InvalidArgumentError
from lqlora.ops import nearest_codes
from tests.strategies import host, on

#: OCP's formats, as ml_dtypes decodes all their codes.
OCP = {
    (2, 1): (ml_dtypes.float4_e2m1fn, 4),
    (2, 3): (ml_dtypes.float6_e2m3fn, 6),
    (3, 2): (ml_dtypes.float6_e3m2fn, 6),
    (4, 3): (ml_dtypes.float8_e4m3fn, 8),
    (5, 2): (ml_dtypes.float8_e5m2, 8),
}


@pytest.mark.parametrize("fields", OCP)
def test_levels_are_the_finite_numbers_of_ocp(fields):
    dtype, bits = OCP[fields]
    numbers = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)
    finite = np.unique(numbers[np.isfinite(numbers)])  # -0.0 and 0.0 become one
    assert small_float(*fields).levels.tolist() == (finite / finite[-1]).astype(np.float32).tolist()


def test_e3m0_has_powers_of_two():
    # Without a mantissa, exponent 0 has only zero and each other exponent one number.
    assert (64 * small_float(3, 0).levels[7:]).tolist() == [0, 1, 2, 4, 8, 16, 32, 64]


def test_one_bit_of_exponent_gives_equal_steps():
    assert (7 * small_float(1, 2).levels).tolist() == list(range(-7, 8))


@pytest.mark.parametrize(
    "fields", [(e, m) for e in range(1, 8) for m in range(8 - e) if (e, m) not in {(4, 3), (5, 2)}], ids=str
)
def test_all_codes_but_one_zero_are_finite_levels(fields):
    codebook = small_float(*fields)
    bits = 1 + sum(fields)
    assert (len(codebook), codebook.bits) == (2**bits - 1, bits)
    assert codebook.name == f"e{fields[0]}m{fields[1]}"
    assert codebook.levels.tolist() == (-codebook.levels[::-1]).tolist()
    assert (codebook.levels[-1], codebook.levels[len(codebook) // 2]) == (1.0, 0.0)


@pytest.mark.parametrize(("exponent", "mantissa"), [(0, 3), (8, 0), (2.0, 1), (True, 1)])
def test_exponents_out_of_range_are_refused(exponent, mantissa):
    with pytest.raises(InvalidArgumentError, match=f"^exponent_bits .*got {exponent}"):
        small_float(exponent, mantissa)


@pytest.mark.parametrize("mantissa", [-1, 7, None])
def test_mantissas_out_of_range_are_refused(mantissa):
    with pytest.raises(InvalidArgumentError, match=f"^mantissa_bits .*got {mantissa}"):
        small_float(2, mantissa)


def test_more_than_eight_bits_together_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"^exponent_bits .*mantissa_bits .*got 4 and 4"):
        small_float(4, 4)


def test_fp4_is_e2m1():
    assert fp4() == small_float(2, 1)
    assert fp4().name == "fp4"


def test_fp4_of_bitsandbytes_has_its_float32_values():
    # bitsandbytes 0.50.2, functional.get_4bit_type("fp4"), sorted.
    positive = [0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0]
    assert FP4_BNB.levels[8:].tolist() == positive
    assert FP4_BNB.levels.tolist() == [-x for x in positive[::-1]] + positive
    assert np.signbit(FP4_BNB.levels).tolist() == [True] * 8 + [False] * 8
    assert (len(FP4_BNB), FP4_BNB.bits, FP4_BNB.name) == (16, 4, "fp4-bnb")


def test_zero_becomes_the_positive_zero_of_bitsandbytes(xp):
    values = np.array([0.0, -0.0, 1e-3, -1e-3, 1e-45, -1e-45], dtype=np.float32)
    codes = host(nearest_codes(on(xp, values), FP4_BNB.boundaries))
    assert codes.tolist() == [8, 8, 8, 7, 8, 8]
    assert host(nearest_codes(on(xp, values[:2]), NF4.boundaries)).tolist() == [7, 7]
