"""Optional packages in tests: a test skips without one, or fails if ``LQLORA_REQUIRE`` names it.

``LQLORA_REQUIRE=torch,highs`` turns skips into failures, so that a job of continuous integration that was meant to
cover a package cannot pass without it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING

import pytest

from lqlora._optional import is_installed

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["import_quietly", "require_module", "require_or_skip", "required"]

VARIABLE = "LQLORA_REQUIRE"

#: Names whose modules a package imports when they are first used, and with them other packages that may warn.
_LAZY = {"transformers": ("LlamaForCausalLM", "AutoTokenizer")}


def required() -> frozenset[str]:
    """Return the names in the environment variable, which separates them by commas."""
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
        return import_quietly(name)
    if name in required():
        pytest.fail(f"{name} is not installed, and {VARIABLE} names it.", pytrace=False)
    pytest.skip(f"{name} is not installed.", allow_module_level=True)


def import_quietly(name: str) -> ModuleType:
    """Import a package without its warnings, which would be errors in a test.

    What a package warns of at import depends on the packages beside it: transformers imports hqq if it is installed,
    and hqq imports parts of torch that are deprecated. Such warnings say nothing about this library.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
        for attribute in _LAZY.get(name, ()):
            getattr(module, attribute)
    return module
