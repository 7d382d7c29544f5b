"""Density of normal weights after each block is divided by its absolute maximum."""

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

#: Probability of block maxima below, and of maxima above, the range of the integration.
_TAIL = 1e-18


def block_normal_density(block_size: int, power: int) -> Density:
    """Return the density of normalized weights on 0 to 1, up to a constant factor.

    The density is that of ``|w| / absmax`` for the weights of a block that are not its maximum. Each weight counts
    ``absmax**power`` times: ``power=2`` turns an error of the normalized weight into an error of the weight itself.
    """
    # Let M be the largest of B independent |w|, w normal, and P(m) = Pr(|w| < m) = 1 - erfc(m / sqrt(2)).
    # M has the density 2 B phi(m) P(m)**(B - 1). Given M = m, each other weight has the density phi(w) / P(m) on
    # |w| < m, so x = w / m has m phi(m x) / P(m). Integrating over m, with each m counted m**power times, gives
    #     p(x)  ~  integral of  phi(m x) phi(m) P(m)**(B - 2) m**(power + 1)  dm.
    # The maximum itself is a point mass at x = 1. It adds no error, because 1 is a level.
    #
    # Limits of integration: P(m)**B = _TAIL below; above, Pr(M > m) <= 2 B (1 - Phi(m)) = _TAIL (union bound).
    # expm1 and log1p keep the digits of 1 - P(m) when B is large and of P(m) when B is small.
    nodes, quadrature = _rule()
    smallest = -NormalDist().inv_cdf(-math.expm1(math.log(_TAIL) / block_size) / 2)
    largest = -NormalDist().inv_cdf(_TAIL / 2 / block_size)
    maxima = smallest + (largest - smallest) * (nodes + 1) / 2
    outside = np.array([math.erfc(m / math.sqrt(2)) for m in maxima])
    mixture = quadrature * np.exp((block_size - 2) * np.log1p(-outside) - maxima**2 / 2) * maxima ** (power + 1)
    return functools.partial(_mixed, maxima, mixture / mixture.sum())


def _mixed(maxima: Reals, mixture: Reals, x: Reals) -> Reals:
    """Return ``sum_m mixture[m] * exp(-(m * x)**2 / 2)``: the integral over the block maximum as a finite sum."""
    # In place: this is most of the time that a codebook takes, and larger arrays would not stay in the cache.
    terms = x[..., None] * maxima
    np.square(terms, out=terms)
    np.negative(terms, out=terms)
    np.divide(terms, 2, out=terms)
    np.exp(terms, out=terms)
    values: Reals = terms @ mixture
    return values


@functools.cache
def _rule() -> tuple[Reals, Reals]:
    """Return the nodes and weights of the Gauss-Legendre rule, whose computation takes longer than using it."""
    return np.polynomial.legendre.leggauss(_NODES)
