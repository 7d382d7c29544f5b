"""Matrices grouped by kind and layer."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from lqlora.reports import bits_by_layer, by_kind, error_by_layer, ranks_by_layer
from lqlora.reports.grouping import by_layer, kind_and_layer
from tests.reports.cases import EXPERTS


def test_kinds_of_one_last_word_do_not_share_a_row():
    kinds, layers, grid = by_layer({"encoder.layers.0.q": 2.0, "decoder.layers.0.q": 4.0})
    assert kinds == ["encoder.layers.*.q", "decoder.layers.*.q"]
    assert layers == [0]
    np.testing.assert_array_equal(grid, [[2.0], [4.0]])


def test_a_matrix_that_is_not_there_is_nan():
    kinds, layers, grid = by_layer({"layers.0.q": 2.0, "layers.2.k": 4.0})
    assert (kinds, layers) == (["q", "k"], [0, 2])
    np.testing.assert_array_equal(grid, [[2.0, np.nan], [np.nan, 4.0]])


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.12.self_attn.q_proj", "model.layers.*.self_attn.q_proj", 12),
        ("gpt2.h.3.c_attn", "gpt2.h.*.c_attn", 3),
        ("layers.3.experts.17.w1", "layers.*.experts.*.w1", 3),
        ("7", "*", 7),
        ("layer_3/kernel", "layer_*/kernel", 3),
        ("classifier", "classifier", 0),
        ("layers.x²", "layers.x²", 0),
        ("", "", 0),
    ],
)
def test_the_layer_is_the_first_part_that_is_a_number(name, kind, layer):
    assert kind_and_layer(name) == (kind, layer)


def test_values_of_one_kind_and_layer_are_added():
    _, _, grid = by_layer({"layers.0.experts.0.up": 2.0, "layers.0.experts.1.up": 3.0, "layers.1.experts.0.up": 1.0})
    np.testing.assert_array_equal(grid, [[5.0, 1.0]])


def test_no_matrices_are_an_empty_grid():
    kinds, layers, grid = by_layer({})
    assert (kinds, layers, grid.shape) == ([], [], (0, 0))


class TestKinds:
    def test_experts_and_layers_are_one_kind(self, mixture):
        assert [(kind.name, kind.matrices) for kind in by_kind(mixture)] == [("h.*.experts.*.up", 6), ("h.*.q", 2)]

    def test_sums_over_kinds_are_those_of_the_plan(self, mixture):
        kinds = by_kind(mixture)
        assert sum(kind.weights for kind in kinds) == mixture.weight_count
        assert sum(kind.storage_bits for kind in kinds) == mixture.storage_bits
        assert sum(kind.factor_bits for kind in kinds) == sum(mixture.factor_bits.values())
        assert sum(kind.error_share for kind in kinds) == pytest.approx(1)

    def test_extremes_are_those_of_the_members(self, mixture):
        kind = by_kind(mixture)[0]
        bits = [Fraction(mixture.formats[n].storage_bits((32, 64)), 32 * 64) for n in EXPERTS[:6]]
        ranks = [mixture.ranks[n] for n in EXPERTS[:6]]
        assert (kind.lowest, kind.highest) == (min(bits), max(bits))
        assert kind.bits_per_weight == sum(bits) / 6
        assert kind.ranks == (min(ranks), max(ranks))

    def test_a_plan_without_error_has_no_shares(self, plan):
        perfect = dataclasses.replace(
            plan, matrices={name: dataclasses.replace(own, cost=0.0) for name, own in plan.matrices.items()}
        )
        assert {kind.error_share for kind in by_kind(perfect)} == {0.0}
        assert set(perfect.error_by_matrix().values()) == {0.0}


def test_experts_of_a_layer_share_a_cell(mixture):
    grid = bits_by_layer(mixture)
    assert (grid.kinds, grid.layers) == (["up", "q"], [0, 1])
    first = [mixture.bits_by_matrix()[name] for name in EXPERTS[:3]]
    np.testing.assert_allclose(grid.values[0, 0], np.mean(first))
    np.testing.assert_allclose(ranks_by_layer(mixture).values[0, 0], np.mean([mixture.ranks[n] for n in EXPERTS[:3]]))
    np.testing.assert_allclose(error_by_layer(mixture).values.sum(), 1)
