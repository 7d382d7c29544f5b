from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqlora import NF4, BlockFormat, Codebook, affine
from lqlora.errors import InvalidArgumentError
from lqlora.ops import (
    PackedBlocks,
    boundaries_by_set,
    decode,
    encode,
    nearest_codes,
    nearest_codes_by_row,
    normalize,
    pack_codes,
    values_by_row,
)
from lqlora.testing.strategies import ALL_CODEBOOKS, ties, weights
from tests.oracles import quantize as oracle
from tests.strategies import host, normal_numbers, on

absmax_codebooks = st.sampled_from([book for book in ALL_CODEBOOKS if book.normalization == "absmax"])
#: Levels far apart, and clusters of levels closer to each other than buckets are wide.
clustered = st.lists(
    st.floats(-2, 2, width=32) | st.integers(0, 99).map(lambda i: float(np.float32(0.5 + i * 2.0**-22))),
    min_size=2, max_size=120, unique=True,
)  # fmt: skip
codebooks = st.sampled_from(ALL_CODEBOOKS) | clustered.map(lambda levels: Codebook(sorted(levels)))
#: Entries between, beyond, and on the boundaries of codebooks.
values = st.floats(-1.5, 1.5, width=32) | st.sampled_from([-np.inf, np.inf, 0.0, -0.0, 3e38, -3e38])


@given(codebook=codebooks, entries=st.lists(values, max_size=20), dtype=st.sampled_from([np.float32, np.float64]))
def test_nearest_level_by_brute_force(xp, codebook, entries, dtype):
    cuts = codebook.boundaries.astype(dtype)
    around = np.concatenate([cuts, np.nextafter(cuts, -np.inf), np.nextafter(cuts, np.inf)])
    entries = np.array([*entries, *around, *codebook.levels], dtype=dtype)
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
    apart = (just_above <= codebook.levels[1:]) & (codebook.boundaries > codebook.levels[:-1])
    assert (
        host(nearest_codes(on(xp, codebook.boundaries[apart]), codebook.boundaries)).tolist() == lower[apart].tolist()
    )
    assert (host(nearest_codes(on(xp, just_above[apart]), codebook.boundaries)) > lower[apart]).all()


@given(codebook=codebooks, seed=st.integers(0, 99), dtype=st.sampled_from([np.float32, np.float64]))
@settings(max_examples=30)
def test_the_search_by_buckets_is_that_of_the_reference(fast_xp, codebook, seed, dtype):
    cuts = codebook.boundaries.astype(dtype)
    rng = np.random.default_rng(seed)
    entries = [
        cuts,
        np.nextafter(cuts, dtype(-np.inf)),
        np.nextafter(cuts, dtype(np.inf)),
        rng.standard_normal(200) * 10.0 ** rng.integers(-9, 9, 200),
    ]
    entries = np.concatenate([*entries, [np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45]]).astype(dtype)
    found = nearest_codes(on(fast_xp, entries), codebook.boundaries)
    assert host(found).tobytes() == host(nearest_codes.reference(on(fast_xp, entries), codebook.boundaries)).tobytes()


@pytest.mark.parametrize("codebook", ALL_CODEBOOKS, ids=lambda codebook: codebook.name)
def test_nan_has_some_code(xp, codebook):
    codes = host(nearest_codes(on(xp, np.array([np.nan, 1.0], dtype=np.float32)), codebook.boundaries))
    assert codes[0] < len(codebook)
    assert codes[1] == oracle.nearest(1.0, codebook.levels)


@pytest.mark.parametrize("step", [2.0**-149, 1e-40, 1e-38])
def test_many_levels_within_a_tiny_range_are_told_apart(step):
    codebook = Codebook(np.arange(40) * step)
    codes = nearest_codes(np.array(codebook.levels), codebook.boundaries)
    assert codes.tolist() == nearest_codes.reference(np.array(codebook.levels), codebook.boundaries).tolist()


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


def zeros_for(codebook, blocks, seed=0):
    """Zero points of blocks, or None where the codebook has none; for a library and for the oracle."""
    if codebook.normalization != "affine":
        return None
    return np.random.default_rng(seed).integers(0, len(codebook), blocks).astype(np.uint8)


@given(
    w=weights(shape=st.tuples(st.integers(0, 150))), codebook=st.sampled_from(ALL_CODEBOOKS), size=st.integers(1, 70)
)
def test_encoding_equals_the_oracle(xp, w, codebook, size):
    fmt = BlockFormat(codebook, size)
    scales = np.array([oracle.absmax(block) for block in oracle.blocks_of(w, size)], dtype=np.float32)
    zeros = zeros_for(codebook, len(scales))
    codes = encode(on(xp, w), on(xp, scales), None if zeros is None else on(xp, zeros), codebook.boundaries, size)
    assert host(codes).dtype == np.uint8
    assert host(codes).tolist() == oracle.codes_of(w, scales, fmt, zeros)


@given(data=st.data(), codebook=absmax_codebooks)
def test_ties_encode_as_in_the_oracle(xp, data, codebook):
    w = data.draw(ties(codebook))
    fmt = BlockFormat(codebook, len(w))
    scales = np.array([oracle.absmax(w)], dtype=np.float32)
    codes = host(encode(on(xp, w), on(xp, scales), None, codebook.boundaries, len(w))).tolist()
    assert codes == oracle.codes_of(w, scales, fmt)
    # A power of two divides exactly, so these are ties, not nearly ties.
    apart = np.arange(len(codebook) - 1)[codebook.boundaries < codebook.levels[1:]]
    assert set(apart.tolist()) <= set(codes[1:])


@given(
    w=weights(shape=st.tuples(st.integers(1, 60))),
    size=st.integers(1, 30),
    seed=st.integers(0, 99),
    codebook=st.sampled_from([NF4, affine(3)]),
)
def test_encoding_takes_scales_that_are_no_absolute_maximum(xp, w, size, seed, codebook):
    # Quantized scales are off; some are zero, some have a sign, and some are far too small for their weights.
    blocks = -(-len(w) // size)
    sizes = normal_numbers(xp, np.array([0, -0.0, 1e-45, 1e-38, 1, -1, 1e38], np.float32))
    w, scales = normal_numbers(xp, w), np.random.default_rng(seed).choice(sizes, blocks)
    zeros = zeros_for(codebook, blocks, seed)
    codes = encode(on(xp, w), on(xp, scales), None if zeros is None else on(xp, zeros), codebook.boundaries, size)
    assert host(codes).tolist() == oracle.codes_of(w, scales, BlockFormat(codebook, size), zeros)


@given(
    codebook=st.sampled_from(ALL_CODEBOOKS), size=st.integers(1, 70), count=st.integers(0, 150), seed=st.integers(0, 99)
)
def test_decoding_equals_the_oracle(xp, codebook, size, count, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(codebook), count).astype(np.uint8)
    scales = (rng.choice([-1, 1], -(-count // size)) * 2.0 ** rng.uniform(-126, 119, -(-count // size))).astype(
        np.float32
    )
    zeros = zeros_for(codebook, len(scales), seed)
    packed = pack_codes(on(xp, codes), codebook.bits)
    own = None if zeros is None else on(xp, zeros)
    out = on(xp, np.full(count, 9, dtype=np.float32))
    found = decode(PackedBlocks(packed, on(xp, scales), own, codebook.levels, codebook.bits, size), out)
    assert found is out or host(found).tobytes() == host(out).tobytes()
    expected = oracle.decode(codes.tolist(), scales, BlockFormat(codebook, size), zero_points=zeros)
    assert host(found).tobytes() == expected.tobytes()


def test_a_block_of_scale_zero_decodes_to_zero(xp):
    w = on(xp, np.array([0.0, -0.0, 1.0, -1.0], dtype=np.float32))
    scales = on(xp, np.array([0.0, 1.0], dtype=np.float32))
    packed = pack_codes(encode(w, scales, None, NF4.boundaries, 2), 4)
    out = on(xp, np.full(4, 9, dtype=np.float32))
    assert host(decode(PackedBlocks(packed, scales, None, NF4.levels, 4, 2), out)).tolist() == [0.0, 0.0, 1.0, -1.0]


@given(
    rows=st.integers(1, 5),
    columns=st.integers(0, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_rows_are_divided_and_shifted(xp, rows, columns, seed, dtype):
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((rows, columns)).astype(dtype)
    sizes = normal_numbers(xp, np.array([0, -2, 0.3, 1e-40], dtype))
    scales, zeros = rng.choice(sizes, rows), rng.integers(0, 16, rows).astype(np.uint8)
    with np.errstate(over="ignore"):
        expected = [
            [value / scale if scale else dtype(0) for value in row] for row, scale in zip(blocks, scales, strict=True)
        ]
    found = host(normalize(on(xp, blocks), on(xp, scales)))
    assert found.dtype == dtype
    assert found.tolist() == [[float(value) for value in row] for row in expected]
    found = host(normalize(on(xp, blocks), on(xp, scales), on(xp, zeros)))
    assert found.dtype == dtype
    assert found.tolist() == [
        [float(value + dtype(zero)) for value in row] for row, zero in zip(expected, zeros, strict=True)
    ]


@given(
    sets=st.lists(st.sampled_from([book for book in ALL_CODEBOOKS if len(book) == 16]), min_size=1, max_size=3),
    columns=st.integers(0, 8),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_each_row_is_rounded_to_levels_of_its_own(xp, sets, columns, seed, dtype):
    rng = np.random.default_rng(seed)
    levels = np.stack([book.levels for book in sets])
    members = rng.integers(0, len(sets), 6)
    entries = np.clip(rng.standard_normal((6, columns)), -1, 1)
    cuts = np.stack([sets[member].boundaries[rng.integers(0, 15, 4)] for member in members])
    rows = np.concatenate([entries, cuts], axis=1).astype(dtype)
    codes = nearest_codes_by_row(on(xp, rows), boundaries_by_set(on(xp, levels)), on(xp, members))
    expected = [
        [oracle.nearest(float(value), levels[member]) for value in row]
        for row, member in zip(rows, members, strict=True)
    ]
    assert host(codes).dtype == np.uint8
    assert host(codes).tolist() == expected
    found = host(values_by_row(codes, on(xp, levels), on(xp, members)))
    assert found.dtype == np.float32
    assert found.tolist() == [
        [float(levels[member][code]) for code in row] for row, member in zip(expected, members, strict=True)
    ]


def test_of_two_zeros_in_a_row_of_levels_the_upper_one_is_taken(xp):
    # As by a codebook: from minus the smallest normal number on, whatever becomes of subnormal numbers in a library.
    tiny = np.float32(2.0**-126)
    levels = np.array([[-1, -0.0, 0.0, 1], [-1, 0.5, 0.75, 1]], dtype=np.float32)
    entries = np.array([[-0.75, -2 * tiny, -tiny, -tiny / 2, -0.0, 0.0, tiny, 0.75]], dtype=np.float32)
    codes = host(nearest_codes_by_row(on(xp, entries), boundaries_by_set(on(xp, levels)), on(xp, np.array([0]))))
    assert codes.tolist() == [[0, 1, 1, 2, 2, 2, 2, 3]]
    assert codes[0].tolist() == nearest_codes(entries[0], Codebook(levels[0]).boundaries).tolist()


FITTING = PackedBlocks(np.zeros(13, np.uint8), np.ones(4, np.float32), np.zeros(4, np.uint8), NF4.levels, 4, 7)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"zero_points": None}, True),
        ({"packed": np.zeros(12, np.uint8)}, False),
        ({"packed": np.zeros((1, 13), np.uint8)}, False),
        ({"scales": np.ones(3, np.float32)}, False),
        ({"zero_points": np.zeros(5, np.uint8)}, False),
        ({"bits": 3}, False),
        ({"block_size": 0}, False),
        ({"block_size": 8}, True),
        ({"block_size": 9}, False),
    ],
    ids=str,
)
def test_kernels_are_given_arrays_of_the_lengths_that_the_weights_take(changes, fits):
    assert FITTING._replace(**changes).fits(25) is fits


def test_codes_and_sizes_that_do_not_exist_are_refused(xp):
    sets, levels = on(xp, np.array([0])), on(xp, np.array([[-1, 1]], dtype=np.float32))
    with pytest.raises(InvalidArgumentError, match=r"^codes must be below 2.* got 2"):
        values_by_row(on(xp, np.array([[2]], dtype=np.uint8)), levels, sets)
    packed, scales = on(xp, np.zeros(4, np.uint8)), on(xp, np.ones(1, np.float32))
    with pytest.raises(InvalidArgumentError, match=r"^stored must .*8 codes"):
        decode(PackedBlocks(packed, scales, None, NF4.levels, 4, 2), on(xp, np.zeros(8, dtype=np.float32)))
