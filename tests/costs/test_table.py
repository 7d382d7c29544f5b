"""Checks of the values of a cost table, wherever the table comes from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import lqlora as lq
from lqlora.errors import InvalidArgumentError


def changed(table, what, value):
    values = getattr(table, what).copy()
    values[1, 2] = value
    return {what: values}


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("costs", np.nan, r"^costs .* nan for 'layers\.0\.up'"),
        ("costs", -1e-300, r"^costs .* -1e-300 "),
        ("sizes", -8, "^sizes .* -8 "),
        ("factor_sizes", -1, "^factor_sizes .* -1 "),
    ],
)
def test_numbers_that_can_be_no_error_and_no_size_are_refused_by_name(table, what, value, message):
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(table, **changed(table, what, value))


def test_an_infinite_cost_forbids_a_configuration_and_is_written(table):
    forbidding = dataclasses.replace(table, **changed(table, "costs", np.inf))
    name, configuration = table.names[1], table.configurations[2]
    plan = lq.allocate(forbidding, bits_per_weight=100)
    assert (plan.formats[name], plan.ranks[name]) != (configuration.format, configuration.rank)
    again = lq.CostTable.from_json(forbidding.to_json())
    assert again.costs.tobytes() == forbidding.costs.tobytes()


def test_a_matrix_or_a_configuration_that_occurs_twice_is_refused(table):
    with pytest.raises(InvalidArgumentError, match=f"^names .*'{table.names[0]}'"):
        dataclasses.replace(table, names=(table.names[0], *table.names[:-1]))
    with pytest.raises(InvalidArgumentError, match=r"^configurations .*nf2/16"):
        dataclasses.replace(table, configurations=(table.configurations[0], *table.configurations[:-1]))


@pytest.mark.parametrize("word", ["NaN", "-1.0", "-Infinity"])
def test_documents_with_such_numbers_are_refused(table, word):
    document = json.loads(table.to_json())
    document["matrices"][0]["costs"][0] = "?"
    with pytest.raises(InvalidArgumentError, match=r"^text .*costs"):
        lq.CostTable.from_json(json.dumps(document).replace('"?"', word))
