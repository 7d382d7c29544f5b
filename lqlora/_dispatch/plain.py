"""Array arguments: conversion to plain arrays of their library, and the check of arrays that are written to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch.kinds import NUMBERS, Dtypes, fault_of, is_native
from lqlora._dispatch.libraries import ENTRY_OF, LIBRARY_OF, PLAIN_LIBRARY_OF, new_entry
from lqlora.errors import InvalidArgumentError, UnsupportedArrayError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["plain_array", "require_writable", "requires_gradient"]


def plain_array(value: object, name: str, dtypes: Dtypes = NUMBERS) -> Array:
    """Return an argument as an array of exactly the class of its library: every public function begins with this.

    A harmless subclass becomes its base class, a parameter of torch the tensor behind it with its graph, a matrix or another
    byte order an ordinary array, and a lazily negated or conjugated tensor is resolved. Anything else that lqlora does not compute with is
    refused.

    Parameters
    ----------
    value : object
        The argument.
    name : str
        Name of the argument, which errors begin with.
    dtypes : Dtypes
        The dtypes that the caller computes with.

    Returns
    -------
    array
        The argument itself, if it is plain. A converted one has the same entries, and shares memory where it can.

    Raises
    ------
    UnsupportedArrayError
        If the argument is not an array, or of a kind or dtype that lqlora does not compute with.

    Examples
    --------
    >>> import numpy as np
    >>> plain_array(np.ones(2, dtype=">f4"), "w").dtype.isnative
    True
    """
    cls = type(value)
    library = PLAIN_LIBRARY_OF[cls]
    if library is None or (cls is not np.ndarray and library == "numpy"):
        return _converted(
            value, name, dtypes
        )  # a subclass may redefine arithmetic, and a scalar of NumPy is not an array
    if library == "torch" and cls is not sys.modules["torch"].Tensor:
        return _converted(value, name, dtypes)
    entry = ENTRY_OF.get(cls) or new_entry(value, library)
    if not dtypes.taken[entry.at][entry.facts(value)] or (library == "torch" and _stands_for_another(value)):
        return _converted(value, name, dtypes)
    return value


def _stands_for_another(tensor: Any) -> bool:
    """Return whether the memory of a tensor does not hold its entries as they are."""
    is_wrapped = sys.modules["torch"]._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001 - torch has no public test
    return bool(tensor.is_neg() or tensor.is_conj() or is_wrapped(tensor))


def _converted(value: Any, name: str, dtypes: Dtypes) -> Array:
    """Return an argument as a plain array, or raise."""
    torch = sys.modules.get("torch")
    if isinstance(value, np.matrix) or (LIBRARY_OF[type(value)] == "numpy" and type(value) is not np.ndarray):
        value = np.asarray(value)
    library = LIBRARY_OF[type(value)]
    if library == "numpy" and not is_native(value.dtype) and value.dtype.kind in "iufc":
        value = value.astype(value.dtype.newbyteorder("="))
    if library == "torch" and torch is not None and type(value) is not torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the subclass may redefine every method
            value = value.as_subclass(torch.Tensor)
    if fault := fault_of(value, library, dtypes):
        raise UnsupportedArrayError(f"{name} {fault}")
    if library == "torch" and torch is not None:
        if torch._C._functorch.is_functorch_wrapped_tensor(value):  # noqa: SLF001 - torch has no public test
            raise UnsupportedArrayError(
                f"{name} must be a tensor with entries, got one inside a transform of torch.func. Call the function outside."
            )
        value = value.resolve_conj().resolve_neg()
    return value


def requires_gradient(array: Array) -> bool:
    """Return whether autograd records what is computed with an array.

    Parameters
    ----------
    array : array
        An array that :func:`namespace` accepts.

    Returns
    -------
    bool
        True for tensors of torch that require a gradient while gradients are recorded.
    """
    return getattr(array, "requires_grad", False) and sys.modules["torch"].is_grad_enabled()


def require_writable(array: Array, name: str) -> None:
    """Raise unless an array can be written to, each entry by itself.

    Parameters
    ----------
    array : array
        An array that :func:`namespace` accepts.
    name : str
        Name of the argument, which the error begins with.

    Raises
    ------
    InvalidArgumentError
        If the array is read-only, has entries that share memory, or is a leaf of a graph of torch.
    """
    library, reason = LIBRARY_OF[type(array)], ""
    if library == "numpy" and not array.flags.writeable:
        reason = "is read-only"
    elif requires_gradient(array):
        reason = "requires a gradient"
    elif library in ("numpy", "torch") and 0 not in array.shape:
        strides = array.strides if library == "numpy" else array.stride()
        if any(length > 1 and not stride for length, stride in zip(array.shape, strides, strict=True)):
            reason = "repeats entries of its memory"
    if reason:
        raise InvalidArgumentError(
            f"{name} must be an array that can be written to, got one that {reason}. Pass a copy."
        )
