"""Small tables of the host, such as levels, where an array is; and looking entries up."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lqlora._dispatch import array_library, device_of, namespace
from lqlora._dispatch.libraries import PLAIN_LIBRARY_OF

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["pick", "table_beside"]

#: Tables beside tensors, by device and contents, the oldest first; half a KiB each on a device. So many that no kernel still
#: waits to look at one that is given up, on whichever stream.
_tables: dict[tuple[Any, ...], Array] = {}
_MOST_TABLES = 4096


def table_beside(table: npt.NDArray[Any], array: Array) -> Array:
    """Return a table in the library and on the device of an array.

    Parameters
    ----------
    table : ndarray
        Levels or boundaries.
    array : array
        Any array.

    Returns
    -------
    array of the dtype of ``table``, same shape
        Not to be written to. For tensors the last tables are kept: a copy to a device would make it wait.

    Examples
    --------
    >>> import numpy as np
    >>> table_beside(np.array([0.5]), np.zeros(3)).tolist()
    [0.5]
    """
    library = PLAIN_LIBRARY_OF[type(array)]
    if library == "numpy":
        return table
    if library == "torch":
        return _beside_tensor(table, array)
    return namespace(array).asarray(table.copy(), device=device_of(array))


def _beside_tensor(table: npt.NDArray[Any], tensor: Array) -> Array:
    key = device_of(tensor), table.tobytes(), table.dtype.str, table.shape
    kept = _tables.get(key)
    if kept is None:
        kept = namespace(tensor).asarray(table.copy(), device=device_of(tensor))  # of memory that may be written to
        if PLAIN_LIBRARY_OF[type(kept)] == "torch":  # and not what a compiler traces with
            while len(_tables) >= _MOST_TABLES:
                with contextlib.suppress(StopIteration, KeyError, RuntimeError):  # other threads do the same
                    del _tables[next(iter(_tables))]
            _tables[key] = kept
    return kept


def pick(array: Array, index: Array, axis: int = 0) -> Array:
    """Return some entries, or rows, of an array.

    Parameters
    ----------
    array : array
        Any array.
    index : array of int64, shape (n,)
        Positions, none of them negative: to allow for such ones takes torch as long as all the rest.
    axis : int, default 0
        Axis of the positions.

    Returns
    -------
    array
        As ``take`` of the standard returns it.

    Examples
    --------
    >>> import numpy as np
    >>> pick(np.array([0.5, 2.0]), np.array([1, 1, 0])).tolist()
    [2.0, 2.0, 0.5]
    """
    xp = namespace(array, index)
    return xp.index_select(array, axis, index) if array_library(array) == "torch" else xp.take(array, index, axis=axis)
