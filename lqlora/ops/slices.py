"""Reading and writing a stretch of an array by its row-major order, without a copy of the whole."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import array_api_compat

from lqlora._dispatch import array_library, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    if start >= stop:
        return xp.zeros((0,), dtype=array.dtype, device=array_api_compat.device(array))
    if len(array.shape) < 2 or is_contiguous(array):
        return xp.reshape(array, (-1,))[start:stop]
    parts = [
        xp.reshape(array[rows, ...], (-1,)) if own is None else take_flat(array[rows, ...], *own)
        for rows, own in _rows(array, start, stop)
    ]
    return parts[0] if len(parts) == 1 else xp.concat(parts)


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
    if not values.shape[0]:
        return
    if is_contiguous(array):
        xp.reshape(array, (-1,))[start : start + values.shape[0]] = values
    elif not array.shape:
        array[...] = xp.reshape(values, ())
    elif len(array.shape) == 1:
        array[start : start + values.shape[0]] = values
    else:
        _put_rows(array, start, values)


def _put_rows(array: Array, start: int, values: Array) -> None:
    written = 0
    for rows, own in _rows(array, start, start + values.shape[0]):
        if own is None:
            count = (rows.stop - rows.start) * prod(array.shape[1:])
            whole = namespace(array).reshape(values[written : written + count], (-1, *array.shape[1:]))
            array[rows, ...] = whole
        else:
            count = own[1] - own[0]
            put_flat(array[rows, ...], own[0], values[written : written + count])
        written += count


def _rows(array: Array, start: int, stop: int) -> Iterator[tuple[Any, tuple[int, int] | None]]:
    """Cut a stretch at the rows of an array: yield whole rows as a slice, and stretches of one row with its number."""
    width = max(1, prod(array.shape[1:]))
    while start < stop:
        row, within = divmod(start, width)
        if within or stop - start < width:
            end = min(stop, (row + 1) * width)
            yield row, (within, within + end - start)
        else:
            end = stop // width * width
            yield slice(row, end // width), None
        start = end
