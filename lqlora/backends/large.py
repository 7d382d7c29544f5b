"""Large arrays for results, in memory that the system has provided before.

Of the time that a decoder takes for a new array of many megabytes, two thirds are the system's, which clears page after
page before it hands them out. So the memory of a large result is kept when the last array in it is gone, and serves the
next one of its size: a model's weights are decoded one after the other, an alternation's again and again.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["LARGE", "MOST_KEPT", "large_empty"]

#: Bytes from which on an array has pages of its own. NumPy asks the system for large pages then, where torch does not.
LARGE = 1 << 22

#: Bytes of a line of the caches. Results that begin at one are written by whole vectors, past the caches.
ALIGNMENT = 64

#: Bytes that are kept at most.
MOST_KEPT = 1 << 27

#: What is kept, by its bytes. Lists are changed by single calls of their methods: threads, and the collector of garbage
#: in the midst of one, may come between any two, and whoever pops something has it alone.
_kept: dict[int, list[npt.NDArray[np.uint8]]] = {}


def large_empty(shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> npt.NDArray[Any] | None:
    """Return an array of any contents; None if it would be small, which NumPy's own allocator is best for.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : dtype
        Its dtype.

    Returns
    -------
    ndarray or None
        The caller's alone, until it and all its views are gone.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE:
        return None
    memory = _taken(size + ALIGNMENT)
    if memory is None:
        memory = np.empty(size + ALIGNMENT, np.uint8)
    # Arrays refer to what they are views of: to this one object, whose end is the end of all of them.
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    lease = (ctypes.c_ubyte * size).from_buffer(memory.data, start)
    weakref.finalize(lease, _keep, memory).atexit = False
    return np.frombuffer(memoryview(lease), np.uint8).view(dtype).reshape(shape)


def _taken(size: int) -> npt.NDArray[np.uint8] | None:
    try:
        return _kept[size].pop()
    except (KeyError, IndexError):
        return None


def _keep(memory: npt.NDArray[np.uint8]) -> None:
    """Keep memory, and let go what has been kept for longer if that is too much."""
    _kept.setdefault(memory.nbytes, []).append(memory)
    for own in [*_kept.values()]:
        while own and sum(size * len(same) for size, same in [*_kept.items()]) > MOST_KEPT:
            with contextlib.suppress(IndexError):
                own.pop(0)
