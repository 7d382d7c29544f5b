"""What a matrix may take: fixed, forbidden and tied configurations, and minimum bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError
from tests.allocation.tables import FORMATS, NF2, NF4, NF8, SHAPES


def test_tied_matrices_take_one_format(table):
    free = lq.allocate(table, bits_per_weight=3.5)
    names = ["layers.0.q", "layers.1.q"]
    assert free.formats[names[0]] != free.formats[names[1]]  # else the tie would change nothing
    tied = lq.allocate(table, bits_per_weight=3.5, ties=[names])
    assert tied.formats[names[0]] == tied.formats[names[1]]
    assert tied.objective >= free.objective


def test_overlapping_ties_merge(table):
    names = list(SHAPES)
    plan = lq.allocate(table, bits_per_weight=4.0, ties=[names[:2], names[2:], names[1:3]])
    assert len(set(plan.formats.values())) == 1


def test_a_fixed_format_is_taken(table):
    plan = lq.allocate(table, bits_per_weight=6.0, fixed={"layers.1.q": NF2})
    assert plan.formats["layers.1.q"] == NF2


def test_a_fixed_format_counts_in_the_feasible_range(table):
    with pytest.raises(InfeasibleBudgetError) as caught:
        lq.allocate(table, bits_per_weight=3.0, fixed=dict.fromkeys(SHAPES, NF8))
    assert caught.value.minimum == caught.value.maximum


def test_a_forbidden_format_is_not_taken(table):
    free = lq.allocate(table, bits_per_weight=5.0)
    name, fmt = "layers.1.q", free.formats["layers.1.q"]
    plan = lq.allocate(table, bits_per_weight=5.0, forbidden={name: [fmt]})
    assert plan.formats[name] != fmt
    assert plan.objective >= free.objective


def test_a_format_with_an_infinite_cost_is_never_taken(table):
    costs = table.costs.copy()
    costs[:, 4] = np.inf
    broken = dataclasses.replace(table, costs=costs)
    assert NF8 not in lq.allocate(broken, bits_per_weight=100).formats.values()


@pytest.mark.parametrize(
    "options",
    [
        {"ties": [["layers.0.q", "nowhere"]]},
        {"fixed": {"nowhere": NF2}},
        {"forbidden": {"nowhere": [NF2]}},
        {"fixed": {"layers.0.q": lq.BlockFormat.parse("int7/5:float32")}},
        {"forbidden": {"layers.0.q": [lq.BlockFormat.parse("int7/5:float32")]}},
        {"forbidden": {"layers.0.q": FORMATS}},
        {"fixed": {"layers.0.q": NF2}, "forbidden": {"layers.0.q": [NF2]}},
        {"fixed": {"layers.0.q": NF2, "layers.1.q": NF4}, "ties": [["layers.0.q", "layers.1.q"]]},
        {"solver": "abacus"},
        {"time_limit": -1.0},
        {"rel_gap": -1.0},
    ],
    ids=[
        "unknown tie",
        "unknown fixed",
        "unknown forbidden",
        "fixed format not in table",
        "forbidden format not in table",
        "all forbidden",
        "fixed and forbidden",
        "tied and fixed apart",
        "unknown solver",
        "negative time",
        "negative gap",
    ],
)
def test_contradictions_and_unknown_names_are_refused(table, options):
    with pytest.raises(InvalidArgumentError):
        lq.allocate(table, bits_per_weight=5.0, **options)


def test_an_empty_matrix_costs_nothing():
    weights = {"none": np.zeros((0, 4)), "some": np.ones((4, 4))}
    plan = lq.allocate(lq.cost_table(weights, FORMATS[:1], rank=0), bits_per_weight=9)
    assert plan.bits_by_matrix()["none"] == 0.0
    assert plan.table().count("\n") == 3


def test_a_table_of_empty_matrices_is_refused_or_costs_nothing():
    empty = lq.cost_table({"none": np.zeros((0, 4))}, FORMATS[3:4], rank=0)
    assert lq.allocate(empty, total_bytes=9).storage_bits == 0
