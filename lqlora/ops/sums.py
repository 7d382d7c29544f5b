"""Sums that are the same bytes on every library: the order of the additions is fixed, or does not matter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import array_api_compat

from lqlora._dispatch import namespace, op

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["bin_sums", "row_sums"]

#: Integers up to this many bits are exact in float64, and so is any sum of them that stays below.
_EXACT_BITS = 52


@op
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
        return xp.zeros((rows.shape[0],), dtype=rows.dtype, device=array_api_compat.device(rows))
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        odd = rows[:, 2 * half :]
        rows = rows[:, :half] + rows[:, half : 2 * half]
        rows = xp.concat([rows, odd], axis=1) if odd.shape[1] else rows
    return rows[:, 0]


@op
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


def exact_terms(terms: Array) -> tuple[Array, float]:
    """Round terms to integers whose sums are exact in float64; return them and the unit to multiply by."""
    xp = namespace(terms)
    largest = float(xp.max(xp.abs(terms))) if terms.shape[0] else 0.0
    if largest == 0.0:
        return xp.zeros_like(terms), 1.0
    exponent = math.frexp(largest)[1] + (terms.shape[0] - 1).bit_length() - _EXACT_BITS
    unit = math.ldexp(1.0, max(exponent, -1000))
    return xp.round(terms / unit), unit
