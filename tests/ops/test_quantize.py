from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook
from lqlora.ops import decode, encode, nearest_codes, pack_codes, unpack_codes
from lqlora.testing.strategies import ALL_CODEBOOKS, ties, weights
from tests.oracles import quantize as oracle
from tests.strategies import host, on

codebooks = st.sampled_from(ALL_CODEBOOKS) | st.lists(
    st.floats(-2, 2, width=32), min_size=2, max_size=40, unique=True
).map(lambda levels: Codebook(sorted(levels)))
#: Entries between, beyond, and on the boundaries of codebooks.
values = st.floats(-1.5, 1.5, width=32) | st.sampled_from([-np.inf, np.inf, 0.0, -0.0, 3e38, -3e38])


@given(codebook=codebooks, entries=st.lists(values, max_size=20), dtype=st.sampled_from([np.float32, np.float64]))
def test_nearest_level_by_brute_force(xp, codebook, entries, dtype):
    entries = np.array([*entries, *codebook.boundaries, *codebook.levels], dtype=dtype)
    codes = host(nearest_codes(on(xp, entries), codebook.boundaries))
    assert codes.dtype == np.uint8
    assert codes.tolist() == [oracle.nearest(float(value), codebook.levels) for value in entries]


@given(codebook=codebooks, value=st.floats(-1.5, 1.5, width=32))
def test_no_level_is_nearer_in_exact_arithmetic(codebook, value):
    code = int(nearest_codes(np.array([value], dtype=np.float32), codebook.boundaries)[0])
    distances = [abs(Fraction(value) - Fraction(level)) for level in codebook.levels.tolist()]
    # The boundaries are midpoints rounded to float32: that is all a nearer level can gain.
    assert distances[code] <= min(distances) + Fraction(float(np.spacing(np.float32(2.0))))


@given(codebook=codebooks)
def test_at_a_midpoint_the_lower_index_wins(xp, codebook):
    just_above = np.nextafter(codebook.boundaries, np.float32(np.inf))
    lower = np.arange(len(codebook) - 1)
    # Levels that are neighbors in float32 have no number between them: a midpoint is then a level itself.
    apart = just_above <= codebook.levels[1:]
    assert (
        host(nearest_codes(on(xp, codebook.boundaries[apart]), codebook.boundaries)).tolist() == lower[apart].tolist()
    )
    assert (host(nearest_codes(on(xp, just_above[apart]), codebook.boundaries)) > lower[apart]).all()


@pytest.mark.parametrize("codebook", ALL_CODEBOOKS, ids=lambda codebook: codebook.name)
def test_every_level_is_nearest_to_itself(xp, codebook):
    codes = nearest_codes(on(xp, np.array(codebook.levels)), codebook.boundaries)
    assert host(codes).tolist() == list(range(len(codebook)))


@pytest.mark.parametrize("codebook", [NF4, ALL_CODEBOOKS[3]], ids=["few levels", "many levels"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 0, 2)])
def test_codes_have_the_shape_of_the_values(xp, codebook, shape):
    codes = nearest_codes(on(xp, np.full(shape, 0.3, dtype=np.float32)), codebook.boundaries)
    assert tuple(codes.shape) == shape


@pytest.mark.parametrize("codebook", [NF4, ALL_CODEBOOKS[3]], ids=["few levels", "many levels"])
def test_transposed_values_give_transposed_codes(xp, codebook):
    grid = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
    codes = nearest_codes(xp.matrix_transpose(on(xp, grid)), codebook.boundaries)
    assert host(codes).tolist() == nearest_codes(grid, codebook.boundaries).T.tolist()


@given(
    w=weights(shape=st.tuples(st.integers(0, 150))), codebook=st.sampled_from(ALL_CODEBOOKS), size=st.integers(1, 70)
)
def test_encoding_equals_the_oracle(xp, w, codebook, size):
    fmt = BlockFormat(codebook, size)
    scales = np.array([oracle.absmax(block) for block in oracle.blocks_of(w, size)], dtype=np.float32)
    packed = encode(on(xp, w), on(xp, scales), codebook.boundaries, codebook.bits, size)
    assert host(packed).tobytes() == oracle.pack(oracle.codes_of(w, scales, fmt), codebook.bits)


@given(data=st.data(), codebook=st.sampled_from(ALL_CODEBOOKS))
def test_ties_encode_as_in_the_oracle(xp, data, codebook):
    w = data.draw(ties(codebook))
    fmt = BlockFormat(codebook, len(w))
    scales = np.array([oracle.absmax(w)], dtype=np.float32)
    packed = encode(on(xp, w), on(xp, scales), codebook.boundaries, codebook.bits, len(w))
    codes = host(unpack_codes(packed, codebook.bits, len(w))).tolist()
    assert codes == oracle.codes_of(w, scales, fmt)
    # A power of two divides exactly, so these are ties, not nearly ties.
    assert sorted(codes[1:]) == list(range(len(codebook) - 1))


@given(w=weights(shape=st.tuples(st.integers(1, 60))), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_encoding_takes_scales_that_are_no_absolute_maximum(xp, w, size, seed):
    # Quantized scales are off; some are zero, and some far too small for their weights.
    scales = np.random.default_rng(seed).choice(np.array([0, 1e-45, 1e-38, 1, 1e38], np.float32), -(-len(w) // size))
    packed = encode(on(xp, w), on(xp, scales), NF4.boundaries, 4, size)
    assert host(packed).tobytes() == oracle.pack(oracle.codes_of(w, scales, BlockFormat(NF4, size)), 4)


@given(
    codebook=st.sampled_from(ALL_CODEBOOKS), size=st.integers(1, 70), count=st.integers(0, 150), seed=st.integers(0, 99)
)
def test_decoding_equals_the_oracle(xp, codebook, size, count, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(codebook), count).astype(np.uint8)
    scales = (2.0 ** rng.uniform(-126, 127, -(-count // size))).astype(np.float32)
    packed = pack_codes(on(xp, codes), codebook.bits)
    found = decode(packed, on(xp, scales), codebook.levels, codebook.bits, size, count)
    assert host(found).tobytes() == oracle.decode(codes.tolist(), scales, BlockFormat(codebook, size)).tobytes()


def test_a_block_of_scale_zero_decodes_to_zero(xp):
    w = on(xp, np.array([0.0, -0.0, 1.0, -1.0], dtype=np.float32))
    scales = on(xp, np.array([0.0, 1.0], dtype=np.float32))
    packed = encode(w, scales, NF4.boundaries, 4, 2)
    assert host(decode(packed, scales, NF4.levels, 4, 2, 4)).tolist() == [0.0, 0.0, 1.0, -1.0]
