"""Hypothesis profiles, and the array libraries that tests run on."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from lqlora._optional import is_installed
from tests.requirements import require_or_skip

if TYPE_CHECKING:
    from collections.abc import Callable

# No deadlines: the first call on a library imports it, and shared machines stall.
hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=5000, deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

NAMESPACES = {
    "numpy": "array_api_compat.numpy",
    "torch": "array_api_compat.torch",
    "array-api-strict": "array_api_strict",
    "cupy": "array_api_compat.cupy",
}


def _is_usable(backend: str) -> bool:
    if not is_installed(backend.replace("-", "_")):
        return False
    if backend != "cupy":
        return True
    import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return False


@pytest.fixture(scope="session", params=list(NAMESPACES))
def xp(request: pytest.FixtureRequest) -> Any:
    require_or_skip(request.param, _is_usable(request.param))
    if request.param == "torch":
        # torch gives most warnings once in a process: which test fails of them would depend on the order of the tests.
        importlib.import_module("torch").set_warn_always(True)
    return importlib.import_module(NAMESPACES[request.param])


@pytest.fixture(scope="session", name="require_or_skip")
def _require_or_skip() -> Callable[[str, bool], None]:
    return require_or_skip
