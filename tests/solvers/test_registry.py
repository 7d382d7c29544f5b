"""Registry of solvers: installation and license are separate checks."""

from __future__ import annotations

import pytest

from lqlora.errors import InvalidArgumentError
from lqlora.solvers import License, check_license, registry


class Licensed:
    """Adapter of a solver with an expired license."""

    REQUIRES = "numpy"

    def version(self) -> str:
        return "1"

    def solve(self, *_):
        raise NotImplementedError

    def check_license(self) -> License:
        return License(ok=False, message="expired")


def test_free_solvers_are_licensed():
    assert check_license("highs") == (True, "free")


def test_the_license_of_the_adapter_is_returned(monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, "licensed", Licensed())
    assert registry.available()["licensed"]
    assert check_license("licensed") == License(ok=False, message="expired")


def test_a_solver_that_is_not_installed_is_not_licensed(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda _: False)
    assert check_license("highs") == License(ok=False, message="highspy is not installed")


def test_the_license_of_an_unknown_solver_is_an_error():
    with pytest.raises(InvalidArgumentError, match=r"solver.*highs.*'abacus'"):
        check_license("abacus")
