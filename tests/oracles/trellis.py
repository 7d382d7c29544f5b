"""Oracle of trellis codes: one sequence at a time, with the list of all states and the states before each of them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.codebooks import Trellis

_LONGEST, _CONTEXT, _FARTHEST = 256, 32, 1024.0


def sequences_of(block: np.ndarray) -> list[np.ndarray]:
    return [block[start : start + _LONGEST] for start in range(0, len(block), _LONGEST)]


def states_of(codes: Sequence[int], book: Trellis) -> list[int]:
    """Return the state of each weight: the last bits of the stream, which repeats without end in both directions."""
    stream = [code >> bit & 1 for code in codes for bit in range(book.bits)]
    found = []
    for index in range(len(codes)):
        last = (index + 1) * book.bits
        window = [stream[place % len(stream)] for place in range(last - book.state_bits, last)]
        found.append(sum(bit << place for place, bit in enumerate(window)))
    return found


def values_of(codes: Sequence[int], book: Trellis) -> list[np.float32]:
    return [book.levels[state] for state in states_of(codes, book)]


def codes_of(targets: np.ndarray, book: Trellis) -> list[int]:
    """Return the codes of a sequence of normalized weights."""
    targets = np.clip(targets, -_FARTHEST, _FARTHEST).astype(np.float32)
    count, kept = len(targets), book.state_bits - book.bits
    if count * book.bits <= book.state_bits:
        choices = [own[::-1] for own in itertools.product(range(len(book)), repeat=count)]
        return list(min(choices, key=lambda own: _error(targets, own, book)))
    seam = _path(np.array([targets[index % count] for index in range(-_CONTEXT, _CONTEXT)]), book, None)
    return [state >> kept for state in _path(targets, book, seam[_CONTEXT - 1] >> book.bits)]


def _error(targets: np.ndarray, codes: Sequence[int], book: Trellis) -> np.float32:
    total = np.float32(0)
    for target, value in zip(targets, values_of(codes, book), strict=True):
        total = np.float32(total + (target - value) * (target - value))
    return total


def _path(targets: np.ndarray, book: Trellis, start: int | None) -> list[int]:
    """Return the states of the best path. It begins behind, and ends with, the bits ``start`` if they are given."""
    bits, states = book.bits, np.arange(len(book.levels))
    kept = len(states) >> bits
    # The bits that a state keeps of the one before are its low ones; the lowest bits of that one are gone.
    before = (states % kept << bits)[:, None] + np.arange(2**bits)
    errors = (targets[:, None] - book.levels) ** 2
    total = errors[0] if start is None else np.where(states % kept == start, errors[0], np.inf).astype(np.float32)
    origins = []
    for own in errors[1:]:
        origins.append(before[states, np.argmin(total[before], axis=1)])
        total = np.min(total[before], axis=1) + own
    ends = np.reshape(total, (kept, 2**bits))
    after = int(np.argmin(ends.min(axis=1))) if start is None else start
    path = [(after << bits) + int(np.argmin(ends[after]))]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[::-1]
