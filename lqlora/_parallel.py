"""Parallel map over matrices, in threads or on an executor, with BLAS and the compiled kernels on one thread each."""

from __future__ import annotations

import contextvars
import itertools
import pickle
import threading
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from threadpoolctl import threadpool_limits

from lqlora._messages import given
from lqlora._shared_settings import SharedSetting
from lqlora._threads import cores, on_threads
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from concurrent.futures import Future

__all__ = ["map_matrices"]

#: Items for each worker that are computed or wait to be collected.
_WAITING = 4

T = TypeVar("T")
R = TypeVar("R")


def map_matrices(
    function: Callable[[T], R],
    items: Sequence[T],
    executor: Executor | None = None,
    report: Callable[[int], None] | None = None,
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
    report : callable, optional
        Called in this thread with the number of finished items, after each of them.
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
    if executor is not None and not hasattr(executor, "submit"):
        raise InvalidArgumentError(f"executor must be an Executor of concurrent.futures, got {given(executor)}.")
    # A row is collected, and kept if the process dies, while slower items before it still run. Which of several failing
    # items is reported depends on timing. `collect` and `report` run in this thread only, so they need no lock.
    results: list[Any] = [None] * len(items)
    finished = _in_threads(function, items) if executor is None else _on_executor(executor, function, items)
    with _blas_on_one_thread(), closing(finished):
        for done, (index, result) in enumerate(finished, start=1):
            results[index] = result
            if collect is not None:
                collect(result)
            if report is not None:
                report(done)
    return results


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> Generator[tuple[int, R], None, None]:
    """Yield index and result of each item in the order in which they end, computed in one thread for each core."""
    # Threads take items from one iterator and put results into one queue. A pool would make a future with a lock for each
    # item, which took longer than the decomposition of a small matrix.
    waiting, lock = iter(enumerate(items)), threading.Lock()
    finished: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
    is_stopped = threading.Event()
    workers = min(cores(), len(items))
    # A slow `collect`, such as one that writes to a disk, would otherwise let results pile up in memory.
    places = threading.Semaphore(_WAITING * workers)

    def take() -> tuple[int, Any]:
        """Return the next item with its index, when there is a place for its result; an index of -1 if there is none."""
        places.acquire()
        with lock:
            return (-1, None) if is_stopped.is_set() else next(waiting, (-1, None))

    def work() -> None:
        with _blas_on_one_thread(), on_threads(1):
            for index, item in iter(take, (-1, None)):
                try:
                    # A copy for each item: what one sets in its context does not reach the next one.
                    finished.put((index, contextvars.copy_context().run(function, item), None))
                except BaseException as error:  # noqa: BLE001 - it is raised in the thread of the caller
                    finished.put((index, None, error))

    # Threads run in a copy of the caller's context, so that ``lq.forced`` holds in them. Only one thread at a time can run in
    # a context. A copy is cheap: it shares the values.
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(work,), name=f"lqlora-{number}")
        for number in range(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in range(len(items)):
            index, result, error = finished.get()
            if error is not None:
                raise error
            yield index, result
            places.release()
    finally:
        # Calls that have begun cannot be cancelled. They are waited for, so that none runs on after an error, when the limit
        # of BLAS is gone and the caller may have closed what they use. Ctrl-C and errors of `collect` take the same way out.
        error = None  # its traceback holds this frame, which would be a cycle
        is_stopped.set()
        places.release(len(threads) or 1)
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _on_executor(
    executor: Executor, function: Callable[[T], R], items: Sequence[T]
) -> Generator[tuple[int, R], None, None]:
    """Yield index and result of each item in the order in which they end, computed on an executor."""
    waiting = iter(enumerate(items))
    futures: dict[Future[Any], int] = {}
    # The number of workers of other executors, which may be other machines, is not known: they get all items at once.
    workers = getattr(executor, "_max_workers", None)
    most = max(1, _WAITING * workers) if isinstance(workers, int) else max(1, len(items))
    try:
        while True:
            for index, item in itertools.islice(waiting, most - len(futures)):
                futures[_submit(executor, function, item)] = index
            if not futures:
                return
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                yield futures.pop(future), future.result()
    except BaseException as error:
        # As above: what has begun is waited for.
        for future in futures:
            future.cancel()
        wait(futures)
        if _is_about_pickling(error):
            raise InvalidArgumentError(
                "function and items must be picklable for another process: pass arrays, functions of modules, or "
                f"functools.partial of these, not lambdas or local functions ({error})."
            ) from error
        raise


def _is_about_pickling(error: BaseException) -> bool:
    """Return whether an error comes from pickling; its class depends on the object and the Python version."""
    return isinstance(error, pickle.PicklingError) or (
        isinstance(error, AttributeError | TypeError) and "pickle" in str(error)
    )


def _submit(pool: Executor, function: Callable[[T], R], item: T) -> Future[R]:
    """Submit an item to a pool, whose threads run in a copy of the caller's context."""
    # A context cannot be pickled, so processes get none.
    if isinstance(pool, ThreadPoolExecutor):
        return pool.submit(contextvars.copy_context().run, _work_on, function, item)
    return pool.submit(_work_on, function, item)


def _work_on(function: Callable[[T], R], item: T) -> R:
    """Run the function with BLAS on one thread. The limit is set here too, since this may be another process."""
    with _blas_on_one_thread(), on_threads(1):
        return function(item)


def _limit_blas() -> Callable[[], object]:
    limits = threadpool_limits(limits=1, user_api="blas")
    return lambda: limits.restore_original_limits()  # noqa: PLW0108 - its type is not known


# The caller of `map_matrices` is a user too, which keeps the limit from coming and going between two items. A forked process
# keeps the limit until its first users end: restoring it at once could wait for a lock of BLAS whose holder does not exist
# there.
_blas = SharedSetting(_limit_blas, is_restored_in_children=False)
_blas_on_one_thread = _blas.changed
