"""Constraints on the configurations of a matrix: fixed, forbidden and tied ones, and minimum bits."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError
from tests.costs.cases import FORMATS, NF2, NF4, NF8, SHAPES, make_table


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
    assert lq.reports.table(plan).count("\n") == 3


def test_a_table_of_empty_matrices_is_refused_or_costs_nothing():
    empty = lq.cost_table({"none": np.zeros((0, 4))}, FORMATS[3:4], rank=0)
    assert lq.allocate(empty, total_bytes=9).storage_bits == 0


class TestPatterns:
    @pytest.mark.parametrize("pattern", ["*.q", re.compile(r"layers\.\d\.q"), lambda name: name.endswith("q")])
    def test_a_format_is_fixed_for_all_that_match(self, table, pattern):
        plan = lq.allocate(table, bits_per_weight=8.5, fixed={pattern: NF2})
        assert {name for name, fmt in plan.formats.items() if fmt == NF2} == {"layers.0.q", "layers.1.q"}

    def test_a_name_is_a_pattern_for_itself_whatever_characters_it_has(self, table):
        names = ("m[0]", "m0", "m*", "m")
        odd = dataclasses.replace(table, names=names)
        for name in names:
            plan = lq.allocate(odd, bits_per_weight=8.5, fixed={name: NF2})
            assert [other for other, fmt in plan.formats.items() if fmt == NF2] == [name]

    def test_of_several_fixed_formats_one_is_taken(self, table):
        plan = lq.allocate(table, bits_per_weight=8.5, fixed={"*": [NF2, NF4]})
        assert set(plan.formats.values()) == {NF4}

    def test_patterns_that_overlap_hold_together(self, table):
        plan = lq.allocate(table, bits_per_weight=8.5, fixed={"layers.0.*": [NF2, NF4], "*.q": [NF8, NF2]})
        assert list(plan.formats.values()) == [NF2, NF4, NF8, NF8]

    def test_several_formats_are_forbidden(self, table):
        plan = lq.allocate(table, bits_per_weight=8.5, forbidden={"*.up": [NF8, NF4], "*.q": NF8})
        assert list(plan.formats.values()) == [NF4, FORMATS[2], NF4, FORMATS[2]]

    def test_a_configuration_fixes_the_rank_too(self):
        configurations = [lq.Configuration(fmt, rank) for fmt in (NF2, NF4) for rank in (0, 4)]
        table = make_table([(16, 16)], configurations, [[4.0, 3.0, 2.0, 1.0]])
        for chosen in configurations:
            plan = lq.allocate(table, bits_per_weight=99, fixed={"m0": chosen})
            assert (plan.formats["m0"], plan.ranks["m0"]) == (chosen.format, chosen.rank)
        plan = lq.allocate(table, bits_per_weight=99, forbidden={"m0": lq.Configuration(NF4, 4)})
        assert (plan.formats["m0"], plan.ranks["m0"]) == (NF4, 0)
        assert lq.allocate(table, bits_per_weight=99, fixed={"m0": NF2}).ranks == {"m0": 4}

    @pytest.mark.parametrize("bits", [4, 4.5, np.float32(4.5), 8])
    def test_minimum_bits_are_those_that_are_stored(self, table, bits):
        up = min(fmt.storage_bits((40, 16)) for fmt in FORMATS if fmt.storage_bits((40, 16)) >= bits * 40 * 16)
        smallest = 2 * (up + NF2.storage_bits((16, 24)))
        plan = lq.allocate(table, total_bytes=smallest // 8, minimum_bits={"*.up": bits})
        assert plan.storage_bits == smallest
        with pytest.raises(InfeasibleBudgetError):
            lq.allocate(table, total_bytes=smallest // 8 - 1, minimum_bits={"*.up": bits})

    @pytest.mark.parametrize(
        "options",
        [
            {"fixed": {"*.k": NF2}},
            {"forbidden": {re.compile("layers"): [NF2]}},
            {"minimum_bits": {str.isspace: 3}},
            {"ties": ["*.k"]},
            {"ties": [["*.q", "*.k"]]},
        ],
        ids=["fixed", "forbidden", "minimum bits", "tie", "member of a tie"],
    )
    def test_a_pattern_that_matches_nothing_is_refused(self, table, options):
        with pytest.raises(InvalidArgumentError, match=rf"^{next(iter(options))} .* 4 \(layers\.0\.q, "):
            lq.allocate(table, bits_per_weight=5.0, **options)

    @pytest.mark.parametrize("bits", [float("nan"), float("inf"), "four", None, 9])
    def test_minimum_bits_that_nothing_has_are_refused(self, table, bits):
        with pytest.raises(InvalidArgumentError, match=r"minimum_bits .*(finite|'layers\.0\.q')"):
            lq.allocate(table, bits_per_weight=5.0, minimum_bits={"*": bits})

    def test_tied_matrices_that_have_nothing_in_common_are_named(self, table):
        with pytest.raises(InvalidArgumentError, match=r"^ties .* 'layers\.0\.q', 'layers\.1\.q'"):
            lq.allocate(table, bits_per_weight=5.0, fixed={"*.0.q": NF2, "*.1.q": NF4}, ties=["*.q"])
