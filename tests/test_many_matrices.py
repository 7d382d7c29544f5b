"""Models of thousands of matrices: calls of Python functions of lqlora for each, and the pause of garbage collection.

The calls are those between 10 and 30 matrices: what a function does once does not count. Calls are counted because they
are the same in every run, and seconds are not. ``benchmarks/matrices.py`` measures seconds.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
import torch

import lqlora as lq
from lqlora import nn
from lqlora._shared_settings import SharedSetting, collection_paused

FORMAT = lq.BlockFormat.parse("nf4/64:u8/256:float32")
LIBRARY = str(Path(lq.__file__).parent)


class Uncounted(Executor):
    """Executor whose work is done at once and not counted: decompositions have a test of their own."""

    def submit(self, function, *args):
        hook = sys.getprofile()
        sys.setprofile(None)
        found = Future()
        found.set_result(function(*args))
        sys.setprofile(hook)
        return found


def calls(function):
    """Return how many functions of lqlora a call runs."""
    count = 0

    def hook(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(LIBRARY)

    sys.setprofile(hook)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def model(count):
    return torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(count))


def each(count, folder):
    """Return the calls of each task, for a number of matrices."""
    d = lq.decompose(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), FORMAT, 4)
    file, matrices = folder / f"{count}.safetensors", dict.fromkeys(map(str, range(count)), d)
    own, fresh = model(count), model(count)
    return {
        "save": calls(lambda: lq.save(file, matrices)),
        "load": calls(lambda: lq.load(file)),
        "verify": calls(lambda: lq.verify(file)),
        "quantize_model": calls(lambda: nn.quantize_model(own, FORMAT, rank=4, executor=Uncounted())),
        "save_model": calls(lambda: nn.save_model(file, own)),
        "load_model": calls(lambda: nn.load_model(file, fresh)),
    }


#: Largest number of calls for a matrix of six tensors. A change that needs more belongs into one call for many matrices.
MOST = {"save": 79, "load": 21, "verify": 28, "quantize_model": 156, "save_model": 102, "load_model": 122}


def test_the_calls_for_each_matrix_stay_few(tmp_path):
    each(10, tmp_path)  # fills caches
    few, many = each(10, tmp_path), each(30, tmp_path)
    found = {task: (many[task] - few[task]) / 20 for task in few}
    assert {task: number for task, number in found.items() if number > MOST[task]} == {}
    assert all(number > 10 for number in found.values())


def test_a_model_is_saved_in_one_walk_over_its_modules(tmp_path, monkeypatch):
    own, walked, walk = model(3), [], torch.nn.Module.named_modules
    nn.quantize_model(own, FORMAT, rank=4)

    def counted(self, *args, **kwargs):
        walked.append(self)
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    nn.save_model(tmp_path / "model", own)
    assert walked.count(own) == 1


class TestPausedCollection:
    def test_the_collector_is_off_inside_and_as_before_afterwards(self):
        assert gc.isenabled()
        seen = []

        def work():
            with collection_paused():
                seen.append(gc.isenabled())
            seen.append(gc.isenabled())
            raise ValueError("inside")

        with pytest.raises(ValueError, match="inside"), collection_paused():
            work()
        assert seen == [False, False]
        assert gc.isenabled()

    def test_a_collector_that_the_caller_switched_off_stays_off(self):
        gc.disable()
        try:
            with collection_paused():
                pass
            assert not gc.isenabled()
        finally:
            gc.enable()

    def test_the_last_of_several_threads_switches_it_on(self):
        inside, leave = threading.Event(), threading.Event()

        def work():
            with collection_paused():
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=work)
        with collection_paused():
            thread.start()
            assert inside.wait(30)
        assert not gc.isenabled()
        leave.set()
        thread.join()
        assert gc.isenabled()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_a_forked_process_collects_at_once_and_after_blocks_of_its_own(self):
        with collection_paused():
            if not (child := os.fork()):
                at_once = gc.isenabled()
                with collection_paused():
                    inside = gc.isenabled()
                os._exit(0 if (at_once, inside, gc.isenabled()) == (True, False, True) else 1)
            assert not gc.isenabled()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_setting_that_cannot_be_changed_leaves_no_user():
    seen = []

    def change():
        seen.append("changed")
        if len(seen) == 1:
            raise OSError("not now")
        return lambda: seen.append("restored")

    setting = SharedSetting(change, is_restored_in_children=True)
    with pytest.raises(OSError, match="not now"), setting.changed():
        pass
    with setting.changed(), setting.changed():
        pass
    assert seen == ["changed", "changed", "restored"]
