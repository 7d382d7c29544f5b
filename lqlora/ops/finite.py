"""Checks for NaN and infinity, sums of squares that do not overflow, and units that bring numbers near one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lqlora._dispatch import FLOATS, fitting, is_on_host, namespace
from lqlora.errors import NonFiniteError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["is_finite", "power_of_four", "require_finite", "sum_of_squares"]

#: Largest exponent k of a unit 4**k for arrays of a dtype. The unit and its reciprocal are normal numbers of the dtype,
#: so the division is exact also where a library multiplies by the reciprocal.
_POWERS = {"float32": 63, "float64": 511}


def is_finite(array: Array) -> bool:
    """Return whether an array holds neither NaN nor infinity.

    Parameters
    ----------
    array : array of float32 or float64
        Values.

    Returns
    -------
    bool
        Computed from the minimum and the maximum, without an array of the size of the input.

    Examples
    --------
    >>> import numpy as np
    >>> is_finite(np.array([1.0, np.nan]))
    False
    """
    xp = namespace(array, dtypes=FLOATS)
    if 0 in array.shape:
        return True
    return (
        float(xp.min(array)) > -math.inf and float(xp.max(array)) < math.inf
    )  # with a NaN both extremes are NaN, and comparisons false


@fitting
def require_finite(array: Array, what: str) -> None:
    """Raise if an array holds NaN or infinity.

    Parameters
    ----------
    array : array of float32 or float64
        Values to check.
    what : str
        Name of the array, which the error begins with.

    Raises
    ------
    NonFiniteError
        If a value is not finite. The error says how many are not, and the index of the first.

    Examples
    --------
    >>> import numpy as np
    >>> require_finite(np.array([[1.0, np.nan]]), "weight 'q_proj'")
    Traceback (most recent call last):
        ...
    lqlora.errors.NonFiniteError: weight 'q_proj' has 1 non-finite value(s), the first at index (0, 1).
    """
    if is_finite(array):
        return
    xp = namespace(array, dtypes=FLOATS)
    finite = xp.isfinite(array)
    bad = xp.nonzero(~finite) if array.shape else ()
    first = tuple(int(axis[0]) for axis in bad)
    count = bad[0].shape[0] if bad else 1
    raise NonFiniteError(f"{what} has {count} non-finite value(s), the first at index {first}.")


#: Entries that are widened to float64 at a time: they stay in the cache, and no wide copy of the array is made. On a
#: device calls are what costs, and waiting for each sum.
_CHUNK = 1 << 15
_CHUNK_ON_DEVICE = 1 << 22


@fitting
def sum_of_squares(array: Array, weights: Array | None = None) -> float:
    """Return the sum of squares, accumulated in float64.

    Parameters
    ----------
    array : array of float32 or float64
        Finite values. Their squares are computed in float64, which float32 values do not overflow.
    weights : array of the same shape, optional
        Importance of each entry, a factor of its square.

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
    xp = namespace(array, weights, dtypes=FLOATS)
    flat = xp.reshape(array, (-1,))
    factors = None if weights is None else xp.reshape(weights, (-1,))
    partial, chunk = [], _CHUNK if is_on_host(array) else _CHUNK_ON_DEVICE
    for first in range(0, flat.shape[0], chunk):
        part = slice(first, min(first + chunk, flat.shape[0]))
        wide = xp.astype(flat[part], xp.float64)
        squares = wide * wide
        if factors is not None:
            squares *= xp.astype(factors[part], xp.float64)
        partial.append(float(xp.sum(squares)))
    # fsum rounds the sum of the partial sums once, so the number of chunks adds no error.
    return math.fsum(partial)


def power_of_four(size: float, tolerance: float, dtype: str) -> float:
    """Return the power of four near a size, or 1 if the size is zero, not finite, or near 1 already.

    Parameters
    ----------
    size : float
        Size of the entries of an array, not negative.
    tolerance : float
        A size between ``1 / tolerance`` and ``tolerance`` is near 1.
    dtype : {"float32", "float64"}
        Dtype of the array that will be divided by the result.

    Returns
    -------
    float
        Power of four that changes no digit in a division, since it and its reciprocal are normal numbers of the dtype.

    Examples
    --------
    >>> power_of_four(30.0, 2.0, "float32"), power_of_four(30.0, 100.0, "float32")
    (16.0, 1.0)
    """
    if not 0.0 < size < math.inf or 1 / tolerance < size < tolerance:
        return 1.0
    # The limits leave every size of the dtype, subnormal ones included, between 2**-52 and 4.
    limit = _POWERS[dtype]
    return 4.0 ** min(max(round(math.log(size, 4)), -limit), limit)
