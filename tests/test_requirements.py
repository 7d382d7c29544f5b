from __future__ import annotations

import pytest

from tests.requirements import require_or_skip, required


def test_a_missing_package_skips_unless_it_is_named(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", "numpy, highs")
    with pytest.raises(pytest.skip.Exception, match="torch is not available"):
        require_or_skip("torch", False)


def test_a_missing_package_fails_if_it_is_named(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", "numpy,torch")
    with pytest.raises(pytest.fail.Exception, match="torch is not available, and LQLORA_REQUIRE names it"):
        require_or_skip("torch", False)


def test_an_available_package_does_neither(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", "numpy")
    assert require_or_skip("numpy", True) is None


def test_an_empty_variable_names_nothing(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", " , ")
    assert required() == frozenset()
