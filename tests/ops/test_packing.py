from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora.errors import InvalidArgumentError
from lqlora.ops import pack_codes, packed_size, unpack_codes
from tests.oracles import quantize as oracle
from tests.strategies import host, on


@st.composite
def coded(draw):
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(case=coded())
def test_packing_equals_the_oracle_bit_by_bit(xp, case):
    bits, codes = case
    packed = pack_codes(on(xp, np.array(codes, dtype=np.uint8)), bits)
    assert host(packed).tobytes() == oracle.pack(codes, bits)


@given(case=coded())
def test_unpacking_undoes_packing(xp, case):
    bits, codes = case
    packed = pack_codes(on(xp, np.array(codes, dtype=np.uint8)), bits)
    unpacked = host(unpack_codes(packed, bits, len(codes)))
    assert unpacked.dtype == np.uint8
    assert unpacked.tolist() == codes


@given(bits=st.integers(1, 8), data=st.binary(max_size=40))
def test_unpacking_equals_the_oracle_on_any_bytes(xp, bits, data):
    count = 8 * len(data) // bits
    data = data[: packed_size(count, bits)]
    unpacked = unpack_codes(on(xp, np.frombuffer(data, dtype=np.uint8)), bits, count)
    assert host(unpacked).tolist() == oracle.unpack(data, bits, count)


@given(case=coded())
def test_packed_size_counts_the_bytes(case):
    bits, codes = case
    assert packed_size(len(codes), bits) == len(oracle.pack(codes, bits))


def test_three_bits_are_laid_out_as_drawn_in_the_documentation():
    # One code at a time: which bits of which byte it sets, as the drawing of the module has it.
    expected = {0: (0b111, 0, 0), 2: (0b11000000, 0b1, 0), 5: (0, 0b10000000, 0b11), 7: (0, 0, 0b11100000)}
    for position, packed in expected.items():
        codes = np.zeros(8, dtype=np.uint8)
        codes[position] = 7
        assert pack_codes(codes, 3).tolist() == list(packed)


def test_packing_leaves_the_codes_alone(xp):
    codes = on(xp, np.array([1, 2, 3], dtype=np.uint8))
    pack_codes(codes, 3)
    assert host(codes).tolist() == [1, 2, 3]


def test_packing_takes_strided_codes(xp):
    codes = on(xp, np.arange(12, dtype=np.uint8))[::2]
    assert host(pack_codes(codes, 4)).tobytes() == oracle.pack([0, 2, 4, 6, 8, 10], 4)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range_are_refused(xp, bits):
    codes = on(xp, np.zeros(1, dtype=np.uint8))
    with pytest.raises(InvalidArgumentError, match=f"bits.*1 and 8.*{bits}"):
        pack_codes(codes, bits)
    with pytest.raises(InvalidArgumentError, match=f"bits.*1 and 8.*{bits}"):
        unpack_codes(codes, bits, 1)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_wrong_number_of_bytes_is_refused(xp, length):
    packed = on(xp, np.zeros(length, dtype=np.uint8))
    with pytest.raises(InvalidArgumentError, match=f"packed.*3 bytes.*got {length}"):
        unpack_codes(packed, 3, 8)
