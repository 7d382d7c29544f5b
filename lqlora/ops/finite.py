"""Checks and sums that must not be fooled by a few extreme values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lqlora._dispatch import namespace
from lqlora.errors import NonFiniteError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["require_finite", "sum_of_squares"]


def require_finite(array: Array, what: str) -> None:
    """Raise if an array holds NaN or infinity.

    Parameters
    ----------
    array : array of a floating-point dtype
        Values to check.
    what : str
        What the array is, the first words of the error.

    Raises
    ------
    NonFiniteError
        Naming ``what``, the number of values that are not finite and the index of the first.

    Examples
    --------
    >>> import numpy as np
    >>> require_finite(np.array([[1.0, np.nan]]), "weight 'q_proj'")
    Traceback (most recent call last):
        ...
    lqlora.errors.NonFiniteError: weight 'q_proj' has 1 non-finite value(s), the first at index (0, 1).
    """
    xp = namespace(array)
    finite = xp.isfinite(array)
    if bool(xp.all(finite)):
        return
    bad = xp.nonzero(~finite) if array.shape else ()
    first = tuple(int(axis[0]) for axis in bad)
    count = bad[0].shape[0] if bad else 1
    raise NonFiniteError(f"{what} has {count} non-finite value(s), the first at index {first}.")


#: Entries widened to float64 at a time: they stay in the cache, and no wide copy of the array is made.
_CHUNK = 1 << 15


def sum_of_squares(array: Array, weights: Array | None = None) -> float:
    """Sum of squares, accumulated in float64.

    Parameters
    ----------
    array : array of float32 or float64
        Values of any finite size: the squares do not overflow float32.
    weights : array of the same shape, optional
        Factor of each square.

    Returns
    -------
    float
        The sum.

    Examples
    --------
    >>> import numpy as np
    >>> sum_of_squares(np.array([3e38, 0.0], dtype=np.float32)) > 8e76
    True
    """
    xp = namespace(array, weights)
    flat = xp.reshape(array, (-1,))
    factors = None if weights is None else xp.reshape(weights, (-1,))
    partial = []
    for first in range(0, flat.shape[0], _CHUNK):
        part = slice(first, min(first + _CHUNK, flat.shape[0]))
        wide = xp.astype(flat[part], xp.float64)
        squares = wide * wide
        if factors is not None:
            squares *= xp.astype(factors[part], xp.float64)
        partial.append(float(xp.sum(squares)))
    return math.fsum(partial)
