"""Reads and writes of a range of entries in row-major order, and copies between transposed layouts."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import STORABLE, array_library, device_of, fitting, is_contiguous, is_on_host, namespace, op

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora._dispatch.examples import BlocksProblem
    from lqlora._typing import Array

__all__ = ["copy_across", "put_flat", "take_flat"]

#: An array is copied to one with the transposed layout in strips of this many lines. A cache line of the source holds 16
#: entries of 4 bytes, one for each line of the strip: the first line loads it, and the others find it in the cache.
#: Strips of fewer entries than the second number would cost more in calls than they save.
_STRIP = 16
_STRIP_ENTRIES = 1 << 11


def take_flat(array: Array, start: int, stop: int) -> Array:
    """Return a range of the entries of an array in row-major order, as a flat array.

    Parameters
    ----------
    array : array
        Array of any shape and strides.
    start, stop : int
        Range of the flat index.

    Returns
    -------
    array, shape (stop - start,)
        A view if the array is contiguous, else a copy that reads only the rows it needs.

    Examples
    --------
    >>> import numpy as np
    >>> take_flat(np.arange(12).reshape(3, 4).T, 2, 7).tolist()
    [8, 1, 5, 9, 2]
    """
    xp = namespace(array, dtypes=STORABLE)
    if start >= stop:
        return xp.zeros((0,), dtype=array.dtype, device=device_of(array))
    if len(array.shape) == 1:
        return array[start:stop]
    if not array.shape or is_contiguous(array):
        return xp.reshape(array, (-1,))[start:stop]
    # A strided array is read row by row of its first axis: whole rows at once, and the two ragged ends by recursion.
    # reshape of the whole array would copy all of it to read a few entries.
    parts = [
        _flattened(array[rows, ...]) if own is None else take_flat(array[rows, ...], *own)
        for rows, own in _rows(array, start, stop)
    ]
    return parts[0] if len(parts) == 1 else xp.concat(parts)


@fitting
def put_flat(array: Array, start: int, values: Array) -> None:
    """Write a range of the entries of an array in row-major order.

    Parameters
    ----------
    array : array
        Array of any shape and strides, changed in place.
    start : int
        Flat index of the first entry that is written.
    values : array, shape (n,)
        Entries of the dtype of the array.

    Examples
    --------
    >>> import numpy as np
    >>> target = np.zeros((2, 3)).T
    >>> put_flat(target, 1, np.array([1.0, 2.0]))
    >>> target.tolist()
    [[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]
    """
    xp = namespace(array, values, dtypes=STORABLE)
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
            _copy(array[rows, ...], whole)
        else:
            count = own[1] - own[0]
            put_flat(array[rows, ...], own[0], values[written : written + count])
        written += count


def _flattened(array: Array) -> Array:
    """Return all entries of an array in row-major order."""
    xp = namespace(array, dtypes=STORABLE)
    if _fastest_axis(array) == len(array.shape) - 1:
        return xp.reshape(array, (-1,))
    if array_library(array) == "torch":
        array = array.detach()  # autograd would record every strip
    target = xp.empty(array.shape, dtype=array.dtype, device=device_of(array))
    _copy(target, array)
    return xp.reshape(target, (-1,))


def _copy(target: Array, source: Array) -> None:
    """Copy an array into another of its shape."""
    if _fastest_axis(target) == _fastest_axis(source):
        target[...] = source
    else:
        copy_across(source, target)


def _across(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return example arguments: a transposed matrix, and an array of its shape to copy it into."""
    source = problem.rows(problem.weights).T
    return source, np.full_like(source, 7, order="C")


@op(examples=_across)
def copy_across(source: Array, out: Array) -> Array:
    """Copy an array into another one with a transposed layout in memory.

    Parameters
    ----------
    source : array
        Array to copy.
    out : array of the same shape and dtype
        Array that is written. It must not share memory with ``source``.

    Returns
    -------
    array
        ``out``.

    Examples
    --------
    >>> import numpy as np
    >>> copy_across(np.arange(6).reshape(2, 3).T, np.empty((3, 2), dtype=np.int64)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    namespace(source, out, dtypes=STORABLE)
    axis = _fastest_axis(out)
    length = out.shape[axis]
    width = max(_STRIP, _STRIP_ENTRIES * length // max(1, prod(out.shape)))
    for first in range(0, length, width):
        strip = (*[slice(None)] * axis, slice(first, min(first + width, length)), ...)
        out[strip] = source[strip]
    return out


def _fastest_axis(array: Array) -> int:
    """Return the axis along which entries are closest in memory, or the last axis if strides are unknown."""
    steps = [
        (abs(stride), -axis)
        for axis, (stride, length) in enumerate(zip(_strides(array), array.shape, strict=True))
        if stride and length > 1
    ]
    return -min(steps)[1] if steps else len(array.shape) - 1


def _strides(array: Array) -> tuple[int, ...]:
    """Return the strides of an array in host memory, or zeros if its library has none."""
    library = array_library(array)
    if library == "torch" and is_on_host(array):
        return tuple(array.stride())
    return tuple(array.strides) if library == "numpy" else (0,) * len(array.shape)


def _rows(array: Array, start: int, stop: int) -> Iterator[tuple[Any, tuple[int, int] | None]]:
    """Split a range of entries at the rows of an array.

    Yields whole rows as a slice and None, and a part of one row as its number and the range within it.
    """
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
