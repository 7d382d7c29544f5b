"""The data behind the pictures."""

from __future__ import annotations

import numpy as np

from lqlora._plots import by_layer


def test_kinds_of_one_last_word_do_not_share_a_row():
    kinds, layers, grid = by_layer({"encoder.layers.0.q": 2.0, "decoder.layers.0.q": 4.0})
    assert kinds == ["encoder.layers.*.q", "decoder.layers.*.q"]
    assert layers == [0]
    np.testing.assert_array_equal(grid, [[2.0], [4.0]])


def test_a_matrix_that_is_not_there_is_nan():
    kinds, layers, grid = by_layer({"layers.0.q": 2.0, "layers.2.k": 4.0})
    assert (kinds, layers) == (["q", "k"], [0, 2])
    np.testing.assert_array_equal(grid, [[2.0, np.nan], [np.nan, 4.0]])
