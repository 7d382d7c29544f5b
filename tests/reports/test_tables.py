"""Plans as Markdown tables."""

from __future__ import annotations

import dataclasses

import pytest

from lqlora.errors import InvalidArgumentError
from lqlora.reports import table


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
