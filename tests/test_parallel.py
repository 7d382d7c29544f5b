"""The parallel map over matrices: order of results, errors, and the threads of BLAS before, during and after."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import threadpoolctl

import lqlora as lq
from lqlora import _parallel
from lqlora._parallel import map_matrices
from lqlora.ops.packing import pack_codes


def blas_threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


def test_results_come_in_the_order_of_the_items():
    seen = []
    found = map_matrices(lambda x: (time.sleep(0.01 * (3 - x)), x)[1], range(3), report=seen.append)
    assert found == [0, 1, 2]
    assert seen == [1, 2, 3]


def test_blas_works_on_one_thread_meanwhile_and_as_before_afterwards():
    before = blas_threads()
    assert all(threads == {1} for threads in map_matrices(lambda _: blas_threads(), range(4)))
    assert blas_threads() == before


def test_blas_is_as_before_after_a_failure_too():
    before = blas_threads()

    def work(item):
        if item == 0:
            raise ValueError("first")
        time.sleep(0.05)

    with pytest.raises(ValueError, match="first"):
        map_matrices(work, range(6))
    assert blas_threads() == before


def test_blas_is_as_before_after_two_calls_at_once():
    before = blas_threads()
    callers = [
        threading.Thread(target=map_matrices, args=(lambda x: time.sleep(0.02 * x), range(length))) for length in (3, 5)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert blas_threads() == before


def test_a_forced_implementation_reaches_the_threads():
    codes = np.zeros(4, dtype=np.uint8)

    def reason(_):
        return pack_codes.select(codes, 4).reason

    with lq.forced("reference"):
        assert all("forced" in text for text in map_matrices(reason, range(3)))
    assert not any("forced" in text for text in map_matrices(reason, range(3)))


def _ended(child: int) -> int:
    """Return how a forked process ends; None if it hangs, and is then ended."""
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_meanwhile_works_too():
    with _parallel._blas.lock:  # as a thread holds it for a moment at the begin and the end of each item
        child = os.fork()
        if not child:
            os._exit(0 if map_matrices(lambda x: x, range(3)) == [0, 1, 2] else 1)
    assert _ended(child) == 0


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_during_a_map_restores_the_threads_after_its_own():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before, children = blas_threads(), []

        def fork(_: int) -> None:
            child = os.fork()
            if child:
                children.append(child)
                return
            status = 1
            try:
                inside = map_matrices(lambda _: blas_threads(), range(2))
                status = 0 if inside == [{1}, {1}] and blas_threads() == before else 2
            finally:
                os._exit(status)

        map_matrices(lambda x: x, range(1), collect=fork)
        assert [_ended(child) for child in children] == [0]
        assert blas_threads() == before
