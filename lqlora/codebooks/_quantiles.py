"""Levels at quantiles of a symmetric distribution, the construction of NormalFloat and Student float."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

#: Probability of the outermost quantile, with the digits that the code of QLoRA has. It is ``1 - (1/32 + 1/30) / 2``:
#: half an interval is left out at each end, 1/32 for 16 levels and 1/30 for 15, and the two are averaged.
_OUTERMOST = 0.9677083


def quantile_levels(bits: int, quantile: Callable[[float], float]) -> list[float]:
    """Return ``2**bits`` sorted levels: quantiles at equally spaced probabilities, divided by the largest magnitude.

    There are ``2**(bits - 1)`` probabilities from ``1 - _OUTERMOST`` to one half and one more from there to
    ``_OUTERMOST``. Both lists contain one half, whose quantile is zero and is kept once.
    """
    half = 2 ** (bits - 1)
    below = [float(quantile(p)) for p in np.linspace(1 - _OUTERMOST, 0.5, half)[:-1]]
    above = [float(quantile(p)) for p in np.linspace(0.5, _OUTERMOST, half + 1)[1:]]
    largest = max(above[-1], -below[0])  # equal in exact arithmetic: rounding must not push an end beyond 1
    return [x / largest for x in [*below, 0.0, *above]]
