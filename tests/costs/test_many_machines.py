"""Rows computed by other processes, which may die. The table equals that of one process."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lqlora as lq
from lqlora.costs import CostStore
from tests.costs.cases import FORMATS, matrices, same
from tests.requirements import require_or_skip

if TYPE_CHECKING:
    from pathlib import Path


def load(folder: Path, name: str, seconds: float = 0.0) -> np.ndarray:
    """Read a matrix, and record the process that read it."""
    (folder / f"{name}.{os.getpid()}.read").touch()
    time.sleep(seconds)
    return np.load(folder / f"{name}.npy")


def load_or_die(folder: Path, name: str) -> np.ndarray:
    if name == "layers.1.q" and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return load(folder, name)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, w in matrices().items():
        np.save(tmp_path / f"{name}.npy", w)
    return tmp_path


def readers(folder: Path) -> set[str]:
    return {path.name.split(".")[-2] for path in folder.glob("*.read")}


def kill_when_it_reads(folder: Path, worker: int) -> None:
    while str(worker) not in readers(folder):
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_processes_read_the_matrices_themselves_and_the_caller_writes_the_store(folder, mode):
    weights = {name: functools.partial(load, folder, name) for name in matrices()}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = lq.cost_table(weights, FORMATS, rank=2, mode=mode, executor=pool, store=folder / "store")
    assert same(found, lq.cost_table(matrices(), FORMATS, rank=2, mode=mode))
    assert readers(folder).isdisjoint({str(os.getpid())})
    assert CostStore.read(folder / "store").keys() == weights.keys()


@pytest.mark.skipif(os.name == "nt", reason="kills by a signal")
def test_a_pool_that_breaks_leaves_what_was_finished(folder):
    weights = {name: functools.partial(load_or_die, folder, name) for name in matrices()}
    options = {"rank": 2, "store": folder / "store"}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.raises(BrokenProcessPool):
        lq.cost_table(weights, FORMATS, executor=pool, **options)
    before = CostStore.read(folder / "store").keys()
    assert before <= {"layers.0.q", "layers.0.up"}
    assert same(lq.cost_table(weights, FORMATS, **options), lq.cost_table(matrices(), FORMATS, rank=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_dask_finishes_the_table_although_a_worker_is_killed(folder):
    require_or_skip("distributed", lq._optional.is_installed("distributed"))
    import distributed

    weights = {f"{name} {copy}": functools.partial(load, folder, name, 0.3) for copy in range(3) for name in matrices()}
    weights["on the spot"] = lambda: matrices()["layers.0.q"]  # it travels: Dask pickles functions by what they do
    own = {name: matrices().get(name.split()[0], matrices()["layers.0.q"]) for name in weights}
    expected = lq.cost_table(own, FORMATS[:2], rank=2)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    )
    with cluster, distributed.Client(cluster) as client:
        first = set(client.run(os.getpid).values())
        killer = threading.Thread(target=kill_when_it_reads, args=(folder, min(first)))
        killer.start()
        seen = []
        found = lq.cost_table(
            weights,
            FORMATS[:2],
            rank=2,
            executor=client.get_executor(),
            store=folder / "store",
            progress=lambda *own: seen.append(own),
        )
        killer.join()
        client.wait_for_workers(2, timeout=60)
        second = set(client.run(os.getpid).values())
    assert same(found, expected)
    assert min(first) not in second
    assert len(CostStore.read(folder / "store")) == len(weights)
    assert seen == [(done, len(weights)) for done in range(1, len(weights) + 1)]
    assert str(os.getpid()) not in readers(folder)
    assert str(min(first)) in readers(folder)
