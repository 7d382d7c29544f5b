"""Work on many matrices at once."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["map_matrices"]

T = TypeVar("T")
R = TypeVar("R")


def map_matrices(
    function: Callable[[T], R],
    items: Sequence[T],
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[R]:
    """Apply a function to every item, in parallel, and return the results in the order of the items.

    Parameters
    ----------
    function : callable
        Takes one item. Picklable if the executor runs processes.
    items : sequence
        The items.
    executor : concurrent.futures.Executor, optional
        Where to run. A thread per core if not given: NumPy releases the interpreter lock in the work that counts.
    progress : callable, optional
        Called in this thread with the number of items done and the number of all.

    Returns
    -------
    list
        Results by item. The first exception is raised after what has not begun was cancelled.

    Notes
    -----
    BLAS is held to one thread meanwhile. Threads of BLAS beside those of the pool fight for the cores (2.7 times slower
    on two cores), and one thread gives the same bits whatever the number of workers.
    """
    with _pool(executor) as pool, threadpool_limits(limits=1, user_api="blas"):
        futures = [pool.submit(_on_one_thread, function, item) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]


def _on_one_thread(function: Callable[[T], R], item: T) -> R:
    """Hold BLAS to one thread in the process that does the work, which need not be the one that asked for it."""
    with threadpool_limits(limits=1, user_api="blas"):
        return function(item)


@contextmanager
def _pool(executor: Executor | None) -> Iterator[Executor]:
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(
        max_workers=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        yield pool
