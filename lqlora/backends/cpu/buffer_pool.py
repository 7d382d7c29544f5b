"""Pool of memory for large results, which reuses the memory of earlier results of the same size.

The system clears every page of new memory before it provides it, which takes longer than decoding into it. So the
memory of a large result is kept when the last array in it is gone, and the next result of its size gets it. Models
decode weights of the same shapes one after the other, and a decomposition decodes the same weight in every iteration.
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

#: Smallest number of bytes of an array in the pool. From this size on, NumPy asks the system for large pages; torch
#: does not.
LARGE = 1 << 22

#: Bytes of a cache line. Results that begin at one are written in whole vectors that bypass the caches.
ALIGNMENT = 64

#: Largest number of bytes in the pool.
MOST_KEPT = 1 << 27

#: Memory in the pool, the oldest first. Other threads, and the garbage collector within this one, may run between any
#: two calls. Each method of a deque is atomic, so memory that is taken out belongs to one caller.
_kept: collections.deque[npt.NDArray[np.uint8]] = collections.deque()


def large_empty(shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> npt.NDArray[Any] | None:
    """Return a large array of any contents, or None if it would be small: NumPy's allocator is faster for small arrays.

    Parameters
    ----------
    shape : tuple of int
        Shape of the array.
    dtype : dtype
        Dtype of the array.

    Returns
    -------
    ndarray or None
        An array whose memory is not reused before it and all its views are gone.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE:
        return None
    memory = _taken(size + ALIGNMENT)
    if memory is None:
        memory = np.empty(size + ALIGNMENT, np.uint8)
    # NumPy's views refer to the object that owns the memory, not to each other: the lease. It ends with the last view,
    # and its finalizer returns the memory to the pool.
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    lease = (ctypes.c_ubyte * size).from_buffer(memory.data, start)
    weakref.finalize(lease, _keep, memory).atexit = False
    return np.frombuffer(memoryview(lease), np.uint8).view(dtype).reshape(shape)


def _taken(size: int) -> npt.NDArray[np.uint8] | None:
    """Take memory of this size out of the pool, or return None. Pieces of other sizes become the youngest."""
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
    """Return memory to the pool; evict the oldest beyond the limit."""
    if memory.nbytes - ALIGNMENT > MOST_KEPT:
        return
    _kept.append(memory)
    while sum(other.nbytes - ALIGNMENT for other in _kept.copy()) > MOST_KEPT:
        with contextlib.suppress(IndexError):
            _kept.popleft()
