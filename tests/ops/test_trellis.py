from __future__ import annotations

import itertools

import numpy as np
import pytest

import lqlora as lq
from lqlora.codebooks import trellis_code
from lqlora.errors import InvalidArgumentError
from lqlora.ops import (
    PackedTrellis,
    decode_trellis,
    encode_trellis,
    matmul_trellis,
    unpack_codes,
)
from lqlora.ops.trellis import SEQUENCE, trellis_codes, trellis_values
from tests.oracles import trellis as oracle
from tests.strategies import host, on


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def least_error(row, book, importance=1.0):
    """Return the error of the best of all tail-biting sequences."""
    choices = itertools.product(range(len(book)), repeat=len(row))
    values = np.array([oracle.values_of(own, book) for own in choices], dtype=np.float64)
    return float((importance * (row - values) ** 2).sum(axis=1).min())


@pytest.mark.parametrize(
    ("book", "count"),
    [
        (trellis_code(1, 4), 11),
        (trellis_code(2, 4), 5),
        (trellis_code(2, 5), 5),
        (trellis_code(1, 10), 8),
        (trellis_code(2), 4),
        (trellis_code(4), 2),
    ],
)
def test_sequences_are_nearly_the_best_of_all(book, count):
    rows = normal(40, count)
    found = host(trellis_values(trellis_codes(rows, None, book.levels, book.bits), book.levels, book.bits))
    errors = ((rows - found.astype(np.float64)) ** 2).sum(axis=1)
    best = np.array([least_error(row, book) for row in rows])
    assert (errors > best * (1 - 1e-5)).all()
    # Only the state at the seam is chosen by a rule of thumb. A sequence no longer than a state is the best of all.
    assert errors.mean() < 1.5 * best.mean()
    if count * book.bits <= book.state_bits:
        np.testing.assert_allclose(errors, best, rtol=1e-5)


@pytest.mark.parametrize(
    "book", [trellis_code(1, 4), trellis_code(2, 5), trellis_code(3, 8)], ids=lambda book: book.name
)
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_states_are_windows_of_the_circular_stream(xp, book, count):
    codes = np.random.default_rng(0).integers(0, len(book), (4, count)).astype(np.uint8)
    found = host(trellis_values(on(xp, codes), book.levels, book.bits))
    assert found.tolist() == [[float(value) for value in oracle.values_of(row.tolist(), book)] for row in codes]


@pytest.mark.parametrize(
    "book", [trellis_code(1, 4), trellis_code(2, 5), trellis_code(3, 8)], ids=lambda book: book.name
)
@pytest.mark.parametrize("count", [1, 2, 9, 70, SEQUENCE])
def test_codes_equal_the_oracle(xp, book, count):
    rows = normal(2, count) * np.float32(1.5)
    found = host(trellis_codes(on(xp, rows), None, book.levels, book.bits))
    assert found.tolist() == [oracle.codes_of(row, book) for row in rows]


@pytest.mark.parametrize(("length", "block_size"), [(130, 64), (70, 7), (600, 600), (300, 260), (64, 64)])
def test_each_sequence_is_coded_by_itself(xp, length, block_size):
    book = trellis_code(2, 5)
    flat, per_line = normal(2 * length), -(-length // block_size)
    scales = np.abs(normal(2 * per_line, seed=1)) + np.float32(0.5)
    options = book.levels, book.bits, block_size, length
    packed = encode_trellis(on(xp, flat), on(xp, scales), None, *options)
    expected, values, number = [], [], 0
    for line in flat.reshape(2, length):
        for start in range(0, length, block_size):
            for part in oracle.sequences_of(line[start : min(start + block_size, length)] / scales[number]):
                codes = oracle.codes_of(part, book)
                expected += codes
                values += [unit * scales[number] for unit in oracle.values_of(codes, book)]
            number += 1
    assert host(unpack_codes(packed, book.bits, 2 * length)).tolist() == expected
    out = on(xp, np.zeros(2 * length, dtype=np.float32))
    decoded = host(decode_trellis(PackedTrellis(packed, on(xp, scales), *options), out))
    assert decoded.tolist() == np.array(values, dtype=np.float32).tolist()
    x = on(xp, normal(3, length, seed=2))
    product = matmul_trellis(x, PackedTrellis(packed, on(xp, scales), *options), on(xp, np.zeros((3, 2), np.float32)))
    np.testing.assert_allclose(host(product), host(x) @ decoded.reshape(2, length).T, rtol=1e-4, atol=1e-4)


def test_what_is_important_has_less_error(xp):
    book, rows = trellis_code(2, 6), normal(40, 32)
    importance = np.where(np.arange(32) < 8, 20, 1).astype(np.float32) * np.ones_like(rows)
    errors = []
    for own in (None, on(xp, importance)):
        codes = trellis_codes(on(xp, rows), own, book.levels, book.bits)
        errors.append((host(trellis_values(codes, book.levels, book.bits)) - rows) ** 2)
    plain, weighted = errors
    assert (importance * weighted).sum() < 0.85 * (importance * plain).sum()
    assert weighted.sum() > plain.sum()


def test_the_importance_of_a_short_sequence_counts(xp):
    book, rows = trellis_code(1, 10), normal(6, 8)
    importance = np.random.default_rng(1).random((6, 8)).astype(np.float32)
    codes = trellis_codes(on(xp, rows), on(xp, importance), book.levels, book.bits)
    found = host(trellis_values(codes, book.levels, book.bits)).astype(np.float64)
    errors = (importance * (rows - found) ** 2).sum(axis=1)
    np.testing.assert_allclose(
        errors, [least_error(*own) for own in zip(rows, [book] * 6, importance, strict=True)], rtol=1e-5
    )


def test_a_block_without_a_scale_becomes_zeros(xp):
    book, scales = trellis_code(2), np.array([0.0, 1.0], dtype=np.float32)
    packed = encode_trellis(on(xp, normal(32)), on(xp, scales), None, book.levels, 2, 16, 32)
    stored = PackedTrellis(packed, on(xp, scales), book.levels, 2, 16, 32)
    decoded = host(decode_trellis(stored, on(xp, np.ones(32, dtype=np.float32))))
    assert not decoded[:16].any()
    assert decoded[16:].all()


def test_nothing_becomes_nothing(xp):
    book, none = trellis_code(2), on(xp, np.zeros(0, dtype=np.float32))
    assert encode_trellis(none, none, None, book.levels, 2, 16, 0).shape == (0,)
    assert trellis_codes(on(xp, np.zeros((0, 5), dtype=np.float32)), None, book.levels, 2).shape == (0, 5)
    packed = on(xp, np.zeros(0, dtype=np.uint8))
    assert decode_trellis(PackedTrellis(packed, none, book.levels, 2, 16, 0), none).shape == (0,)


def test_far_weights_do_not_overflow(xp):
    book = trellis_code(2)
    rows = np.array([[3e38, -3e38, 1e30, 0, 1, -1, 2, 3]], dtype=np.float32)
    codes = trellis_codes(on(xp, rows), None, book.levels, 2)
    found = host(trellis_values(codes, book.levels, 2))
    assert (np.sign(found[0, :3]) == np.sign(rows[0, :3])).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": np.zeros(12, np.float32)}, "states"),
        ({"levels": np.zeros((4, 4), np.float32)}, "states"),
        ({"bits": 3}, "states"),
        ({"block_size": 0}, "block_size"),
        ({"length": 5}, "length"),
        ({"scales": np.ones(3, np.float32)}, "scales"),
        ({"importance": np.ones(3, np.float32)}, "importance"),
    ],
)
def test_wrong_shapes_are_refused(changes, words):
    given = {"flat": normal(32), "scales": np.ones(2, np.float32), "importance": None, "levels": trellis_code(2, 5).levels,
             "bits": 2, "block_size": 16, "length": 32}  # fmt: skip
    encode_trellis(**given)
    with pytest.raises(InvalidArgumentError, match=words):
        encode_trellis(**(given | changes))


def test_stored_arrays_of_another_size_are_refused():
    stored = PackedTrellis(np.zeros(8, np.uint8), np.ones(2, np.float32), trellis_code(2, 5).levels, 2, 16, 32)
    decode_trellis(stored, np.empty(32, np.float32))
    for changes in ({"packed": np.zeros(7, np.uint8)}, {"scales": np.ones(1, np.float32)}):
        with pytest.raises(InvalidArgumentError, match="stored must hold"):
            decode_trellis(stored._replace(**changes), np.empty(32, np.float32))


@pytest.mark.parametrize(("columns", "lines"), [(65, "rows"), (64, "whole"), (64, "pairs of rows")])
def test_large_matrices_are_decoded_a_few_rows_at_a_time(columns, lines):
    book, rows, rng = trellis_code(2, 5), 10_000, np.random.default_rng(0)
    length = {"rows": columns, "whole": rows * columns, "pairs of rows": 2 * columns}[lines]
    packed = rng.integers(0, 256, rows * columns // 4).astype(np.uint8)
    scales = rng.random(rows * columns // length * -(-length // 64)).astype(np.float32)
    stored = PackedTrellis(packed, scales, book.levels, 2, 64, length)
    dense = decode_trellis(stored, np.empty(rows * columns, dtype=np.float32)).reshape(rows, columns)
    x = normal(2, columns)
    with lq.forced("reference"):
        found = matmul_trellis(x, stored, np.empty((2, rows), dtype=np.float32))
    np.testing.assert_allclose(found, x @ dense.T, rtol=1e-4, atol=1e-4)


def test_arrays_that_do_not_hold_the_weights_do_not_fit():
    stored = PackedTrellis(np.zeros(8, np.uint8), np.ones(2, np.float32), trellis_code(2, 5).levels, 2, 16, 32)
    assert stored.fits(32)
    for changes in (
        {"packed": stored.packed[:7]},
        {"scales": stored.scales[:1]},
        {"levels": stored.levels[:9]},
        {"length": 31},
    ):
        assert not stored._replace(**changes).fits(32)
