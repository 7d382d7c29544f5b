"""Reading and writing a stretch of an array by its row-major order, without a copy of the whole."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lqlora._dispatch import array_library, namespace

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["is_contiguous", "put_flat", "take_flat"]


def is_contiguous(array: Array) -> bool:
    """Tell whether flattening an array is known to give a view of it.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    bool
        False for libraries that do not say so.

    Examples
    --------
    >>> import numpy as np
    >>> is_contiguous(np.zeros((2, 3))), is_contiguous(np.zeros((2, 3)).T)
    (True, False)
    """
    library = array_library(array)
    if library == "torch":
        return bool(array.is_contiguous())
    return library in ("numpy", "cupy") and bool(array.flags.c_contiguous)


def take_flat(array: Array, start: int, stop: int) -> Array:
    """Return a stretch of the entries of an array in row-major order.

    Parameters
    ----------
    array : array
        Any shape and strides.
    start, stop : int
        Range of the flat index.

    Returns
    -------
    array, shape (stop - start,)
        A view where the array is contiguous, else a copy that touches only the rows it needs.

    Examples
    --------
    >>> import numpy as np
    >>> take_flat(np.arange(12).reshape(3, 4).T, 2, 7).tolist()
    [8, 1, 5, 9, 2]
    """
    xp = namespace(array)
    if len(array.shape) < 2 or is_contiguous(array):
        return xp.reshape(array, (-1,))[start:stop]
    first, last, width = _rows(array, start, stop)
    rows = xp.reshape(array[first:last, ...], (-1,))
    return rows[start - first * width : stop - first * width]


def put_flat(array: Array, start: int, values: Array) -> None:
    """Write a stretch of the entries of an array in row-major order.

    Parameters
    ----------
    array : array
        Any shape and strides; changed in place.
    start : int
        Flat index of the first entry written.
    values : array, shape (n,)
        The entries, of the dtype of the array.

    Examples
    --------
    >>> import numpy as np
    >>> target = np.zeros((2, 3)).T
    >>> put_flat(target, 1, np.array([1.0, 2.0]))
    >>> target.tolist()
    [[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]
    """
    xp = namespace(array, values)
    stop = start + values.shape[0]
    if is_contiguous(array):
        xp.reshape(array, (-1,))[start:stop] = values
        return
    if not array.shape:
        array[()] = xp.reshape(values, ())
        return
    first, last, width = _rows(array, start, stop)
    # Whole rows: what lies beside the stretch in the first and the last of them is written back unchanged.
    rows = xp.reshape(array[first:last, ...], (-1,))
    parts = [rows[: start - first * width], values, rows[stop - first * width :]]
    array[first:last, ...] = xp.reshape(xp.concat(parts), (last - first, *array.shape[1:]))


def _rows(array: Array, start: int, stop: int) -> tuple[int, int, int]:
    """Return the rows that a stretch touches, and their width."""
    width = max(1, prod(array.shape[1:]))
    return start // width, min(array.shape[0], -(-stop // width)), width
