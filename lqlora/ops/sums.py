"""Sums with the same bytes on every library: the order of the additions is fixed, or the additions are exact.

Exact sums round each term to a multiple ``k * u`` of one power of two. The integers ``k`` are added in float64, where every
sum below ``2**53`` is exact, so that any order, and any split over threads, gives the same result. If ``n`` terms are at
most ``m < 2**e``, their sum in units of ``u`` is at most ``n * 2**e / u``. :func:`unit_of` chooses ``u`` so that this is at
most ``2**52``. Rounding moves each term by at most ``u / 2``, which is the only error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import FLOATS, device_of, namespace, op
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._dispatch.examples import BlocksProblem
    from lqlora._typing import Array

__all__ = ["bin_sums", "level_sums", "row_sums"]

#: Bits of the largest sum of integers. Float64 has 53, so that every partial sum is exact.
_EXACT_BITS = 52


@op(examples=lambda problem: (problem.rows(problem.wide),))
def row_sums(rows: Array) -> Array:
    """Return the sum of each row, added by halving it repeatedly. The order is part of the definition.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, n)
        Terms.

    Returns
    -------
    array of the same dtype, shape (m,)
        Sums. Each pass adds the second half of a row to the first half, and keeps an odd last term. The error grows with
        the logarithm of ``n``, and sums of equal terms have the same bytes on every library.

    Examples
    --------
    >>> import numpy as np
    >>> row_sums(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
    [6.0, 15.0]
    """
    xp = namespace(rows, dtypes=FLOATS)
    if rows.shape[1] == 0:
        return xp.zeros((rows.shape[0],), dtype=rows.dtype, device=device_of(rows))
    # Each term takes part in at most ceil(log2(n)) additions, so the error is at most about log2(n) * eps * sum |x|,
    # instead of n * eps * sum |x| for a loop over the terms. A library's own sum is not used: it may add in any order,
    # while slices are added entry by entry everywhere.
    while rows.shape[1] > 1:
        half, odd = divmod(rows.shape[1], 2)
        halves = rows[:, :half] + rows[:, half : 2 * half]
        rows = xp.concat([halves, rows[:, 2 * half :]], axis=1) if odd else halves
    return rows[:, 0]


@op(examples=lambda problem: (problem.wide.astype(np.float64), problem.codes.astype(np.int64) % 16, 16))
def bin_sums(terms: Array, bins: Array, count: int) -> Array:
    """Return the sum of the terms of each bin, by exact additions.

    Parameters
    ----------
    terms : array of float64, shape (n,)
        Finite terms. They are rounded to multiples of a power of two, so that their sum has at most 52 bits.
    bins : array of int64, shape (n,)
        Bin of each term, from 0 to ``count - 1``. Terms of other bins are left out, on every backend.
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
    # A masked sum adds zeros for the terms of other bins, which leaves sums of integers unchanged. Scatter-add would
    # take one pass instead of `count`, but it is missing in the array API standard and unordered on devices.
    zeros = xp.zeros_like(rounded)
    sums = [xp.sum(xp.where(bins == index, rounded, zeros)) for index in range(count)]
    return xp.stack(sums) * unit


def _fitting(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return example arguments: rows with ratios and codes, to fit two sets of levels to them."""
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
    """Return the sums whose quotients are the least-squares levels for given codes and ratios.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Rows ``x``. The entry ``x[i, j]`` is approximated by ``ratios[i]`` times the level of ``codes[i, j]``.
    weights : array of float32, shape (m, k), optional
        Importance of each entry, a factor of its squared error.
    importance : array of float64, shape (m,)
        Factor of the squared errors of each row.
    ratios : array of float32, shape (m,)
        Ratios.
    codes : array of uint8, shape (m, k)
        Codes below ``size``.
    sets : array of int64, shape (m,)
        Index of the set of levels of each row, from 0 to ``count - 1``.
    size : int
        Number of levels in a set.
    count : int
        Number of sets.

    Returns
    -------
    tuple of array of float64, shape (count * size,)
        Sums for each level, over its entries, of ``importance * ratio * weight * entry`` and of
        ``importance * ratio**2 * weight``, as exact as those of :func:`bin_sums`.

    Raises
    ------
    InvalidArgumentError
        If the shapes do not fit.

    Notes
    -----
    The error ``sum importance * weight * (entry - ratio * level)**2`` over the entries with one code is quadratic in the
    level. Its derivative is zero where the level is the first sum divided by the second.

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
        raise InvalidArgumentError(
            f"rows of shape {tuple(rows.shape)} need codes of that shape, and importance, ratios and sets of shape "
            f"{tuple(rows.shape[:1])}; got {[tuple(a.shape) for a in (codes, importance, ratios, sets)]}."
        )
    wide = xp.astype(ratios, xp.float64)
    # The order of the factors is part of the definition. IEEE 754 rounds each product in one way only, so that the
    # terms have the same bits everywhere if the products are formed in the same order. A compiler must not fuse them.
    scales = importance * wide
    # Set s and code c share the bin s * size + c.
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
    """Return the terms as integers in units of a power of two, whose sums are exact in float64, and the unit."""
    xp = namespace(terms)
    largest = float(xp.max(xp.abs(terms))) if terms.shape[0] else 0.0
    if largest == 0.0:
        return xp.zeros_like(terms), 1.0
    unit = unit_of(largest, terms.shape[0])
    # Dividing by a power of two only changes the exponent, so that rounding to an integer is the only rounding here.
    # The integers are at most 2**(52 - c) with n <= 2**c, hence every partial sum is at most 2**52, in any order.
    return xp.round(terms / unit), unit


def unit_of(largest: float, count: int) -> float:
    """Return the power of two that terms are rounded to multiples of, so that their sum is exact in float64.

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
    # largest < 2**e and count <= 2**c, so that the sum is below 2**(e + c), which is 2**52 units.
    exponent = math.frexp(largest)[1] + (count - 1).bit_length() - _EXACT_BITS
    # The smallest positive float64 is 2**-1074, so a smaller unit would become zero. At 2**-1000 tiny terms lose
    # digits, but their sum stays exact in units.
    return math.ldexp(1.0, max(exponent, -1000))
