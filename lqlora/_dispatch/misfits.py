"""Errors of array libraries about arguments that do not fit an operation, as errors of lqlora."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lqlora._dispatch.kinds import STORABLE, fault_of, spelled
from lqlora._dispatch.libraries import LIBRARY_OF
from lqlora._messages import shown
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError, LQLoRAError, UnsupportedArrayError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FOREIGN", "fitting", "misfit"]

P = ParamSpec("P")
R = TypeVar("R")

#: What the libraries raise about dtypes, shapes and indices. Errors of memory and warnings are none of these.
FOREIGN = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


#: Packages whose errors may be about arguments. Those of CuPy and of kernels are about the device.
_PACKAGES = ("builtins", "numpy", "torch")

#: Words of errors about memory and devices, which torch and CuPy raise as RuntimeError, too.
_MACHINE = re.compile("allocate memory|CUDA|cuda[A-Z]")


def fitting(function: Callable[P, R]) -> Callable[P, R]:
    """Return an operation without overrides whose errors about arguments are those of lqlora.

    Parameters
    ----------
    function : callable
        The operation.

    Returns
    -------
    callable
        It does what ``function`` does, and nothing else until an error occurs.
    """

    @functools.wraps(function)
    def _call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except FOREIGN as error:
            if (own := misfit(function, args, kwargs, error)) is None:
                raise
            raise own from error

    return _call


def misfit(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> LQLoRAError | None:
    """Return the error for a call that failed inside an array library.

    Parameters
    ----------
    function : callable
        The operation.
    args, kwargs : tuple and dict
        Arguments of the call.
    error : Exception
        What the library raised.

    Returns
    -------
    LQLoRAError or None
        None if the error is one of lqlora, a lack of memory, or about the number of arguments.
    """
    package = type(error).__module__.partition(".")[0]
    if package not in _PACKAGES or "OutOfMemory" in type(error).__name__ or _MACHINE.search(str(error)):
        return None
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    for name, value in given.items():
        library = LIBRARY_OF[type(value)]
        if library is not None and (fault := fault_of(value, library, STORABLE)):
            return UnsupportedArrayError(f"{name} {fault}")
    listed = ", ".join(f"{name} {_described(value)}" for name, value in given.items())
    return InvalidArgumentError(
        f"{' and '.join(given) or 'arguments'} must fit {function.__name__}: {_reason(error)}. Got {listed[:200]}."
    )


def _reason(error: Exception) -> str:
    """Return the first line of the message of another library, without its last period."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return printable(line[:120]).removesuffix(".")


def _described(value: Any) -> str:
    """Return an argument as a few words: dtype and shape of an array, the fields of a record, or the value."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value[:6]))})"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return shown(value, 40) if isinstance(value, int | float | str | None) else type(value).__name__
    return f"{spelled(dtype)[:20]} of shape {tuple(shape)}"
