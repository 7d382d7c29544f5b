"""Fixtures of the kernel tests: instruction sets of the CPU, and CuPy as an emulating stand-in or on a device."""

from __future__ import annotations

import importlib
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import array_api_compat
import pytest

from lqlora._optional import is_installed
from lqlora.backends.cpu import loading
from lqlora.backends.cuda import launching as launch
from lqlora.backends.cuda import registration as taken
from lqlora.backends.cuda.fits import Fits
from tests.backends.kernels import KERNELS, MATMUL_SAMPLE, TENSOR_SAMPLE
from tests.emulator import build
from tests.emulator.cupy_stand_in import CuPyStandIn
from tests.requirements import require_or_skip

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Kernels that are compiled together: one run of the compiler for each kernel would take longer.
TOGETHER = {name: names for names in (*KERNELS.values(), MATMUL_SAMPLE, TENSOR_SAMPLE) for name in names}


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the compiled kernels with one instruction set of this machine, and return its name."""
    require_or_skip("native", loading.status()[0])
    if request.param not in loading.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    with loading.using(request.param):
        yield request.param


@pytest.fixture(scope="module", params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def cupy(request: pytest.FixtureRequest) -> Any:
    """Return the stand-in or the real ``cupy``. The backend's own code launches the kernels on either."""
    if request.param == "stand-in":
        return request.getfixturevalue("emulated")
    require_or_skip("cupy", is_installed("cupy") and importlib.import_module("cupy").cuda.is_available())
    return importlib.import_module("cupy")


@pytest.fixture(scope="module")
def emulated() -> CuPyStandIn:
    """Return the stand-in of CuPy."""
    require_or_skip("g++", build.is_available())
    return CuPyStandIn(TOGETHER)


@pytest.fixture(autouse=True)
def _the_one_that_is_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Import the stand-in as CuPy, only in tests that take it: a real CuPy may be installed."""
    name = next((name for name in ("cupy", "emulated") if name in request.fixturenames), None)
    module = None if name is None else request.getfixturevalue(name)
    if isinstance(module, CuPyStandIn):
        with in_place(module):
            yield
    else:
        yield


@contextmanager
def in_place(module: CuPyStandIn) -> Iterator[None]:
    """Import a stand-in as CuPy inside the ``with`` block, with an empty folder of compiled kernels."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(sys.modules, "cupy", module)
        patch.setitem(sys.modules, "array_api_compat.cupy", module)
        patch.setattr(array_api_compat, "cupy", module, raising=False)
        patch.setenv("CUPY_CACHE_DIR", folder)
        taken.kernels_run.cache_clear()
        yield
    taken.kernels_run.cache_clear()


@pytest.fixture
def on_tensors(emulated: CuPyStandIn, torch: Any, monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Return the kernels for torch tensors, which use tensors in host memory that the emulator can access."""
    from lqlora.backends.cuda.torch import TorchMemory

    def view(_: TorchMemory, tensor: Any) -> int:
        own = tensor.detach().view(torch.int16) if tensor.itemsize == 2 else tensor.detach()
        return emulated.lend(own.numpy())

    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(TorchMemory, "device", lambda *_: 0)
    monkeypatch.setattr(TorchMemory, "view", view)
    return Fits(TorchMemory())


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit grids to two blocks of threads, so that threads loop over the rest of the work."""
    monkeypatch.setattr(launch, "MOST_BLOCKS", 2)
