"""Sums that are the same bytes on every library: the order of the additions is fixed, or does not matter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import device_of, namespace, op
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._dispatch.examples import BlocksProblem
    from lqlora._typing import Array

__all__ = ["bin_sums", "level_sums", "row_sums"]

#: Integers up to this many bits are exact in float64, and so is any sum of them that stays below.
_EXACT_BITS = 52


@op(examples=lambda problem: (problem.rows(problem.wide),))
def row_sums(rows: Array) -> Array:
    """Sum each row, halving it again and again: the order of the additions is part of the definition.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, n)
        Terms.

    Returns
    -------
    array of the same dtype, shape (m,)
        Sums. Libraries add in orders of their own, which differ by rounding; this order they share.

    Examples
    --------
    >>> import numpy as np
    >>> row_sums(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
    [6.0, 15.0]
    """
    xp = namespace(rows)
    if rows.shape[1] == 0:
        return xp.zeros((rows.shape[0],), dtype=rows.dtype, device=device_of(rows))
    while rows.shape[1] > 1:
        half, odd = divmod(rows.shape[1], 2)
        halves = rows[:, :half] + rows[:, half : 2 * half]
        rows = xp.concat([halves, rows[:, 2 * half :]], axis=1) if odd else halves
    return rows[:, 0]


@op(examples=lambda problem: (problem.wide.astype(np.float64), problem.codes.astype(np.int64) % 16, 16))
def bin_sums(terms: Array, bins: Array, count: int) -> Array:
    """Sum the terms of each bin, exactly in an order that does not matter.

    Parameters
    ----------
    terms : array of float64, shape (n,)
        Finite terms; they are rounded to multiples of one power of two, such that their sum has at most 52 bits.
    bins : array of int64, shape (n,)
        Bin of each term, from 0 to ``count - 1``.
    count : int
        Number of bins.

    Returns
    -------
    array of float64, shape (count,)
        Sums, with an error of at most ``n**2 * 2**-51`` times the largest term.

    Examples
    --------
    >>> import numpy as np
    >>> bin_sums(np.array([0.5, 2.0, 1.0]), np.array([1, 0, 1]), 3).tolist()
    [2.0, 1.5, 0.0]
    """
    xp = namespace(terms, bins)
    rounded, unit = exact_terms(terms)
    zeros = xp.zeros_like(rounded)
    sums = [xp.sum(xp.where(bins == index, rounded, zeros)) for index in range(count)]
    return xp.stack(sums) * unit


def _fitting(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return rows with ratios, codes and two sets of levels to fit to them."""
    rows = np.nan_to_num(problem.rows(problem.wide.astype(np.float32)), posinf=1, neginf=-1)
    rng, size = np.random.default_rng(problem.seed + 4), len(problem.codebook)
    ratios, importance = rng.uniform(0.5, 1.5, (2, rows.shape[0]))
    sets = rng.integers(0, 2, rows.shape[0])
    weights = rng.random(rows.shape).astype(np.float32) if problem.seed % 2 else None
    return rows, weights, importance, ratios.astype(np.float32), problem.rows(problem.codes), sets, size, 2


@op(examples=_fitting)
def level_sums(
    rows: Array,
    weights: Array | None,
    importance: Array,
    ratios: Array,
    codes: Array,
    sets: Array,
    size: int,
    count: int,
) -> tuple[Array, Array]:
    """Sum what the best levels for given codes and ratios are quotients of.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Rows, each to be approximated by its ratio times the levels of its codes.
    weights : array of float32, shape (m, k), optional
        Weights of the squared errors.
    importance : array of float64, shape (m,)
        Weight of a row.
    ratios : array of float32, shape (m,)
        Ratios.
    codes : array of uint8, shape (m, k)
        Codes below ``size``.
    sets : array of int64, shape (m,)
        Which levels a row takes, from 0 to ``count - 1``.
    size : int
        Levels of a set.
    count : int
        Number of sets.

    Returns
    -------
    tuple of array of float64, shape (count * size,)
        Sums, as exact as those of :func:`bin_sums`, of ``importance * ratio * weight * entry`` and of
        ``importance * ratio**2 * weight``: their quotients are the levels of least error.

    Raises
    ------
    InvalidArgumentError
        If the shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> rows, one = np.array([[1.0, 3.0, 8.0]], dtype=np.float32), np.ones(1, dtype=np.float32)
    >>> codes, sets = np.array([[0, 0, 1]], dtype=np.uint8), np.zeros(1, dtype=np.int64)
    >>> [x.tolist() for x in level_sums(rows, None, np.ones(1), one, codes, sets, 2, 1)]
    [[4.0, 8.0], [2.0, 1.0]]
    """
    xp = namespace(rows, weights, importance, ratios, codes, sets)
    if tuple(codes.shape) != tuple(rows.shape) or any(
        tuple(a.shape) != rows.shape[:1] for a in (importance, ratios, sets)
    ):
        raise InvalidArgumentError(f"Rows of shape {tuple(rows.shape)} need as many codes, and a set and a ratio each.")
    wide = xp.astype(ratios, xp.float64)
    scales = importance * wide
    members = xp.reshape(xp.astype(codes, xp.int64) + sets[:, None] * size, (-1,))
    above = scales[:, None] * xp.astype(rows, xp.float64)
    below = (scales * wide)[:, None] * xp.ones_like(above)
    if weights is not None:
        own = xp.astype(weights, xp.float64)
        above, below = above * own, below * own
    return (
        bin_sums(xp.reshape(above, (-1,)), members, count * size),
        bin_sums(xp.reshape(below, (-1,)), members, count * size),
    )


def exact_terms(terms: Array) -> tuple[Array, float]:
    """Round terms to integers whose sums are exact in float64; return them and the unit to multiply by."""
    xp = namespace(terms)
    largest = float(xp.max(xp.abs(terms))) if terms.shape[0] else 0.0
    if largest == 0.0:
        return xp.zeros_like(terms), 1.0
    unit = unit_of(largest, terms.shape[0])
    return xp.round(terms / unit), unit


def unit_of(largest: float, count: int) -> float:
    """Return the power of two whose multiples terms are rounded to: the sum of so many stays exact.

    Parameters
    ----------
    largest : float
        Largest magnitude of the terms, above zero.
    count : int
        Number of terms.

    Returns
    -------
    float
        The unit.

    Examples
    --------
    >>> unit_of(1.0, 2) == 2.0**-50
    True
    """
    exponent = math.frexp(largest)[1] + (count - 1).bit_length() - _EXACT_BITS
    return math.ldexp(1.0, max(exponent, -1000))
