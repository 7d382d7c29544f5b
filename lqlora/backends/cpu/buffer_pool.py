"""Large arrays for results, in memory that the system has provided before.

Of the time that a decoder takes for a new array of many megabytes, most is the system's, which clears page after page
before it hands them out. So the memory of a large result is kept when the last array in it is gone, and serves the
next one of its size: a model's weights are decoded one after the other, an alternation's again and again.
"""

from __future__ import annotations

import collections
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

#: Bytes of results that are kept at most.
MOST_KEPT = 1 << 27

#: What is kept, the oldest first. Threads, and the collector of garbage in the midst of one, may come between any two
#: calls: each call here changes the whole at once, and whoever takes something out has it alone.
_kept: collections.deque[npt.NDArray[np.uint8]] = collections.deque()


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
    """Return memory of this size, looking at all that is kept once: what does not fit goes back as the youngest."""
    for _ in range(len(_kept)):
        try:
            memory = _kept.popleft()
        except IndexError:  # another thread took the last
            return None
        if memory.nbytes == size:
            return memory
        _kept.append(memory)
    return None


def _keep(memory: npt.NDArray[np.uint8]) -> None:
    """Keep memory, and let go what has been kept for longer if that is too much."""
    if memory.nbytes - ALIGNMENT > MOST_KEPT:
        return
    _kept.append(memory)
    while sum(other.nbytes - ALIGNMENT for other in _kept.copy()) > MOST_KEPT:
        with contextlib.suppress(IndexError):
            _kept.popleft()
