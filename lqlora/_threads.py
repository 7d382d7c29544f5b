"""How many threads the compiled kernels run on: a setting of the process, which a context may lower."""

from __future__ import annotations

import contextlib
import contextvars
import os
from typing import TYPE_CHECKING

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cores", "num_threads", "on_threads", "set_num_threads"]

#: Read at each call; the first that is set to a number counts.
_VARIABLES = ("LQLORA_NUM_THREADS", "OMP_NUM_THREADS")

_own: contextvars.ContextVar[int | None] = contextvars.ContextVar("lqlora_threads", default=None)
_setting: int | None = None


def cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Return how many threads a compiled kernel runs on at most.

    Returns
    -------
    int
        What :func:`set_num_threads` was given; else the number in the environment variable ``LQLORA_NUM_THREADS`` or
        ``OMP_NUM_THREADS``; else the number of cores. Work on many matrices at once uses one thread for each.

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
        text = os.environ.get(name, "").partition(",")[0].strip()
        if text.isdecimal() and int(text) > 0:
            return int(text)
    return None


def set_num_threads(count: int | None) -> None:
    """Set how many threads the compiled kernels of this process run on.

    Parameters
    ----------
    count : int or None
        At least 1; None goes back to the environment and the number of cores.

    Raises
    ------
    InvalidArgumentError
        If the count is no positive integer.

    Examples
    --------
    >>> set_num_threads(1)
    >>> num_threads()
    1
    >>> set_num_threads(None)
    """
    global _setting  # noqa: PLW0603 - a setting of the process
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise InvalidArgumentError(f"A number of threads is a positive integer or None, not {count!r}.")
    _setting = count


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run the compiled kernels of this context on so many threads."""
    token = _own.set(count)
    try:
        yield
    finally:
        _own.reset(token)
