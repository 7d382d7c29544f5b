"""Points of a Pareto frontier."""

from __future__ import annotations

import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError
from lqlora.reports import ParetoPoint, pareto_points


def test_they_are_sorted_by_size(table):
    plans = [lq.allocate(table, bits_per_weight=bits) for bits in (5, 3.1, 4)]
    expected = sorted(ParetoPoint(float(plan.bits_per_weight), plan.error) for plan in plans)
    assert pareto_points(plans) == expected


def test_no_plans_have_no_points():
    assert pareto_points([]) == []


def test_plans_that_count_other_parts_are_not_compared(table):
    plans = [lq.allocate(table, bits_per_weight=8, count_factors=count) for count in (False, True)]
    with pytest.raises(InvalidArgumentError, match=r"plans .*counts_factors"):
        pareto_points(plans)


def test_plans_of_other_matrices_are_not_compared(plan, mixture):
    with pytest.raises(InvalidArgumentError, match=r"plans .*matrices"):
        pareto_points([plan, mixture])
