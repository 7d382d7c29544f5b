"""Parallel map over matrices, in threads or on an executor, with BLAS and the compiled kernels on one thread each."""

from __future__ import annotations

import contextvars
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from threadpoolctl import threadpool_limits

from lqlora._messages import given
from lqlora._options import require_kind
from lqlora._threads import cores, on_threads
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
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
    """Return the results of a function for all items, computed in parallel, in the order of the items.

    Parameters
    ----------
    function : callable
        Function of one item. It must be picklable if the executor runs processes.
    items : sequence
        Arguments, one for each call.
    executor : concurrent.futures.Executor, optional
        Executor to run on. By default one thread for each core: NumPy releases the interpreter lock where it computes.
    progress : callable, optional
        Called in this thread with the number of finished items and the number of all items.
    collect : callable, optional
        Called in this thread with each result as soon as it is computed, so in an order that may differ between runs.

    Returns
    -------
    list
        Results in the order of the items. If a call raises, calls that have not begun are cancelled, and its exception
        is raised.

    Raises
    ------
    InvalidArgumentError
        If a function or an item goes to another process and cannot be pickled.

    Notes
    -----
    BLAS uses one thread meanwhile. Its threads would compete with those of the pool for the cores (see
    ``benchmarks/decompose.py``), and one thread gives the same bits for every number of workers.
    """
    if progress is not None:
        require_kind(progress, "progress", Callable, "a function")  # type: ignore[arg-type]
    if executor is not None and not hasattr(executor, "submit"):
        raise InvalidArgumentError(f"executor must be an Executor of concurrent.futures, got {given(executor)}.")
    # `futures` keeps the order of the items, and the result is read from it. `as_completed` yields in the order in
    # which calls end, so a row is collected, and kept if the process dies, while slower items before it still run.
    # Which of several failing items is reported depends on timing. `collect` and `progress` run in this thread only, so
    # they need no lock.
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
            # Calls that have begun cannot be cancelled. They are waited for, so that none runs on after the error, when
            # the limit of BLAS is gone and the caller may have closed what they use. Ctrl-C and errors of `collect`
            # take the same way out.
            for future in futures:
                future.cancel()
            wait(futures)
            if _is_about_pickling(error):
                raise InvalidArgumentError(
                    "function and items must be picklable for another process: pass arrays, functions of modules, or "
                    f"functools.partial of these, not lambdas or local functions ({error})."
                ) from error
            raise
        return [future.result() for future in futures]


def _is_about_pickling(error: BaseException) -> bool:
    """Return whether an error comes from pickling; its class depends on the object and the Python version."""
    return isinstance(error, pickle.PicklingError) or (
        isinstance(error, AttributeError | TypeError) and "pickle" in str(error)
    )


def _submit(pool: Executor, function: Callable[[T], R], item: T) -> Future[R]:
    """Submit an item to a pool. Threads run in a copy of the caller's context, so that ``lq.forced`` holds in them."""
    # A thread of a pool does not run in the context of the thread that submits to it, so it would not see the caller's
    # context variables. Each item gets a separate copy, because only one thread at a time can run in a context. A copy
    # is cheap: it shares the values. Processes get none, because a context cannot be pickled.
    if isinstance(pool, ThreadPoolExecutor):
        return pool.submit(contextvars.copy_context().run, _work_on, function, item)
    return pool.submit(_work_on, function, item)


def _work_on(function: Callable[[T], R], item: T) -> R:
    """Run the function with BLAS on one thread. The limit is set here too, since this may be another process."""
    with _blas_on_one_thread(), on_threads(1):
        return function(item)


# The number of BLAS threads is a setting of the process, and a limit restores the number that it found. Two limits that
# overlap in time would restore each other's: A finds 8 and sets 1, B finds 1 and sets 1, A restores 8 while B works,
# and B then restores 1 for good. So users are counted: the first one sets the limit, and the last one restores the
# number. The caller of `map_matrices` is a user too, which keeps the limit from coming and going between two items.
_lock = threading.RLock()
_users = 0
_limits: threadpool_limits | None = None


def _forget_users() -> None:
    """Let a forked process count its own users: those of the parent are threads that exist in the parent only."""
    # The limit that the parent has set is kept. The first users in the child take it over and restore the old number
    # when they end. Restoring it here could wait for a lock of BLAS whose holder does not exist in the child.
    # The lock is a new one, because the thread that forked may have held the old one before.
    global _lock, _users
    _lock, _users = threading.RLock(), 0


if hasattr(os, "register_at_fork"):  # while the thread that forks holds the lock, users and limit agree
    os.register_at_fork(
        before=lambda: _lock.acquire(),  # noqa: PLW0108 - the lock may be a new one
        after_in_parent=lambda: _lock.release(),  # noqa: PLW0108
        after_in_child=_forget_users,
    )


@contextmanager
def _blas_on_one_thread() -> Iterator[None]:
    """Limit BLAS to one thread in this process: the first user sets the limit, the last one restores the old number."""
    global _users, _limits  # noqa: PLW0603 - so is the setting
    with _lock:
        if _limits is None:
            _limits = threadpool_limits(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users = max(0, _users - 1)  # a process that is forked inside the block begins again at zero
            if _users == 0 and _limits is not None:
                _limits.restore_original_limits()
                _limits = None


@contextmanager
def _pool(executor: Executor | None) -> Iterator[Executor]:
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        yield pool
