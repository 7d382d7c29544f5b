"""Number of threads of the compiled kernels: a setting of the process, which a context may override."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import re
from typing import TYPE_CHECKING

from lqlora._options import require_integer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cores", "num_threads", "on_threads", "set_num_threads"]

#: Environment variables, read at each call. The first one that holds a positive number is used.
_VARIABLES = ("LQLORA_NUM_THREADS", "OMP_NUM_THREADS")

# A context variable and not a second global: a worker of `map_matrices` sets it for its own thread, while other threads
# of the process keep the number of the process. It is also restored by token, so `on_threads` may be nested.
_own: contextvars.ContextVar[int | None] = contextvars.ContextVar("lqlora_threads", default=None)
_setting: int | None = None


def cores() -> int:
    """Return the number of cores this process may run on."""
    # The affinity mask counts only the cores that `taskset`, a scheduler or a container's cpuset has given the process.
    # os.cpu_count() counts those of the machine, and is what systems without masks have.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Return the largest number of threads that a compiled kernel uses.

    Returns
    -------
    int
        The number that :func:`set_num_threads` set, else that of the environment variable ``LQLORA_NUM_THREADS`` or
        ``OMP_NUM_THREADS``, else the number of cores. Work on many matrices at once uses one thread for each of them.

    Examples
    --------
    >>> num_threads() >= 1
    True
    """
    own = _own.get()
    if own is not None:
        return own
    return _setting or _from_environment() or cores()


def _from_environment() -> int | None:
    for name in _VARIABLES:
        count = _number(os.environ.get(name, ""))
        if count:
            return count
    return None


@functools.lru_cache(maxsize=64)
def _number(text: str) -> int:
    """Return the number of threads that an environment variable says, or zero."""
    # OMP_NUM_THREADS may be a list such as "8,2" for nested parallel regions. Its first number is for the outermost
    # ones. What is not a number of threads is ignored, and so are numbers that a kernel's 32 bits cannot hold.
    first = text.partition(",")[0].strip()
    return int(first) if re.fullmatch(r"[0-9]{1,9}", first) else 0


def set_num_threads(count: int | None) -> None:
    """Set the number of threads of the compiled kernels in this process.

    Parameters
    ----------
    count : int or None
        A number of at least 1. None restores the default: the environment, or the number of cores.

    Raises
    ------
    InvalidArgumentError
        If the count is not a positive integer.

    Examples
    --------
    >>> set_num_threads(1)
    >>> num_threads()
    1
    >>> set_num_threads(None)
    """
    global _setting  # noqa: PLW0603 - a setting of the process
    if count is not None:
        require_integer(count, "count", 1)
    _setting = count


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Set the number of threads of the compiled kernels inside a ``with`` block, for this context."""
    token = _own.set(count)
    try:
        yield
    finally:
        _own.reset(token)
