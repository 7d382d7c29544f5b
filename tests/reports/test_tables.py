"""Plans as Markdown tables."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.reports import table
from lqlora.reports.tables import Table
from tests.requirements import require_module


def test_it_has_a_row_for_each_matrix(plan):
    head, rule, *rows = table(plan).split("\n")
    assert head.count("|") == rule.count("|") == 6
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [[name, str(fmt)] for name, fmt in plan.formats.items()]
    assert [row[2] for row in cells] == [f"{bits:.3f}" for bits in plan.bits_by_matrix().values()]


def test_by_kind_it_has_a_row_for_each_kind(mixture):
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table(mixture, by="kind").split("\n")]
    assert [row[:2] for row in rows[2:]] == [["`h.*.experts.*.up`", "6"], ["`h.*.q`", "2"]]
    assert {len(row) for row in rows} == {6}


def test_a_name_ends_neither_its_cell_nor_its_row(plan):
    row = table(plan).split("\n")[2]
    name = "a|b\nc\u202ed"
    strange = dataclasses.replace(plan, matrices={name: plan.matrices["layers.0.q"]})
    assert table(strange).split("\n")[2:] == [row.replace("layers.0.q", r"`a\|b\nc\u202ed`")]


def test_another_word_is_refused(plan):
    with pytest.raises(InvalidArgumentError, match=r"by .*color"):
        table(plan, by="color")


#: Texts of characters that Markdown, its tables, or the extensions of GitHub give a meaning to.
NAMES = st.one_of(st.text(), st.text("`|\\*_~[]()<>!&;:$#@. ab1\n"))


@functools.cache
def _markdown():
    return require_module("markdown_it").MarkdownIt("commonmark").enable("table")


@given(cells=st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=3))
@example(cells=[("__init__", ":smile:"), ("model.*.experts.*.up", "[a](http://b.c)"), ("<b>", "\\|`a``b`")])
@example(cells=[("www.a.b", "http://a.b"), (" a ", "a  b"), ("layers.0.q", "nf4/64:u8/256:float32")])
@settings(max_examples=15)
def test_markdown_renders_every_cell_as_it_is(cells):
    found = [
        [(child.type, child.content) for child in token.children]
        for token in _markdown().parse(Table(("kind", "format"), cells).markdown())
        if token.type == "inline"
    ]
    assert found[:2] == [[("text", "kind")], [("text", "format")]]
    # Spaces alone are left out where a cell is not a code span, and such a cell is not rendered at all.
    assert len(found) == 2 + 2 * len(cells)
    for parts, cell in zip(found[2:], (cell for row in cells for cell in row), strict=True):
        assert "".join(content for _, content in parts) == printable(cell)
        assert {kind for kind, _ in parts} <= {"text", "code_inline"}


@pytest.mark.parametrize("name", ["layers.0.q", "blk-1/attn+q", "Größe.q", "nf4/64:u8/256:float32", "2.000 to 4.000"])
def test_plain_cells_stay_plain(name):
    assert Table(("a", "b"), [(name, "1")]).markdown().split("\n")[2] == f"| {name} | 1 |"


@pytest.mark.parametrize("name", ["www.a.b", "http://a.b", ":smile:", "a_b", "$x$", "a@b.c", "~~a~~", "&lt;", "a  b"])
def test_other_cells_are_code(name):
    assert Table(("a", "b"), [(name, "1"), ("c", "2")]).markdown().split("\n")[2:] == [
        f"| `{name}` | 1 |",
        "| `c` | 2 |",
    ]
