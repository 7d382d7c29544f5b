"""Installed and licensed are two questions, and neither imports a solver by surprise."""

from __future__ import annotations

import pytest

from lqlora.errors import InvalidArgumentError
from lqlora.solvers import License, check_license, registry


class Licensed:
    """A solver whose license ran out."""

    REQUIRES = "numpy"

    def version(self) -> str:
        return "1"

    def solve(self, *_):
        raise NotImplementedError

    def check_license(self) -> License:
        return License(ok=False, message="expired")


def test_free_solvers_are_licensed():
    assert check_license("highs") == (True, "free")


def test_what_the_solver_says_of_its_license_is_passed_on(monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, "licensed", Licensed())
    assert registry.available()["licensed"]
    assert check_license("licensed") == License(ok=False, message="expired")


def test_what_is_not_installed_is_not_licensed(monkeypatch):
    monkeypatch.setattr(registry, "is_installed", lambda _: False)
    assert check_license("highs") == License(ok=False, message="highspy is not installed")


def test_the_license_of_an_unknown_solver_is_an_error():
    with pytest.raises(InvalidArgumentError, match="Unknown solver 'abacus'"):
        check_license("abacus")
