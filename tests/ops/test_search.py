from __future__ import annotations

import numpy as np

from lqlora import Codebook, ops
from tests.strategies import host, on


def test_subnormal_ratios_overflow_in_silence(xp):
    """An entry without importance is divided by the ratio too; the quotient is beyond float32, its level is not."""
    book = Codebook(np.array([-1, 1], np.float32))
    rows, weights = np.array([[1e-40, 4.0]], np.float32), np.array([[1.0, 1e-44]], np.float32)
    arguments = (on(xp, rows), on(xp, weights), book.levels, book.boundaries, None, (1.0,), 2)
    ratio = host(ops.best_ratios.reference(*arguments))
    assert 0 < ratio[0] <= 1


def test_a_quotient_beyond_float32_is_no_solution(xp):
    values, rows = np.array([[1e-22]], np.float32), np.array([[3e38]], np.float32)
    found = ops.least_squares(on(xp, rows), None, on(xp, values), on(xp, np.ones(1, np.float32)))
    assert host(found).tolist() == [1.0]
