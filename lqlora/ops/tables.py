"""Small tables of the host, such as levels, on the device of an array; and look-ups in them."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from lqlora._dispatch import STORABLE, array_library, device_of, fitting, is_on_host, namespace
from lqlora._dispatch.libraries import PLAIN_LIBRARY_OF
from lqlora.errors import InvalidArgumentError, UnsupportedArrayError

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["pick", "table_beside"]

#: Tables of tensors by device and contents, the oldest first, half a KiB each but for those of rotations. The number is so large that no kernel on any
#: stream still waits to read a table when it is evicted.
_tables: dict[tuple[Any, ...], Array] = {}
_MOST_TABLES = 4096


@fitting
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
        The table, which must not be written to. Tables of tensors are cached, because a copy to a device makes the host wait.

    Examples
    --------
    >>> import numpy as np
    >>> table_beside(np.array([0.5]), np.zeros(3)).tolist()
    [0.5]
    """
    if PLAIN_LIBRARY_OF[type(table)] != "numpy":
        namespace(table, dtypes=STORABLE)
        raise UnsupportedArrayError(f"table must be a NumPy array, got one of {array_library(table)}.")
    library = PLAIN_LIBRARY_OF[type(array)]
    if library == "numpy":
        return table
    if library == "torch":
        return _beside_tensor(table, array)
    return namespace(array).asarray(table.copy(), device=device_of(array))


def _beside_tensor(table: npt.NDArray[Any], tensor: Array) -> Array:
    # The key holds the contents, not the identity: an id may be given to another table after the first is freed, and
    # equal codebooks of two formats share one entry. Entries cannot go stale, because nobody may write to them.
    key = device_of(tensor), table.tobytes(), table.dtype.str, table.shape
    kept = _tables.get(key)
    if kept is None:
        # Not an inference tensor, which autograd could not save later. torch warns of read-only memory.
        with importlib.import_module("torch").inference_mode(mode=False):
            kept = namespace(tensor).asarray(table.copy(), device=device_of(tensor))
        if (
            PLAIN_LIBRARY_OF[type(kept)] == "torch"
        ):  # compilers trace with other classes, whose tensors must not be kept
            while len(_tables) >= _MOST_TABLES:
                with contextlib.suppress(StopIteration, KeyError, RuntimeError):  # other threads evict too
                    del _tables[next(iter(_tables))]
            _tables[key] = kept
    return kept


@fitting
def pick(array: Array, index: Array, axis: int = 0) -> Array:
    """Return entries, or rows, of an array by position.

    Parameters
    ----------
    array : array
        Any array.
    index : array of int64, shape (n,)
        Positions, none of them negative. torch would take twice as long if it had to allow for negative ones.
    axis : int, default 0
        Axis of the positions.

    Returns
    -------
    array
        Result of ``take`` as the standard defines it.

    Raises
    ------
    InvalidArgumentError
        If a position is negative or beyond the end. On a device they are not checked.

    Examples
    --------
    >>> import numpy as np
    >>> pick(np.array([0.5, 2.0]), np.array([1, 1, 0])).tolist()
    [2.0, 2.0, 0.5]
    """
    xp = namespace(array, index, dtypes=STORABLE)
    is_torch = array_library(array) == "torch"
    # torch refuses negative positions itself, other libraries count them from the end.
    if not is_torch and is_on_host(index) and index.shape[0] and int(xp.min(index)) < 0:
        raise InvalidArgumentError(f"index must hold positions of at least 0, got {int(xp.min(index))}.")
    return xp.index_select(array, axis, index) if is_torch else xp.take(array, index, axis=axis)
