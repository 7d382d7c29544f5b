"""What a run of the tests insists on.

Without an optional package its tests are skipped. ``LQLORA_REQUIRE=torch,highs`` makes that a failure, so that a
continuous-integration job that was to cover a package cannot pass by not having it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import pytest

from lqlora._optional import is_installed

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["require_module", "require_or_skip", "required"]

VARIABLE = "LQLORA_REQUIRE"


def required() -> frozenset[str]:
    """Names in the environment variable, which separates them by commas."""
    return frozenset(filter(None, (name.strip() for name in os.environ.get(VARIABLE, "").split(","))))


def require_or_skip(name: str, available: bool) -> None:
    """Return if ``name`` is available; else skip the running test, or fail it if the variable names it."""
    if available:
        return
    if name in required():
        pytest.fail(f"{name} is not available, and {VARIABLE} names it.", pytrace=False)
    pytest.skip(f"{name} is not available.")


def require_module(name: str) -> ModuleType:
    """Import an optional package for a whole test file, or skip the file; fail if the variable names the package."""
    if is_installed(name):
        return importlib.import_module(name)
    if name in required():
        pytest.fail(f"{name} is not installed, and {VARIABLE} names it.", pytrace=False)
    pytest.skip(f"{name} is not installed.", allow_module_level=True)
