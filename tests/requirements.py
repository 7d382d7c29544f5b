"""What a run of the tests insists on.

Without an optional package its tests are skipped. ``LQLORA_REQUIRE=torch,highs`` makes that a failure, so that a
continuous-integration job that was to cover a package cannot pass by not having it.
"""

from __future__ import annotations

import os

import pytest

__all__ = ["require_or_skip", "required"]

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
