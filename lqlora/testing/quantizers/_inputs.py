"""Inputs of the properties of quantizers.

Each input is difficult in one respect only, so that a fault fails the property about it and few others.
Simple weights have one dimension, whole blocks, an even number and ordinary magnitudes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lqlora.testing._verdicts import AdapterError, NotApplicableError
from lqlora.testing.strategies import LAYOUTS, block_weights, lay_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora.testing.quantizers._subject import Subject

Weights: TypeAlias = npt.NDArray[np.float32]
Inputs: TypeAlias = SearchStrategy[dict[str, Any]]

#: Largest number of blocks in an array. Faults of quantized scales need several scales to show.
_BLOCKS = 6

#: Range of absmax values, unless the caller's is narrower: far from both ends of float32.
_ORDINARY = (2.0**-20, 2.0**20)

#: Block size of the inputs if that of the quantizer is not known.
_SOME_BLOCK = 32


def _range(subject: Subject) -> tuple[float, float]:
    return max(_ORDINARY[0], subject.smallest), min(_ORDINARY[1], subject.largest)


def _sized(subject: Subject, size: SearchStrategy[int]) -> SearchStrategy[Weights]:
    return block_weights(subject.block_size or _SOME_BLOCK, size, *_range(subject))


def _units(subject: Subject, least: int = 1) -> SearchStrategy[int]:
    most = _BLOCKS * (subject.block_size or _SOME_BLOCK) // subject.unit
    return st.integers(least, max(least, most)).map(lambda units: units * subject.unit)


def ordinary(subject: Subject) -> Inputs:
    """Draw simple weights: whole blocks of ordinary magnitudes."""
    return st.fixed_dictionaries({"w": _sized(subject, _units(subject))})


def shaped(subject: Subject) -> Inputs:
    """Draw simple weights in up to three dimensions."""
    sides = st.sampled_from([(-1,), (-1, subject.unit), (subject.unit, -1), (1, -1, subject.unit)])
    return st.fixed_dictionaries({"w": st.tuples(_sized(subject, _units(subject)), sides).map(_reshaped)})


def _reshaped(drawn: tuple[Weights, tuple[int, ...]]) -> Weights:
    return drawn[0].reshape(drawn[1])


def strided(subject: Subject) -> Inputs:
    """Draw matrices in the memory layouts that ``adapt`` accepts; torch does not accept negative strides."""
    known = []
    for layout in LAYOUTS[1:]:
        try:
            subject.adapted(lay_out(np.ones((2, 2), dtype=np.float32), layout))
        except AdapterError:
            continue
        known.append(layout)
    if not known:
        raise NotApplicableError("adapt() refuses strided arrays")
    matrices = _sized(subject, _units(subject, least=2)).map(lambda w: w.reshape(2, -1))
    return st.fixed_dictionaries({"w": matrices, "layout": st.sampled_from(known)})


def zeros(subject: Subject) -> Inputs:
    """Draw arrays of zeros."""
    return st.fixed_dictionaries({"w": _units(subject).map(lambda size: np.zeros(size, dtype=np.float32))})


def with_zero_block(subject: Subject) -> Inputs:
    """Draw simple weights with a block of zeros inserted, or two blocks if their size is odd."""

    def _insert(drawn: tuple[Weights, int]) -> Weights:
        # The size is a multiple of the unit, so the index is one too, from 0 to the size: the zeros fill whole blocks,
        # and may come before the first block, between two, or after the last.
        w, block = drawn
        return np.insert(w, block * subject.unit % (w.size + subject.unit), np.zeros(subject.unit, dtype=np.float32))

    pairs = st.tuples(_sized(subject, _units(subject)), st.integers(0, _BLOCKS))
    return st.fixed_dictionaries({"w": pairs.map(_insert)})


def with_replacement(subject: Subject) -> Inputs:
    """Draw simple weights, and a block to replace one of their blocks."""
    replacement = _sized(subject, st.just(subject.block_size or 1))
    arrays = _sized(subject, _units(subject, least=2))
    return st.fixed_dictionaries({"w": arrays, "block": st.integers(0, _BLOCKS - 1), "replacement": replacement})


def with_power(subject: Subject) -> Inputs:
    """Draw simple weights and a power of two."""
    return st.fixed_dictionaries({"w": _sized(subject, _units(subject)), "power": st.integers(-120, 120)})


def with_tail(subject: Subject) -> Inputs:
    """Draw arrays that end within a block, of even size where possible."""
    # In blocks of two a short block is one weight, which makes the size odd.
    block = subject.block_size or 1
    sizes = [size for size in range(1, 3 * block) if size % block and (size % 2 == 0 or block == 2)]
    if not sizes:
        raise NotApplicableError("blocks of one weight are never short")
    return st.fixed_dictionaries({"w": _sized(subject, st.sampled_from(sizes))})


def of_odd_size(subject: Subject) -> Inputs:
    """Draw arrays of odd size. If blocks are not independent, one more weight does not start a new block."""
    if not subject.independent_blocks and subject.block_size in (None, 1):
        raise NotApplicableError("needs independent_blocks")
    block = subject.block_size or _SOME_BLOCK
    sizes = [size for size in range(3, 3 * block + 3, 2) if subject.independent_blocks or size % block]
    return st.fixed_dictionaries({"w": _sized(subject, st.sampled_from(sizes))})


def single(subject: Subject) -> Inputs:
    """Draw arrays of one weight."""
    return st.fixed_dictionaries({"w": _sized(subject, st.just(1))})


def empty(subject: Subject) -> Inputs:  # noqa: ARG001 - all inputs take the subject
    """Draw empty arrays of one, two or three dimensions."""
    sides = st.sampled_from([(0,), (0, 5), (5, 0), (2, 0, 3)])
    return st.fixed_dictionaries({"w": sides.map(lambda shape: np.zeros(shape, dtype=np.float32))})


def repeated(subject: Subject) -> Inputs:
    """Draw blocks of a power of two and a few repeated values, among them boundaries between levels."""
    fractions = st.integers(-1024, 1024).map(lambda k: k / 1024)
    if subject.levels is not None:
        fractions = st.sampled_from(subject.boundaries.tolist()) | fractions
    return st.fixed_dictionaries({"w": _blocks_of(subject, fractions)})


def tied(subject: Subject) -> Inputs:
    """Draw blocks of a power of two and boundaries between levels that float32 represents exactly."""
    middles = subject.boundaries
    exact = middles[middles.astype(np.float32) == middles].tolist()
    if not exact or subject.block_size == 1:
        raise NotApplicableError("no boundary between levels is exact in float32")
    return st.fixed_dictionaries({"w": _blocks_of(subject, st.sampled_from(exact))})


def _blocks_of(subject: Subject, fractions: SearchStrategy[float]) -> SearchStrategy[Weights]:
    low, high = _range(subject)
    powers = st.integers(int(np.ceil(np.log2(low))), int(np.floor(np.log2(high))))
    values = st.lists(fractions, min_size=1, max_size=4)

    def build(drawn: tuple[list[float], int, int]) -> Weights:
        choices, seed, power = drawn
        # The first weight of each block becomes 1. Fractions are at most 1, so the absmax is the power of two, and the
        # quotient of a weight and the absmax is the fraction itself, without rounding.
        w = np.random.default_rng(seed).choice(np.array(choices), size=subject.unit)
        w[:: subject.block_size or subject.unit] = 1.0
        return np.asarray(w * 2.0**power, dtype=np.float32)

    return st.tuples(values, st.integers(0, 99), powers).map(build)


def with_non_finite(subject: Subject) -> Inputs:
    """Draw simple weights, a NaN or infinity to insert, and its index."""
    values = st.sampled_from([np.nan, np.inf, -np.inf])
    arrays = _sized(subject, _units(subject, least=2))
    return st.fixed_dictionaries({"w": arrays, "index": st.integers(0, 999), "value": values})


def between(low: float, high: float) -> Callable[[Subject], Inputs]:
    """Return a strategy of weights that are zero or have magnitudes in a range at one end of float32."""

    def _of(subject: Subject) -> Inputs:
        sizes = st.floats(low, high, width=32)
        signed = sizes | sizes.map(lambda x: -x)
        # A block of zeros only would test the property "zeros" again, so one value is never zero.
        few = st.tuples(signed, st.lists(signed | st.just(0.0), max_size=7)).map(lambda drawn: [drawn[0], *drawn[1]])
        return st.fixed_dictionaries({"w": few.map(lambda w: np.resize(np.array(w, dtype=np.float32), subject.unit))})

    return _of


def in_dtype(dtype: Any, low: float, high: float) -> Callable[[Subject], Inputs]:
    """Return a strategy of simple weights of another dtype, within its normal range."""

    def _of(subject: Subject) -> Inputs:
        smallest, largest = _range(subject)
        bounds = max(low, smallest), min(high, largest)
        arrays = block_weights(subject.block_size or _SOME_BLOCK, _units(subject), *bounds)
        return st.fixed_dictionaries({"w": arrays.map(lambda w: w.astype(dtype))})

    return _of


def integers(subject: Subject) -> Inputs:
    """Draw small integers."""
    values = st.lists(st.integers(-100, 100), min_size=1, max_size=4)
    return st.fixed_dictionaries({"w": values.map(lambda few: np.resize(np.array(few, dtype=np.int32), subject.unit))})
