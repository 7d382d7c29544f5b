"""No two files of the package import each other, directly or through others.

Imports inside functions count, because they only hide a circle. Imports for type checkers do not count.
``scripts/structure`` also lists the circles that those would add.
"""

from __future__ import annotations

import pytest

from tests.requirements import require_module

grimp = require_module("grimp")


def circles(package):
    """Return the strongly connected components of more than one module in the import graph of a package."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    reached = {module: graph.find_upstream_modules(module) for module in graph.modules}
    found = {frozenset([m, *(n for n in reached[m] if m in reached[n])]) for m in reached}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def test_no_two_files_import_each_other():
    assert circles("lqlora") == []


DIRECT = {"planted/a.py": "from planted import b", "planted/b.py": "from planted.a import name"}

PLANTED = {
    "direct": (DIRECT, ["planted.a", "planted.b"]),
    "through another file": (
        {
            "planted/a.py": "import planted.b",
            "planted/b.py": "from planted import c",
            "planted/c.py": "from .a import name",
            "planted/outside.py": "import planted.a",
        },
        ["planted.a", "planted.b", "planted.c"],
    ),
    "inside a function": (
        DIRECT | {"planted/b.py": "def function():\n    from planted.a import name"},
        ["planted.a", "planted.b"],
    ),
    "through the file of a package": (
        {
            "planted/room/__init__.py": "from planted.room.a import name",
            "planted/room/a.py": "from planted.room import b",
        },
        ["planted.room", "planted.room.a"],
    ),
}


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return a function that writes the files of a package which can then be found by its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(sources):
        for name, source in {"planted/__init__.py": "", **sources}.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)

    return write


@pytest.mark.parametrize(("sources", "circle"), PLANTED.values(), ids=PLANTED)
def test_a_planted_circle_is_found(plant, sources, circle):
    plant(sources)
    assert circles("planted") == [circle]


@pytest.mark.parametrize(
    "sources",
    [
        {"planted/a.py": "from planted import b", "planted/b.py": ""},
        DIRECT
        | {"planted/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planted.a import name"},
        {
            "planted/room/__init__.py": "from planted.room import a",
            "planted/room/a.py": "from planted.room import b",
            "planted/room/b.py": "",
        },
    ],
    ids=["one direction", "for type checkers", "of files beside each other"],
)
def test_no_circle_is_found_where_there_is_none(plant, sources):
    plant(sources)
    assert circles("planted") == []
