"""Oracle of GPTQ with given scales, as in the paper: one column at a time, in float64, by the inverse Hessian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.oracles.quantize import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence


def codes(
    w: np.ndarray,
    gram: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    tables: Sequence[Sequence[np.ndarray]],
    *,
    damping: float,
    order: Sequence[int],
) -> np.ndarray:
    """Return the codes; scale, zero point and levels are given for each weight."""
    damped = gram[np.ix_(order, order)] + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, found = w[:, order].copy(), np.zeros(w.shape, dtype=np.uint8)
    for step, column in enumerate(order):
        for row, value in enumerate(left[:, step]):
            scale, zero, table = scales[row, column], zeros[row, column], tables[row][column]
            found[row, column] = code = nearest(float(value / scale + zero), table)
            error = (value - (table[code] - zero) * scale) / factor[step, step]
            left[row, step + 1 :] -= error * factor[step, step + 1 :]
    return found
