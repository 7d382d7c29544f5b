"""The data behind the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from lqlora.reports.pictures import by_layer, kind_and_layer


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
