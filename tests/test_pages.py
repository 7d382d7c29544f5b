"""The links, paths and names in the pages exist."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import lqlora

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in chain(
        (
            ROOT / f"{name}.md"
            for name in ("README", "CONTRIBUTING", "CHANGELOG", "benchmarks/README", "experiments/README")
        ),
        (ROOT / "changelog.d").glob("*.md"),
        (ROOT / "docs").rglob("*.md"),
    )
    if "_build" not in path.parts
)
FOLDERS = ("lqlora", "docs", "scripts", "tests", "benchmarks", "experiments", "changelog.d", ".ci")
SOURCES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}

#: Built by ``scripts/docs``.
BUILT = {"docs/_build/html"}

#: Attributes that the changelog says are gone.
GONE = {"Plan.demands", "Plan.table", "Plan.to_html"}

#: Packages without which some modules of lqlora cannot be imported.
OPTIONAL = {"cupy", "gguf", "hypothesis", "matplotlib", "peft", "rich", "torch", "transformers", "typer"}


def prose(path: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def quoted(path: Path) -> list[str]:
    """Return what a page has between single backticks, without arguments, a tilde or a title before an address."""
    texts = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(path))
    return [re.sub(r".*<(.+)>$", r"\1", text).removeprefix("~").partition("(")[0] for text in texts]


def cases(pattern: str) -> list[Any]:
    """Return each quoted text that matches a pattern as a case, once for each page."""
    return [
        pytest.param(text, id=f"{path.relative_to(ROOT)}:{text}")
        for path in PAGES
        for text in sorted({text for text in quoted(path) if re.fullmatch(pattern, text)})
    ]


def attributes() -> list[Any]:
    """Return each quoted attribute of a class of the package as a case."""
    found = classes()
    return [
        pytest.param(found[case.values[0].split(".")[0]], case.values[0].split(".")[1], id=case.id)
        for case in cases(r"[A-Z]\w+(?:\.\w+)+")
        if case.values[0].split(".")[0] in found and case.values[0] not in GONE
    ]


def links() -> list[Any]:
    """Return the page and the address of each relative link."""
    return [
        pytest.param(path, address, id=f"{path.relative_to(ROOT)}:{address}")
        for path in PAGES
        for address in sorted(set(re.findall(r"\]\(([^)\s:]+)\)", prose(path))))
    ]


def anchors(path: Path) -> set[str]:
    """Return the addresses of the headings of a page, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def classes() -> dict[str, type]:
    """Return the classes of the package by name."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(lqlora.__path__, "lqlora.", onerror=lambda _: None):
        if module.name.endswith("__main__"):
            continue
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError as error:
            if not OPTIONAL & set(re.findall(r"\w+", str(error))):
                raise
        else:
            found |= {name: member for name, member in members.items() if inspect.isclass(member)}
    return found


def has(owner: Any, name: str) -> bool:
    """Return whether a module or class has an attribute, a field of a class without default included."""
    return hasattr(owner, name) or any(
        name in vars(base).get("__annotations__", {}) for base in getattr(owner, "__mro__", ())
    )


def resolve(name: str) -> bool:
    """Return whether a dotted name below ``lqlora`` exists."""
    parts = name.split(".")
    owner: Any = lqlora
    for depth, part in enumerate(parts[1:], 2):
        if not has(owner, part):
            try:
                importlib.import_module(".".join(parts[:depth]))
            except ModuleNotFoundError as error:
                return bool(OPTIONAL & {str(error.name)})
            except ImportError as error:
                return bool(OPTIONAL & set(re.findall(r"\w+", str(error))))
        if not hasattr(owner, part):
            return depth == len(parts)
        owner = getattr(owner, part)
    return True


@pytest.mark.parametrize(("path", "address"), links())
def test_a_relative_link_leads_to_a_file_and_a_heading(path, address):
    name, _, anchor = address.partition("#")
    target = (path.parent / name) if name else path
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


@pytest.mark.parametrize("name", cases(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*"))
def test_a_path_exists(name):
    assert name in BUILT or list(ROOT.glob(name.rstrip("/")))


@pytest.mark.parametrize("name", cases(r"[\w]+\.(?:py|cu|cuh|cpp)"))
def test_a_source_file_exists(name):
    assert name in SOURCES or (ROOT / name).exists()


@pytest.mark.parametrize("name", cases(r"(?:lq|lqlora)(?:\.(?!json\b)\w+)+"))
def test_a_name_of_the_package_exists(name):
    assert resolve(re.sub(r"^lq\b", "lqlora", name))


@pytest.mark.parametrize(("owner", "attribute"), attributes())
def test_an_attribute_of_a_class_exists(owner, attribute):
    assert has(owner, attribute)
