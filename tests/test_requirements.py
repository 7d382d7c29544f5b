from __future__ import annotations

import warnings

import pytest

from tests.requirements import import_quietly, require_or_skip, required


def test_a_missing_package_skips_unless_it_is_named(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", "numpy, highs")
    with pytest.raises(pytest.skip.Exception, match="torch is not available"):
        require_or_skip("torch", False)


def test_a_missing_package_fails_if_it_is_named(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", "numpy,torch")
    with pytest.raises(pytest.fail.Exception, match=r"torch.*LQLORA_REQUIRE"):
        require_or_skip("torch", False)


def test_an_available_package_does_neither(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", "numpy")
    assert require_or_skip("numpy", True) is None


def test_an_empty_variable_names_nothing(monkeypatch):
    monkeypatch.setenv("LQLORA_REQUIRE", " , ")
    assert required() == frozenset()


def test_warnings_of_a_package_at_import_are_ignored(tmp_path, monkeypatch):
    (tmp_path / "warns_at_import.py").write_text("import warnings\nwarnings.warn('deprecated', DeprecationWarning)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_quietly("warns_at_import").__name__ == "warns_at_import"
    with pytest.warns(UserWarning, match="later"):
        warnings.warn("later", UserWarning, stacklevel=1)
