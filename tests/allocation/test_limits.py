"""Upper and lower limits on the size of some matrices."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lqlora as lq
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError
from tests.allocation.tables import Everything, tables
from tests.costs.cases import FORMATS, NF2, NF4, NF8, make_table


@st.composite
def _limits(draw, table, everything):
    """Draw a limit on some matrices, with their rows, that is about as often infeasible as not binding."""
    rows = sorted(draw(st.sets(st.integers(0, len(table.names) - 1), min_size=1)))
    size = draw(st.integers(int(everything.bits(rows).min()) - 8, int(everything.bits(rows).max()) + 8))
    at_least = draw(st.booleans())
    names = [table.names[row] for row in rows]
    if draw(st.booleans()):
        return rows, lq.Limit(names, total_bytes=max(0, size // 8), at_least=at_least)
    count = sum(math.prod(table.shapes[row]) for row in rows)
    return rows, lq.Limit(names, bits_per_weight=Fraction(max(0, size), count), at_least=at_least)


def _apply(everything, table, limits):
    """Remove the assignments that violate a limit."""
    for rows, limit in limits:
        count = sum(math.prod(table.shapes[row]) for row in rows)
        bits = 8 * limit.total_bytes if limit.total_bytes is not None else limit.bits_per_weight * count
        used = everything.bits(rows)
        everything.keep(used >= bits if limit.at_least else used <= bits)
    return everything


def _check_infeasible(error):
    assert "infeasible" in str(error)
    assert error.minimum <= error.maximum
    assert not error.minimum <= error.asked <= error.maximum or "together with" in str(error)


class TestAnyLimits:
    @given(table=tables(formats=FORMATS[1:5]), data=st.data())
    def test_a_plan_is_the_best_within_all_of_them(self, table, data):
        everything = Everything(table)
        limits = data.draw(st.lists(_limits(table, everything), min_size=1, max_size=3))
        budget = data.draw(st.integers(int(everything.bits().min()), int(everything.bits().max())))
        _apply(everything, table, limits).keep(everything.bits() <= budget)
        options = {
            "bits_per_weight": Fraction(budget, table.weight_count),
            "limits": [limit for _, limit in limits],
        }
        if not everything.valid.any():
            with pytest.raises(InfeasibleBudgetError) as caught:
                lq.allocate(table, **options)
            _check_infeasible(caught.value)
            return
        plan = lq.allocate(table, **options)
        chosen = [table.configurations.index(lq.Configuration(plan.formats[n], plan.ranks[n])) for n in table.names]
        assert everything.valid[(everything.columns == chosen).all(axis=1)].all()
        np.testing.assert_allclose(plan.objective, everything.least_cost, rtol=1e-6, atol=1e-300)

    @given(table=tables(formats=FORMATS[1:5]), data=st.data())
    def test_the_fewest_bits_for_an_error_respect_them(self, table, data):
        everything = Everything(table)
        limits = data.draw(st.lists(_limits(table, everything), min_size=1, max_size=2))
        cost = data.draw(st.sampled_from(sorted(set(everything.costs.tolist()))))
        _apply(everything, table, limits).keep(everything.costs <= cost)
        options = {"max_error": cost, "limits": [limit for _, limit in limits]}
        if not everything.valid.any():
            with pytest.raises(InfeasibleBudgetError):
                lq.allocate(table, **options)
            return
        plan = lq.allocate(table, **options)
        assert plan.error <= cost
        assert plan.counted_bits == everything.fewest_bits

    @given(table=tables(formats=FORMATS[1:5], max_rows=3), data=st.data())
    def test_ties_and_what_is_fixed_or_forbidden_hold_beside_them(self, table, data):
        everything = Everything(table)
        n, k = table.costs.shape
        tie = sorted(data.draw(st.sets(st.integers(0, n - 1))))
        row, column = data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, k - 1)))
        other, banned = data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, k - 1)))
        floor = data.draw(st.sampled_from([0, 3, 4]))
        columns = everything.columns
        everything.keep((columns[:, tie] == columns[:, tie[:1]]).all(axis=1))
        everything.keep((columns[:, row] == column) & (columns[:, other] != banned))
        everything.keep(everything.bits([n - 1]) >= floor * math.prod(table.shapes[n - 1]))
        options = {
            "ties": [[table.names[i] for i in tie]],
            "fixed": {table.names[row]: table.configurations[column].format},
            "forbidden": {table.names[other]: table.configurations[banned].format},
            "minimum_bits": {table.names[n - 1]: floor},
        }
        if not everything.valid.any():
            with pytest.raises(InvalidArgumentError, match=r"^fixed, |^ties "):
                lq.allocate(table, bits_per_weight=100, **options)
            return
        limits = [data.draw(_limits(table, everything))]
        _apply(everything, table, limits)
        options["limits"] = [limits[0][1]]
        if not everything.valid.any():
            with pytest.raises(InfeasibleBudgetError):
                lq.allocate(table, **options)
            return
        plan = lq.allocate(table, **options)
        np.testing.assert_allclose(plan.objective, everything.least_cost, rtol=1e-6, atol=1e-300)


class TestErrors:
    def test_a_limit_that_nothing_can_meet_is_named_with_its_own_range(self, table):
        with pytest.raises(InfeasibleBudgetError, match=r"at most 2 for 'layers\.0\.\*'") as caught:
            lq.allocate(table, bits_per_weight=5, limits=[lq.Limit("layers.0.*", bits_per_weight=2)])
        assert (caught.value.asked, caught.value.minimum, caught.value.maximum) == (2, 3, 8.5)

    def test_a_least_size_that_nothing_reaches_asks_for_larger_formats(self, table):
        with pytest.raises(InfeasibleBudgetError, match=r"at least 9 .*Lower it") as caught:
            lq.allocate(table, bits_per_weight=5, limits=[lq.Limit(bits_per_weight=9, at_least=True)])
        assert caught.value.maximum == Fraction(17, 2)

    def test_limits_that_only_contradict_each_other_are_named_together(self, table):
        limits = [lq.Limit("layers.0.*", bits_per_weight=6, at_least=True)]
        with pytest.raises(InfeasibleBudgetError, match=r"at most 4 .* at least 6 bits") as caught:
            lq.allocate(table, bits_per_weight=4, limits=limits)
        least = caught.value.minimum
        assert least > 4
        assert lq.allocate(table, bits_per_weight=least, limits=limits).bits_per_weight == least
        with pytest.raises(InfeasibleBudgetError):
            lq.allocate(table, bits_per_weight=least - Fraction(1, table.weight_count), limits=limits)

    @pytest.mark.parametrize("place", range(9))
    def test_of_many_limits_the_first_that_those_before_it_rule_out_is_named(self, table, place):
        limits = [lq.Limit(f"layers.{i % 2}.*", bits_per_weight=8 - i / 2) for i in range(8)]  # down to 4.5
        limits.insert(place, lq.Limit("layers.1.*", bits_per_weight=6, at_least=True))
        culprit = "at least 6" if place > 5 else "at most 5.5"  # that of layer 1 which is the first below 6
        with pytest.raises(InfeasibleBudgetError, match=f"^bits_per_weight of {culprit} ") as caught:
            lq.allocate(table, bits_per_weight=8.5, limits=limits)
        assert f"; and {max(6, place) - 5} more: " in str(caught.value)

    def test_a_limit_in_bytes_is_answered_in_bytes(self, table):
        with pytest.raises(InfeasibleBudgetError, match=r"^total_bytes .*384 to 1088 bytes"):
            lq.allocate(table, limits=[lq.Limit("layers.1.*", total_bytes=300)])

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"bits_per_weight": 3, "total_bytes": 3},
            {"bits_per_weight": -1},
            {"bits_per_weight": math.nan},
            {"bits_per_weight": math.inf},
            {"bits_per_weight": "three"},
            {"total_bytes": 1.5},
            {"total_bytes": -8},
        ],
        ids=str,
    )
    def test_what_is_no_limit_is_refused(self, options):
        with pytest.raises(InvalidArgumentError, match=r"^(bits_per_weight|total_bytes)\b"):
            lq.Limit("*", **options)

    @pytest.mark.parametrize(
        "limit",
        [
            lq.Limit("nowhere.*", bits_per_weight=3),
            lq.Limit(["layers.0.*", "nowhere"], bits_per_weight=3),
            lq.Limit(exclude="nowhere", bits_per_weight=3),
            lq.Limit(exclude="*", bits_per_weight=3),
        ],
        ids=str,
    )
    def test_a_limit_for_no_matrix_is_refused(self, table, limit):
        with pytest.raises(InvalidArgumentError, match=r"^Limit\.(in|ex)clude |^exclude .*'nowhere'"):
            lq.allocate(table, bits_per_weight=5, limits=[limit])


def test_limits_alone_are_enough(table):
    limits = [lq.Limit(f"layers.{layer}.*", total_bytes=600) for layer in (0, 1)]
    plan = lq.allocate(table, limits=limits)
    for layer in (0, 1):
        own = [name for name in plan.formats if name.startswith(f"layers.{layer}.")]
        assert sum(plan.formats[name].storage_bits(plan.shapes[name]) for name in own) <= 4800
    assert plan.objective == sum(  # without a common budget the layers are problems of their own
        lq.allocate(table, bits_per_weight=9, limits=[limit]).costs[name]
        for layer, limit in enumerate(limits)
        for name in plan.formats
        if name.startswith(f"layers.{layer}.")
    )


def test_the_matrices_of_a_limit_are_found_by_any_kind_of_pattern(table):
    patterns = ["layers.1.*", re.compile(r"layers\.1\..*"), lambda name: ".1." in name, ["layers.1.q", "layers.1.up"]]
    plans = [lq.allocate(table, limits=[lq.Limit(own, bits_per_weight=4)]) for own in patterns]
    plans.append(lq.allocate(table, limits=[lq.Limit(exclude="layers.0.*", bits_per_weight=4)]))
    assert all(plan.formats == plans[0].formats for plan in plans)
    assert plans[0].formats["layers.0.q"] == NF8


def test_factors_count_in_limits_as_they_do_in_the_budget():
    table = make_table([(8, 8)], [lq.Configuration(fmt, 2) for fmt in (NF2, NF4)], [[2.0, 1.0]])
    small, factors = int(table.sizes[0, 0]), int(table.factor_sizes[0, 0])
    limits = [lq.Limit(total_bytes=(small + factors) // 8)]
    assert lq.allocate(table, limits=limits).formats["m0"] == NF4
    assert lq.allocate(table, limits=limits, count_factors=True).formats["m0"] == NF2
