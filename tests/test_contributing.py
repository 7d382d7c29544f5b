"""The answers of CONTRIBUTING.md's table *Where things are* name files that exist, and whose docstring says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ANSWERS = re.findall(r"^\| (.+\?) \| `(.+)` \|$", TEXT, flags=re.MULTILINE)


def test_the_table_answers_twenty_questions_or_more():
    assert len(ANSWERS) >= 20
    assert len({file for _, file in ANSWERS}) == len(ANSWERS)


@pytest.mark.parametrize(("question", "file"), ANSWERS)
def test_an_answer_is_a_documented_file(question, file):
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    assert docstring, question


@pytest.mark.parametrize("path", re.findall(r"`((?:lqlora|docs|scripts|tests)/[\w./]+)`", TEXT))
def test_every_path_in_the_text_exists(path):
    assert (ROOT / path).exists()
