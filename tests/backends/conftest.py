"""CuPy for the tests of the CUDA kernels: the stand-in that emulates them, and the real one where there is a device."""

from __future__ import annotations

import importlib
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import array_api_compat
import pytest

from lqlora._optional import is_installed
from lqlora.backends.cupy import taken
from lqlora.backends.cupy.fits import Fits
from tests.backends.kernels import KERNELS, MATMUL_SAMPLE
from tests.emulator import build
from tests.emulator.cupy_stand_in import CuPyStandIn
from tests.requirements import require_or_skip

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What is compiled together: a call to the compiler for each kernel would take longer.
TOGETHER = {name: names for names in (*KERNELS.values(), MATMUL_SAMPLE) for name in names}


@pytest.fixture(scope="module", params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module ``cupy``; whichever it is, kernels run by the backend's own code."""
    if request.param == "device":
        require_or_skip("cupy", is_installed("cupy") and importlib.import_module("cupy").cuda.is_available())
        yield importlib.import_module("cupy")
    else:
        yield from stand_in()


@pytest.fixture(scope="module")
def emulated() -> Iterator[CuPyStandIn]:
    """Only the stand-in."""
    yield from stand_in()


def stand_in() -> Iterator[CuPyStandIn]:
    """Put the stand-in where CuPy would be."""
    require_or_skip("g++", build.is_available())
    module = CuPyStandIn(TOGETHER)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(sys.modules, "cupy", module)
        patch.setitem(sys.modules, "array_api_compat.cupy", module)
        patch.setattr(array_api_compat, "cupy", module, raising=False)
        patch.setenv("CUPY_CACHE_DIR", folder)
        taken.kernels_run.cache_clear()
        yield module
    taken.kernels_run.cache_clear()


@pytest.fixture
def on_tensors(emulated: CuPyStandIn, torch: Any, monkeypatch: pytest.MonkeyPatch) -> Fits:
    """The kernels for tensors, given such in host memory, which the emulator can reach."""
    from lqlora.backends.cupy.tensors import TorchMemory

    def view(_: TorchMemory, tensor: Any) -> int:
        own = tensor.detach().view(torch.int16) if tensor.itemsize == 2 else tensor.detach()
        return emulated.lend(own.numpy())

    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(TorchMemory, "device", lambda *_: 0)
    monkeypatch.setattr(TorchMemory, "view", view)
    return Fits(TorchMemory())
