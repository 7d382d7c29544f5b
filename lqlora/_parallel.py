"""Work on many matrices at once."""

from __future__ import annotations

import contextvars
import pickle
import threading
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from threadpoolctl import threadpool_limits

from lqlora._threads import cores, on_threads
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

__all__ = ["map_matrices"]

T = TypeVar("T")
R = TypeVar("R")


def map_matrices(
    function: Callable[[T], R],
    items: Sequence[T],
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    collect: Callable[[R], None] | None = None,
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
    collect : callable, optional
        Called in this thread with each result, when it is there.

    Returns
    -------
    list
        Results by item. The first exception is raised after what has not begun was cancelled.

    Raises
    ------
    InvalidArgumentError
        If an item has to go to another process and cannot be pickled.

    Notes
    -----
    BLAS is held to one thread meanwhile. Threads of BLAS beside those of the pool fight for the cores (see
    ``benchmarks/decompose.py``), and one thread gives the same bits whatever the number of workers.
    """
    with _blas_on_one_thread(), _pool(executor) as pool:
        futures = [_submit(pool, function, item) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                result = future.result()
                if collect is not None:
                    collect(result)
                if progress is not None:
                    progress(done, len(futures))
        except BaseException as error:
            for future in futures:
                future.cancel()
            wait(futures)
            if _is_about_pickling(error):
                raise InvalidArgumentError(
                    "What goes to another process must be picklable: give arrays, functions of modules, or "
                    f"functools.partial of these, not functions made on the spot ({error})."
                ) from error
            raise
        return [future.result() for future in futures]


def _is_about_pickling(error: BaseException) -> bool:
    """Tell whether an object could not be sent; what is raised then depends on the object and the Python version."""
    return isinstance(error, pickle.PicklingError) or (
        isinstance(error, AttributeError | TypeError) and "pickle" in str(error)
    )


def _submit(pool: Executor, function: Callable[[T], R], item: T) -> Future[R]:
    """Hand an item to a pool; threads work in the caller's context, so that ``lq.forced`` reaches them."""
    if isinstance(pool, ThreadPoolExecutor):
        return pool.submit(contextvars.copy_context().run, _work_on, function, item)
    return pool.submit(_work_on, function, item)


def _work_on(function: Callable[[T], R], item: T) -> R:
    """Hold BLAS to one thread in the process that does the work, which need not be the one that asked for it."""
    with _blas_on_one_thread(), on_threads(1):
        return function(item)


_lock = threading.Lock()
_users = 0
_limits: threadpool_limits | None = None


@contextmanager
def _blas_on_one_thread() -> Iterator[None]:
    """Set a limit that is the process's own: the first user sets it, and the last one to leave restores what was."""
    global _users, _limits  # noqa: PLW0603 - so is the setting
    with _lock:
        if _users == 0:
            _limits = threadpool_limits(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _limits is not None:
                _limits.restore_original_limits()


@contextmanager
def _pool(executor: Executor | None) -> Iterator[Executor]:
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        yield pool
