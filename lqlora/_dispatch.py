"""Which library an array belongs to, and which implementation of an operation runs on it.

A function decorated with :func:`op` *is* the reference: plain array API code that runs on every library. A backend may
register an override with a predicate; a call picks by the library of its arrays, then by the first predicate that
accepts the arguments, else runs the reference. An override returns the same bytes as the reference.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import array_api_compat

from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora._typing import Array, Namespace

__all__ = ["Operation", "Selection", "array_library", "forced", "namespace", "op"]

P = ParamSpec("P")
R = TypeVar("R")

#: Module that registers the overrides of a library; imported at the first call that sees an array of that library.
_BACKENDS = {"numpy": "lqlora.backends.numpy", "torch": "lqlora.backends.torch", "cupy": "lqlora.backends.cupy"}

#: Where a library's array class lives. Looked up in ``sys.modules``: an array exists only if its library is imported.
#: NumPy's scalars count as arrays of no dimensions: its reductions return them.
_ARRAY_CLASSES = {"numpy": ("ndarray", "generic"), "torch": ("Tensor",), "cupy": ("ndarray",)}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("lqlora_forced", default=None)


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Run every operation inside the ``with`` block by its reference, whatever overrides exist.

    Parameters
    ----------
    implementation : {"reference"}
        The only choice there is today.

    Yields
    ------
    None
        The choice holds for the current context (thread or task) until the block ends.

    Raises
    ------
    InvalidArgumentError
        If another name is asked for.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 100, dtype=np.float32)
    >>> with lq.forced("reference"):
    ...     slow = lq.quantize(w, lq.BlockFormat(lq.NF4))
    >>> bool((slow.packed == lq.quantize(w, lq.BlockFormat(lq.NF4)).packed).all())
    True
    """
    if implementation != "reference":
        raise InvalidArgumentError(f"forced() knows 'reference' only, not {implementation!r}.")
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


#: What is known of the classes seen so far: a call costs one dictionary lookup per array.
_libraries: dict[type, str | None] = {}


def _class_library(cls: type) -> str | None:
    for library, names in _ARRAY_CLASSES.items():
        module = sys.modules.get(library)
        if module is not None and issubclass(cls, tuple(getattr(module, name) for name in names)):
            return library
    return "array-api" if hasattr(cls, "__array_namespace__") else None


def array_library(value: object) -> str | None:
    """Name the library an array belongs to, without importing that library.

    Parameters
    ----------
    value : object
        Anything.

    Returns
    -------
    {"numpy", "torch", "cupy", "array-api"} or None
        ``"array-api"`` for any other library that follows the standard, None if ``value`` is not an array.

    Examples
    --------
    >>> import numpy as np
    >>> array_library(np.zeros(3)), array_library([0.0])
    ('numpy', None)
    """
    cls = type(value)
    if cls not in _libraries:
        _libraries[cls] = _class_library(cls)
    return _libraries[cls]


def namespace(*arrays: Array) -> Namespace:
    """Return the array API namespace that all the arrays share.

    Parameters
    ----------
    *arrays : array
        At least one array; None entries are passed over.

    Returns
    -------
    module
        The namespace, wrapped by array-api-compat where the library itself does not follow the standard.

    Raises
    ------
    UnsupportedArrayError
        If a value is not an array.
    MixedArraysError
        If the arrays belong to two libraries, or to two devices.
    """
    present = [array for array in arrays if array is not None]
    libraries = [array_library(array) for array in present]
    if None in libraries or not libraries:
        wrong = type(present[libraries.index(None)]).__name__ if present else "nothing"
        raise UnsupportedArrayError(f"Expected a NumPy, torch, CuPy or array API array, got {wrong}.")
    if len(set(libraries)) > 1:
        raise MixedArraysError(f"Arrays of {' and '.join(sorted(set(map(str, libraries))))} in one call: convert one.")
    devices = {str(array_api_compat.device(array)) for array in present}
    if len(devices) > 1:
        raise MixedArraysError(f"Arrays on {' and '.join(sorted(devices))} in one call: move one, lqlora never copies.")
    return array_api_compat.array_namespace(*present)


@dataclass(frozen=True)
class Selection:
    """Which implementation a call would run, and why.

    Parameters
    ----------
    operation : str
        Name of the operation.
    implementation : str
        ``"reference"`` or the name of the override.
    reason : str
        One sentence.
    """

    operation: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class _Override:
    name: str
    function: Callable[..., Any]
    accepts: Callable[..., bool]


class Operation(Generic[P, R]):
    """A reference implementation together with its registered overrides.

    Parameters
    ----------
    reference : callable
        Array API implementation; its first argument is the array that decides the library.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.__signature__ = self._signature = inspect.signature(reference)
        self._overrides: dict[str, list[_Override]] = {}

    @property
    def name(self) -> str:
        """Name of the operation, as in messages."""
        return self.reference.__name__

    def register(self, library: str, accepts: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Return a decorator that adds an override for one library.

        Parameters
        ----------
        library : str
            Library whose arrays the override takes: ``"numpy"``, ``"torch"``, ``"cupy"``.
        accepts : callable
            Called with the arguments of the call; True if the override can take them.

        Returns
        -------
        callable
            The decorator; it returns the function unchanged.
        """

        def add(function: Callable[P, R]) -> Callable[P, R]:
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            self._overrides.setdefault(library, []).append(_Override(name, function, accepts))
            return function

        return add

    def _pick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., R], str, str]:
        if _forced.get() == "reference":
            return self.reference, "reference", "forced('reference') is active."
        if kwargs:  # predicates look at positions
            args, kwargs = self._signature.bind(*args, **kwargs).args, {}
        library = array_library(args[0]) if args else None
        _load_backend(library)
        candidates = self._overrides.get(library or "", ())
        for override in candidates:
            if override.accepts(*args):
                return override.function, override.name, f"{override.name} accepts these {library} arguments."
        declined = f"{len(candidates)} override(s) declined." if candidates else "no override is registered."
        return self.reference, "reference", f"{library}: {declined}"

    def select(self, *args: P.args, **kwargs: P.kwargs) -> Selection:
        """Tell which implementation a call with these arguments would run, without running it.

        Parameters
        ----------
        *args, **kwargs
            The arguments of the call.

        Returns
        -------
        Selection
            The choice and its reason.
        """
        _, implementation, reason = self._pick(args, kwargs)
        return Selection(self.name, implementation, reason)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operation by the implementation that :meth:`select` names."""
        return self._pick(args, kwargs)[0](*args, **kwargs)


@functools.cache
def _load_backend(library: str | None) -> None:
    if library in _BACKENDS:
        importlib.import_module(_BACKENDS[library])


def op(reference: Callable[P, R]) -> Operation[P, R]:
    """Turn an array API function into an :class:`Operation` that backends can override.

    Parameters
    ----------
    reference : callable
        The implementation that runs everywhere.

    Returns
    -------
    Operation
        Callable exactly like ``reference``.
    """
    return Operation(reference)
