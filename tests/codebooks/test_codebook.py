from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqlora import Codebook
from lqlora.errors import InvalidArgumentError


@given(levels=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=256, unique=True))
def test_boundaries_are_midpoints_between_their_levels(levels):
    codebook = Codebook(sorted(levels))
    low, high = codebook.levels[:-1], codebook.levels[1:]
    assert codebook.boundaries.tolist() == ((low.astype(float) + high) / 2).astype(np.float32).tolist()
    assert ((low <= codebook.boundaries) & (codebook.boundaries <= high)).all()


@pytest.mark.parametrize(("count", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (255, 8), (256, 8)])
def test_bits_hold_the_number_of_levels(count, bits):
    assert Codebook(range(count)).bits == bits


def test_a_codebook_does_not_change():
    levels = np.array([-1.0, 1.0], dtype=np.float32)
    codebook = Codebook(levels)
    levels[0] = 5.0
    assert codebook.levels.tolist() == [-1.0, 1.0]
    for array in (codebook.levels, codebook.boundaries):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


def test_equality_does_not_compare_names():
    assert Codebook([0, 1], name="one") == Codebook([0, 1], name="another")
    assert hash(Codebook([0, 1])) == hash(Codebook([0.0, 1.0]))
    assert Codebook([0, 1]) != Codebook([0, 2])
    assert Codebook([0, 1]) != "uint1"


def test_equality_compares_the_normalization_too():
    assert Codebook([0, 1], "same", "signed") != Codebook([0, 1], "same", "absmax")
    assert Codebook([0, 1], "one", "affine") == Codebook([0, 1], "another", "affine")
    assert len({Codebook([0, 1]), Codebook([0, 1], "x", "signed"), Codebook([0, 1], "x", "affine")}) == 3


@pytest.mark.parametrize("levels", [[], [1.0], [[0.0, 1.0]], list(range(257))])
def test_a_wrong_number_of_levels_is_refused(levels):
    with pytest.raises(InvalidArgumentError, match=r"^levels must .*(2 to 256|list)"):
        Codebook(levels)


@pytest.mark.parametrize("levels", [[1, 0], [0, 0], [0, 1e-46]])
def test_levels_that_do_not_increase_in_float32_are_refused(levels):
    with pytest.raises(InvalidArgumentError, match=r"^levels must .*increase.*index 0"):
        Codebook(levels)


@pytest.mark.parametrize(
    ("levels", "found"),
    [([0, np.nan], "nan at index 1"), ([-np.inf, 0], "-inf at index 0"), ([0, 1e39], "inf at index 1")],
)
def test_levels_that_are_not_finite_in_float32_are_refused(levels, found):
    with pytest.raises(InvalidArgumentError, match=f"^levels must .*got {found}"):
        Codebook(levels)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a:b", "4nf", "a+b", "é", "-a"])
def test_names_that_a_format_cannot_spell_are_refused(name):
    with pytest.raises(InvalidArgumentError, match=f"^name must .*{re.escape(repr(name))}"):
        Codebook([-1, 1], name=name)


def test_two_zeros_are_two_levels_in_the_order_of_their_signs():
    codebook = Codebook([-1, -0.0, 0.0, 1])
    assert np.signbit(codebook.levels).tolist() == [True, True, False, False]
    assert codebook != Codebook([-1, -0.0, 0.1, 1])
    assert codebook.boundaries.tolist() == [-0.5, -float(np.finfo(np.float32).tiny), 0.5]


def test_boundaries_never_decrease_beside_two_zeros():
    codebook = Codebook([-1e-45, -0.0, 0.0, 1e-45])
    assert (np.diff(codebook.boundaries) >= 0).all()


@pytest.mark.parametrize("zeros", [[0.0, -0.0], [0.0, 0.0], [-0.0, -0.0], [-0.0, 0.0, 0.0]])
def test_zeros_in_any_other_order_are_refused(zeros):
    with pytest.raises(InvalidArgumentError, match=r"^levels must .*increase"):
        Codebook([-1, *zeros, 1])


def test_levels_as_far_apart_as_float32_allows_are_taken():
    assert Codebook([-3.4e38, 3.4e38]).boundaries.tolist() == [0.0]


def test_the_widest_level_is_what_the_largest_entry_becomes():
    assert Codebook([-2, 1]).widest == 2.0
    assert Codebook([-2, 1], normalization="signed").widest == 1.0


@pytest.mark.parametrize("normalization", ["minmax", "", None, 1])
def test_other_normalizations_are_refused(normalization):
    with pytest.raises(InvalidArgumentError, match=f"^normalization must .*got {normalization!r}"):
        Codebook([0, 1], normalization=normalization)


@pytest.mark.parametrize("levels", [[-1, 0], [-2, -1], [-1, -0.5, -0.0]])
def test_a_signed_codebook_needs_a_level_above_zero(levels):
    with pytest.raises(InvalidArgumentError, match=f"^levels must .*signed.*got {float(levels[-1])}"):
        Codebook(levels, normalization="signed")


@pytest.mark.parametrize("levels", [[0, 1, 2], [1, 2], [0, 3], [0, 0.5], [0, 1, 2, 4], [-1, 0], [0, 128, 256, 384]])
def test_affine_levels_are_integers_of_some_bits_or_multiples(levels):
    with pytest.raises(InvalidArgumentError, match=f"^levels must .*affine.*got {len(levels)}"):
        Codebook(levels, normalization="affine")
