from __future__ import annotations

import sys

import pytest

from lqlora._optional import is_installed, require
from lqlora.errors import MissingDependencyError


@pytest.mark.parametrize(
    ("module", "found"), [("numpy", True), ("numpy.linalg", True), ("no_such", False), ("no_such.part", False)]
)
def test_installed_modules_are_found(module, found):
    assert is_installed(module) is found


def test_looking_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "bystander_of_lqlora.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("bystander_of_lqlora")
    assert "bystander_of_lqlora" not in sys.modules


def test_what_is_installed_is_imported():
    assert require("json.decoder", "torch", "This").JSONDecoder


def test_the_error_is_a_sentence_with_the_command():
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such.part", "demo", "The demo")
    assert str(caught.value) == "The demo needs no_such: pip install 'lqlora[demo]'."
    assert isinstance(caught.value, ImportError)


def test_a_broken_package_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_for_lqlora.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require("broken_for_lqlora", "demo", "The demo")
    assert not isinstance(caught.value, MissingDependencyError)
