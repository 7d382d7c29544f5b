"""Fast implementations, registered onto the operations of :mod:`lqlora.ops`.

Each override returns the same bytes as the reference and is justified by a row of ``benchmarks/``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lqlora import ops
from lqlora._dispatch import Operation, Selection
from lqlora._optional import is_installed
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Selection", "available", "explain"]


def available() -> dict[str, bool]:
    """Tell which array libraries are installed, without importing them.

    Returns
    -------
    dict of str to bool
        ``numpy``, ``torch`` and ``cupy``.

    Examples
    --------
    >>> available()["numpy"]
    True
    """
    return {library: is_installed(library) for library in ("numpy", "torch", "cupy")}


def explain(operation: str, *arrays: Array, **arguments: Any) -> Selection:
    """Tell which implementation of an operation would run on some arguments, and why.

    Parameters
    ----------
    operation : str
        Name of an operation in :mod:`lqlora.ops`.
    *arrays : array
        Its positional arguments.
    **arguments
        Its other arguments.

    Returns
    -------
    Selection
        The implementation and the reason.

    Raises
    ------
    InvalidArgumentError
        If there is no such operation.

    Examples
    --------
    >>> import numpy as np
    >>> explain("pack_codes", np.zeros(4, dtype=np.uint8), 4).implementation
    'reference'
    """
    found = getattr(ops, operation, None)
    if not isinstance(found, Operation):
        known = sorted(name for name in ops.__all__ if isinstance(getattr(ops, name), Operation))
        raise InvalidArgumentError(f"{operation!r} is no operation; there are {', '.join(known)}.")
    return found.select(*arrays, **arguments)
