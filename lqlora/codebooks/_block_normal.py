"""Normal weights divided by the largest of their block."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

    Reals: TypeAlias = npt.NDArray[np.floating[Any]]
    Density: TypeAlias = Callable[[Reals], Reals]

_NODES = 200

#: Probability of the block maxima that the integration leaves out on either side.
_TAIL = 1e-18


def block_normal_density(block_size: int, power: int) -> Density:
    """Density of normalized weights between 0 and 1, each counted ``maximum**power`` times, up to a factor.

    Given that the largest magnitude of a block is ``m``, each other weight is normal and cut off at ``m`` on either
    side, so the density is the integral over ``m`` of ``phi(m x) m / P(|w| < m)`` times the density of ``m``. The
    largest weight itself is a point mass at 1, which is a level and adds no error.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    smallest = -NormalDist().inv_cdf(-math.expm1(math.log(_TAIL) / block_size) / 2)
    largest = -NormalDist().inv_cdf(_TAIL / 2 / block_size)
    maxima = smallest + (largest - smallest) * (nodes + 1) / 2
    outside = np.array([math.erfc(m / math.sqrt(2)) for m in maxima])
    mixture = weights * np.exp((block_size - 2) * np.log1p(-outside) - maxima**2 / 2) * maxima ** (power + 1)
    return functools.partial(_mixed, maxima, mixture / mixture.sum())


def _mixed(maxima: Reals, mixture: Reals, x: Reals) -> Reals:
    values: Reals = np.exp(-((x[..., None] * maxima) ** 2) / 2) @ mixture
    return values
