from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import lqlora as lq
from lqlora import ops
from lqlora.codebooks import Trellis, by_name, is_standard, trellis_code
from lqlora.errors import FormatError, InvalidArgumentError


@pytest.mark.parametrize(
    ("name", "bits", "state_bits"), [("tcq1", 1, 10), ("tcq2", 2, 10), ("tcq3-12", 3, 12), ("tcq4-8", 4, 8)]
)
def test_names_say_the_bits(name, bits, state_bits):
    book = by_name(name)
    assert isinstance(book, Trellis)
    assert book == trellis_code(bits, state_bits)
    assert (book.bits, book.state_bits, book.name) == (bits, state_bits, name)
    assert (len(book), book.levels.shape, book.boundaries.shape) == (2**bits, (2**state_bits,), (0,))
    assert (book.normalization, book.widest) == ("rms", 1.0)
    assert is_standard(book)


def test_levels_are_the_computed_code_of_qtip():
    # One state by hand: 1 * 34038481 + 76625530 = 110664011 = 0x0698994B, whose bytes sum to 6 + 152 + 153 + 75.
    level = np.float32(6 + 152 + 153 + 75 - 510) * np.float32(1.04 / 147.8)
    assert trellis_code(2, 12).levels[1] == level
    for state_bits in (11, 12, 16):
        levels = trellis_code(2, state_bits).levels.astype(np.float64) / 1.04
        assert abs(levels.mean()) < 0.1
        assert levels.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("state_bits", range(4, 11))
def test_levels_of_few_states_are_trained(state_bits):
    for bits in range(1, min(4, state_bits // 2) + 1):
        levels = trellis_code(bits, state_bits).levels
        assert (levels.dtype, levels.shape) == (np.dtype(np.float32), (2**state_bits,))
        assert np.all(levels * 4096 == np.rint(levels * 4096))
        assert abs(levels.mean(dtype=np.float64)) < 0.1
        assert 1.6 < np.max(np.abs(levels)) < 4
        assert len(np.unique(levels)) > 0.9 * len(levels)


def test_trained_levels_are_the_means_of_the_weights_that_take_them():
    w = np.random.default_rng(0).standard_normal((8192, 64)).astype(np.float32)
    w /= np.sqrt((w.astype(np.float64) ** 2).mean(axis=1, keepdims=True)).astype(np.float32)
    levels, ones = trellis_code(2, 8).levels, np.ones(8192, dtype=np.float32)
    packed = ops.encode_trellis(w.reshape(-1), ones, None, levels, 2, 64, 64)
    stored = ops.PackedTrellis(packed, ones, levels, 2, 64, 64)
    values, taken = np.unique(ops.decode_trellis(stored, np.empty(w.size, dtype=np.float32)), return_inverse=True)
    counts = np.bincount(taken)
    assert counts.min() > 200
    np.testing.assert_allclose(np.bincount(taken, w.reshape(-1)) / counts, values, atol=0.05)


def test_two_of_the_same_numbers_are_equal():
    book = trellis_code(2)
    assert pickle.loads(pickle.dumps(book)) == book
    assert copy.deepcopy(book) == book
    assert Trellis(2, 10) == book
    assert hash(Trellis(2, 10)) == hash(book)
    assert trellis_code(1, 8) != trellis_code(2, 8)
    assert not book.levels.flags.writeable


@pytest.mark.parametrize(
    ("arguments", "words"), [((5,), "bits"), ((2, 3), "state_bits"), ((4, 7), "state_bits"), ((2, 17), "state_bits")]
)
def test_numbers_out_of_range_are_refused(arguments, words):
    with pytest.raises(InvalidArgumentError, match=words):
        trellis_code(*arguments)


def test_levels_of_states_are_not_fitted():
    with pytest.raises(FormatError, match="those of states"):
        lq.BlockFormat(trellis_code(2), 64, levels="matrix")
