"""Parsers of option values."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

import lqlora as lq
from lqlora.cli import parsing
from lqlora.errors import InvalidArgumentError


@pytest.mark.parametrize(("text", "count"), [("paper", 243), ("code", 432), ("few", 24), ("paper,code", 432)])
def test_lists_of_formats_have_names(text, count):
    assert len(parsing.parse_formats(text)) == count


def test_formats_are_separated_by_commas_and_taken_once():
    expected = [lq.BlockFormat.parse("nf4/64:u8/256:float32"), lq.BlockFormat.parse("nf3/16:float16")]
    assert parsing.parse_formats("nf4/64:u8/256:float32, nf3/16:float16,nf4/64:u8/256:float32") == expected


@pytest.mark.parametrize("text", ["", " , ", "nf4", "few,nf99/64:float16"])
def test_an_invalid_format_is_refused(text):
    with pytest.raises(InvalidArgumentError):
        parsing.parse_formats(text)


def test_numbers_are_separated_by_commas():
    assert parsing.parse_integers("0, 16,64", "--ranks") == [0, 16, 64]


@pytest.mark.parametrize("text", ["", "a", "1.5", "1;2"])
def test_an_invalid_list_of_integers_is_refused(text):
    with pytest.raises(InvalidArgumentError):
        parsing.parse_integers(text, "--ranks")


def test_a_decimal_number_is_taken_exactly():
    assert parsing.parse_number("2.7", "--bits") == Fraction(27, 10)


@pytest.mark.parametrize("text", ["", "x", "1/0", "nan", "inf"])
def test_an_invalid_number_is_refused(text):
    with pytest.raises(InvalidArgumentError, match="--bits"):
        parsing.parse_number(text, "--bits")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("400000000", 400_000_000),
        ("400MB", 400_000_000),
        ("400 mb", 400_000_000),
        ("1.5GiB", 1_610_612_736),
        ("12kB", 12_000),
        ("1KiB", 1024),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_bytes_have_units(text, count):
    assert parsing.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1", "4XB", "4M", "1e3", "4 0"])
def test_an_invalid_number_of_bytes_is_refused(text):
    with pytest.raises(InvalidArgumentError, match="--bytes"):
        parsing.parse_bytes(text)


def test_a_pattern_is_a_shell_pattern_or_an_expression():
    assert parsing.parse_pattern("*.q_proj") == "*.q_proj"
    assert parsing.parse_pattern(r"re:(\d+)\.q") == re.compile(r"(\d+)\.q")
    with pytest.raises(InvalidArgumentError, match=r"re:\("):
        parsing.parse_pattern("re:(")


def test_pairs_are_split_at_the_last_sign():
    assert parsing.parse_pairs(["*.q=nf4/64:float16", "re:a(?=b)b=3"], "--fix") == {
        "*.q": "nf4/64:float16",
        re.compile("a(?=b)b"): "3",
    }


@pytest.mark.parametrize("texts", [["*.q"], ["=3"], ["*.q="], ["*.q=3", "*.q=4"]])
def test_an_invalid_pair_or_a_second_value_is_refused(texts):
    with pytest.raises(InvalidArgumentError, match="--fix"):
        parsing.parse_pairs(texts, "--fix")


def test_the_usual_ties_have_names():
    names = ["0.attn.q_proj", "0.attn.k_proj", "0.experts.0.w", "0.experts.1.w"]
    assert parsing.parse_ties(["fused", "*.x", "experts"], names) == [
        ("0.attn.q_proj", "0.attn.k_proj"),
        "*.x",
        ("0.experts.0.w", "0.experts.1.w"),
    ]
