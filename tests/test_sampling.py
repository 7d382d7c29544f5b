"""Samples of the cases of a test: as many as asked, and every value of a parameter among them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.sampling import sample


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=3), more=st.integers(0, 9))
def test_every_value_is_in_a_sample_as_large_as_the_longest_parameter(counts, more):
    cases = list(itertools.product(*([(name, value) for value in range(count)] for name, count in enumerate(counts))))
    chosen = sample(cases, max(counts) + more)
    assert len(set(chosen)) == len(chosen) == min(max(counts) + more, len(cases))
    assert {value for position in chosen for value in cases[position]} == set(itertools.chain.from_iterable(cases))


def test_values_come_as_often_as_others():
    cases = [(("library", library), ("bits", bits)) for library in ("numpy", "torch") for bits in range(8)]
    libraries = [cases[position][0] for position in sample(cases, 8)]
    assert libraries.count(("library", "numpy")) == 4


def test_fewer_cases_than_values_are_all_different():
    assert sample([("a",), ("a",), ("b",), ("c",)], 2) == [0, 2]
