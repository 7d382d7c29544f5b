"""Hypothesis profiles, and the array libraries that tests run on."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from lqlora._optional import is_installed
from tests.requirements import require_or_skip, required
from tests.sampling import outside_of_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

# No deadlines: the first call on a library imports it, and shared machines stall.
hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
# For mutation runs: few examples, always the same, and no time for making a failing one small.
hypothesis.settings.register_profile(
    "quick",
    max_examples=20,
    derandomize=True,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.register_profile("thorough", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

NAMESPACES = {
    "numpy": "array_api_compat.numpy",
    "torch": "array_api_compat.torch",
    "array-api-strict": "array_api_strict",
    "cupy": "array_api_compat.cupy",
    "torch-cuda": "array_api_compat.torch",
}

#: Those that need a device.
ON_DEVICE = ("cupy", "torch-cuda")


def _is_usable(backend: str) -> bool:
    if backend == "torch-cuda":
        return is_installed("torch") and importlib.import_module("torch").cuda.is_available()
    if not is_installed(backend.replace("-", "_")):
        return False
    if backend != "cupy":
        return True
    import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return False


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow, and leave out what needs a device where there is none and none is required."""
    for item in items:
        on_strict = getattr(getattr(item, "callspec", None), "params", {}).get("xp") == "array-api-strict"
        if on_strict and item.get_closest_marker("slow_on_strict"):
            item.add_marker(pytest.mark.slow)
    # A skip for each test that needs a device would take a minute.
    if not any(_is_usable(name) or name in required() for name in ON_DEVICE):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    for item in outside_of_samples(items):
        item.add_marker(pytest.mark.slow)


def load(backend: str) -> Any:
    """Return the namespace of an array library, or skip; fail if LQLORA_REQUIRE names the library."""
    require_or_skip(backend, _is_usable(backend))
    if backend.startswith("torch"):
        # torch gives most warnings once in a process: which test fails of them would depend on the order of the tests.
        importlib.import_module("torch").set_warn_always(True)
    return importlib.import_module(NAMESPACES[backend])


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[pytest.mark.gpu] if name in ON_DEVICE else []) for name in NAMESPACES],
)
def xp(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """For "torch-cuda", and no test of another kind, torch makes its tensors on the device: xp is the same module."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("xp") != "torch-cuda":
        yield
        return
    load("torch-cuda")
    with importlib.import_module("torch").device("cuda"):
        yield


@pytest.fixture(scope="session", params=["numpy", "torch"])
def fast_xp(request: pytest.FixtureRequest) -> Any:
    """Only the libraries that have overrides on every machine."""
    return load(request.param)


@pytest.fixture(scope="session")
def torch() -> Any:
    load("torch")
    return importlib.import_module("torch")


@pytest.fixture(scope="session")
def cuda_torch() -> Any:
    """Only torch with a CUDA device, which is not its default one here."""
    load("torch-cuda")
    return importlib.import_module("torch")


@pytest.fixture(scope="session")
def strict() -> Any:
    return load("array-api-strict")
