"""Large results lie in memory that is used again, and never while anything refers to it."""

from __future__ import annotations

import collections
import gc
import sys
import threading

import numpy as np
import pytest

import lqlora as lq
from lqlora._dispatch import forced
from lqlora.backends.cpu import buffer_pool as large
from lqlora.backends.cpu.buffer_pool import ALIGNMENT, LARGE, MOST_KEPT, large_empty
from tests.strategies import host, on

pytestmark = pytest.mark.skipif(sys.implementation.name != "cpython", reason="elsewhere garbage is found later")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(large, "_kept", collections.deque())


def kept():
    gc.collect()
    return sum(memory.nbytes - ALIGNMENT for memory in large._kept)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_the_last_view_is_gone():
    whole = large_empty((1024, 2048), np.float32)
    part, first = whole[10:, ::2].T, address(whole)
    del whole
    assert kept() == 0
    other = large_empty((1024, 2048), np.float32)
    assert address(other) != first
    part[...] = 1
    del part
    assert kept() == 2**23
    again = large_empty((2048, 512), np.float64)
    assert address(again) == first
    assert first % ALIGNMENT == 0
    assert kept() == 0


def test_small_arrays_are_not_made_here():
    assert large_empty((LARGE // 4 - 1,), np.float32) is None
    assert large_empty((LARGE // 4,), np.float32).nbytes == LARGE
    assert large_empty((0, 2**40), np.float32) is None


def test_no_more_is_kept_than_said_and_the_youngest_of_it():
    arrays = [large_empty((LARGE + n,), np.uint8) for n in range(60)]
    assert all(array.flags.writeable for array in arrays)
    addresses = [address(array) for array in arrays]
    while arrays:
        del arrays[0]
    assert MOST_KEPT - 2 * LARGE < kept() <= MOST_KEPT
    assert address(large_empty((LARGE + 59,), np.uint8)) == addresses[59]
    assert not any(memory.nbytes == LARGE + ALIGNMENT for memory in large._kept)


def test_what_fills_it_exactly_is_kept_and_what_is_larger_changes_nothing():
    halves = [large_empty((MOST_KEPT // 2,), np.uint8) for _ in range(2)]
    del halves
    assert kept() == MOST_KEPT
    too_large = large_empty((MOST_KEPT + 1,), np.uint8)
    del too_large
    assert kept() == MOST_KEPT


def test_garbage_may_be_collected_anywhere():
    class Cycle:
        pass

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for turn in range(300):
            cycle = Cycle()
            cycle.own, cycle.array = cycle, large_empty((LARGE + turn % 40 * 64,), np.uint8)
            del cycle
            large_empty((LARGE + turn % 7 * 64,), np.uint8)
    finally:
        gc.set_threshold(*threshold)
    assert kept() <= MOST_KEPT


def test_threads_never_share_memory():
    """Every thread keeps its array until all have written."""
    written, looked = threading.Barrier(6), threading.Barrier(6)

    def work(number):
        for _ in range(50):
            mine = large_empty((LARGE,), np.uint8)
            mine[:: 2**16] = number
            written.wait()
            if (mine[:: 2**16] != number).any():
                wrong.append(number)
            looked.wait()
            del mine

    wrong = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_large_results_are_of_a_fixed_size(torch):
    """The documentation says that large results cannot be resized, and that copies can."""
    dense = lq.dequantize(lq.quantize(torch.randn(1024, 2048), lq.BlockFormat(lq.NF4)))
    assert not dense.untyped_storage().resizable()
    assert dense.clone().untyped_storage().resizable()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_decoded_weights_take_such_memory(fast_xp, dtype):
    w = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
    q = lq.quantize(on(fast_xp, w), lq.BlockFormat(lq.NF4))
    dense = lq.dequantize(q, dtype=dtype)
    assert kept() == 0
    # Blocks of 64 do not cross rows of 2048, so some rows alone are what they are in the whole matrix.
    some = slice(100, 110)
    with forced("reference"):
        expected = lq.dequantize(lq.quantize(on(fast_xp, w[some]), lq.BlockFormat(lq.NF4)), dtype=dtype)
    assert (dense.dtype, dense.shape) == (expected.dtype, (1024, 2048))
    assert host(dense[some]).tobytes() == host(expected).tobytes()
    del dense
    assert kept() == w.size * {"float32": 4, "float64": 8}.get(dtype, 2)


def test_tensors_in_such_memory_are_tensors_like_others(torch):
    dense = lq.dequantize(lq.quantize(torch.randn(1024, 2048), lq.BlockFormat(lq.NF4)))
    view = dense.requires_grad_()[3:5]
    del dense
    assert kept() == 0
    (view * 2).sum().backward()
    again = lq.dequantize(lq.quantize(torch.zeros(1024, 2048), lq.BlockFormat(lq.NF4)))
    assert not again.any()
    assert view.detach().any()


def test_small_tensors_are_made_by_torch(torch, monkeypatch):
    q = lq.quantize(torch.randn(8, 64), lq.BlockFormat(lq.NF4))
    monkeypatch.setattr(large, "_taken", None)
    assert lq.dequantize(q).shape == (8, 64)
