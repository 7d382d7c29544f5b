"""The page of errors quotes messages and classes that the code has."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

from lqlora import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/how-to/errors_and_warnings.md").read_text(encoding="utf-8")

#: Message and class of each row, as they are quoted.
ROWS = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| [^|]+ \| [^|]+ \|$", PAGE, flags=re.MULTILINE)


def texts(node, raised=None):
    """Yield each text of a syntax tree, with NUL for what is computed, and the class that it is raised or warned with."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        raised = ast.unparse(node.exc.func)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warn":
        raised = ast.unparse(node.args[1]) if len(node.args) > 1 else "UserWarning"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, raised
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values), raised
    for child in ast.iter_child_nodes(node):
        is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        is_piece = isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)
        if not is_docstring and not is_piece:
            yield from texts(child, raised)


@pytest.fixture(scope="module")
def messages():
    paths = sorted((ROOT / "lqlora").rglob("*.py"))
    return {text for path in paths for text in texts(ast.parse(path.read_text(encoding="utf-8"))) if " " in text[0]}


def pattern(quoted):
    """Return a pattern of the texts that begin as a quoted message does, with anything for each ellipsis.

    A path or name at the beginning may be added by a function, so that the text begins after it.
    """
    first, *pieces = map(re.escape, quoted.removeprefix("… ").split("…"))
    start = r"(?:.*\0 )?" if quoted.startswith("… ") else ""
    return re.compile(start + ".*".join([first, *pieces]), flags=re.DOTALL)


def test_the_page_has_rows():
    assert len(ROWS) == len(re.findall(r"^\| `[^|]*\|[^|]*\|[^|]*\|[^|]*\|$", PAGE, flags=re.MULTILINE)) > 40


@pytest.mark.parametrize("name", errors.__all__)
def test_each_class_is_on_the_page(name):
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize(("quoted", "name"), ROWS)
def test_a_message_and_its_class_are_in_the_code(quoted, name, messages):
    assert hasattr(errors, name) or hasattr(builtins, name)
    longest, whole = max(quoted.removeprefix("… ").split("…"), key=len), pattern(quoted)
    classes = {raised for text, raised in messages if longest in text and whole.match(text)}
    assert name in classes or (classes and not classes & {*errors.__all__, "UserWarning"})
