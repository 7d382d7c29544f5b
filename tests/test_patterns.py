"""Selecting names by pattern: matches, and errors when no name matches."""

from __future__ import annotations

import re

import pytest

from lqlora._patterns import EMBEDDINGS, OUTPUT_HEADS, NameIndex, list_names, matches, select
from lqlora.errors import InvalidArgumentError

NAMES = ["model.embed_tokens", "layers.0.q", "layers.0.k", "layers.1.q", "m[0]", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.?.q", ["layers.0.q", "layers.1.q"]),
        ("layers", []),
        ("q", ["layers.0.q", "layers.1.q"]),
        ("1.q", ["layers.1.q"]),
        ("tokens", []),
        ("m[0]", ["m[0]"]),
        (re.compile(r"layers\.\d\.q"), ["layers.0.q", "layers.1.q"]),
        (re.compile("layers"), []),
        (lambda name: name.endswith("k"), ["layers.0.k"]),
    ],
    ids=[
        "shell",
        "part",
        "last component",
        "last components",
        "part of a component",
        "itself",
        "expression",
        "part of an expression",
        "function",
    ],
)
def test_a_pattern_matches_whole_names(pattern, expected):
    assert [name for name in NAMES if matches(name, pattern)] == expected


class TestSelect:
    def test_names_keep_their_order(self):
        assert select(NAMES, ["*.k", "layers.0.*"]) == ["layers.0.q", "layers.0.k"]

    def test_exclusions_win(self):
        assert select(NAMES, "*", [*EMBEDDINGS, *OUTPUT_HEADS, "*.q"]) == ["layers.0.k", "m[0]"]

    def test_a_pattern_that_matches_nothing_beside_one_that_does_is_allowed(self):
        assert select(NAMES, ["m[0]", "nowhere"], "nowhere") == ["m[0]"]

    def test_a_name_stands_for_itself_alone(self):
        names = ["q", "a.q", "m*", "m0"]
        assert select(names, ["q", "m*"]) == ["q", "m*"]
        assert select(names, "*", "q") == ["a.q", "m*", "m0"]

    @pytest.mark.parametrize("options", [{"include": "*.v"}, {"exclude": "*"}, {"include": []}], ids=str)
    def test_an_empty_selection_is_refused_with_what_there_is(self, options):
        with pytest.raises(InvalidArgumentError, match=r"^include .*tensor of a\.bin.* 6 .*model\.embed_tokens"):
            select(NAMES, **options, what="tensor", where=" of a.bin")


class TestNameIndex:
    def test_rows_are_sorted_and_listed_once(self):
        assert NameIndex(NAMES).rows(["layers.1.q", "*.q", "layers.0.*"]) == [1, 2, 3]

    def test_a_name_stands_for_itself_alone(self):
        assert NameIndex(["m*", "m0"]).rows("m*") == [0]

    def test_the_end_of_a_name_stands_for_all_that_have_it(self):
        assert NameIndex(NAMES).rows("q") == [1, 3]

    def test_exclusions_may_leave_nothing(self):
        assert NameIndex(NAMES).rows("*.k", "layers.0.*") == []

    @pytest.mark.parametrize(
        ("patterns", "parameter"),
        [(("*.v",), "ties"), ((["*.q", "*.v"],), "ties"), (("*.q", "*.v"), "exclude")],
        ids=str,
    )
    def test_every_pattern_must_match(self, patterns, parameter):
        with pytest.raises(InvalidArgumentError, match=rf"^{parameter} .*'\*\.v'.* 6 "):
            NameIndex(NAMES).rows(*patterns, parameter="ties")


@pytest.mark.parametrize("patterns", [3, None, ["*", 3], {"a": 1}.values()], ids=str)
def test_what_is_no_pattern_is_refused(patterns):
    with pytest.raises(InvalidArgumentError, match=r"^exclude .*(3|null|1)\.$"):
        select(NAMES, "*", patterns)


def test_long_lists_are_cut():
    assert list_names(NAMES) == "model.embed_tokens, layers.0.q, layers.0.k, layers.1.q, m[0] and 1 more"
    assert list_names(NAMES[:5]).endswith("m[0]")
