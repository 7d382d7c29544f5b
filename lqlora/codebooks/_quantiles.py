"""The rule that NormalFloat and Student float share: quantiles of a distribution, divided by the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

#: Probability of the outermost quantile: ``1 - (1/32 + 1/30) / 2`` to the digits published.
_OUTERMOST = 0.9677083


def quantile_levels(bits: int, quantile: Callable[[float], float]) -> list[float]:
    """Quantiles at ``2**(bits - 1)`` probabilities below one half and one more above it, which share the zero."""
    half = 2 ** (bits - 1)
    below = [float(quantile(p)) for p in np.linspace(1 - _OUTERMOST, 0.5, half)[:-1]]
    above = [float(quantile(p)) for p in np.linspace(0.5, _OUTERMOST, half + 1)[1:]]
    largest = max(above[-1], -below[0])
    return [x / largest for x in [*below, 0.0, *above]]
