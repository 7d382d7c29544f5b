"""Backends: overrides of the operations of :mod:`lqlora.ops`, and functions that list and explain them.

Each override returns the same bytes as the reference. A measurement in ``benchmarks/`` shows its gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import Library, Operation, Selection, Takes, known_libraries, register_library
from lqlora._optional import is_installed
from lqlora._threads import num_threads, set_num_threads
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = [
    "Availability",
    "Capability",
    "Selection",
    "Takes",
    "available",
    "capabilities",
    "explain",
    "num_threads",
    "register",
    "set_num_threads",
]


@dataclass(frozen=True)
class Availability:
    """Availability of a library or of compiled kernels; true or false in a condition.

    Parameters
    ----------
    usable : bool
        True if it can be used here.
    reason : str
        What is installed or missing, in a few words.

    Examples
    --------
    >>> bool(Availability(False, "not installed"))
    False
    """

    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable


def available() -> dict[str, Availability]:
    """Return the installed array libraries, without importing them, and whether compiled kernels are used.

    Returns
    -------
    dict of str to Availability
        Availability of ``numpy``, ``torch``, ``cupy``, registered libraries, and ``native``, the kernels for the CPU.

    Examples
    --------
    >>> bool(available()["numpy"])
    True
    """
    from lqlora.backends.cpu import loading  # noqa: PLC0415 - kernels are imported with the first array

    found = {name: _installed(name) for name in known_libraries()}
    return {**found, "native": Availability(*loading.status())}


def _installed(package: str) -> Availability:
    if is_installed(package):
        return Availability(usable=True, reason="installed")
    return Availability(usable=False, reason="not installed")


@dataclass(frozen=True)
class Capability:
    """An override: the operation that it implements, and the calls that it takes.

    Parameters
    ----------
    operation : str
        Name of the operation.
    implementation : str
        Name of the override.
    library : str
        Name of the library whose arrays it takes.
    takes : Takes
        The record that decides which calls it takes.
    """

    operation: str
    implementation: str
    library: str
    takes: Takes


def capabilities() -> list[Capability]:
    """Return the overrides for all installed libraries, which this imports.

    Returns
    -------
    list of Capability
        Overrides by operation, then by library, then in the order in which a call tries them.

    Examples
    --------
    >>> [c.implementation for c in capabilities() if c.operation == "bin_sums" and c.library == "numpy"]
    ['numpy.bin_sums_counted']
    """
    return [
        Capability(name, override.name, library, override.takes)
        for name, operation in sorted(_operations().items())
        for library in known_libraries()
        if is_installed(library)
        for override in operation.overrides(library)
    ]


def _operations() -> dict[str, Operation[Any, Any]]:
    named = {name: getattr(ops, name) for name in ops.__all__}
    return {name: value for name, value in named.items() if isinstance(value, Operation)}


def register(library: str, *, arrays: tuple[str, ...], overrides: tuple[str, ...] = ()) -> None:
    """Register an array library, so that operations may have overrides for its arrays.

    Arrays of libraries that are not registered run the references, if the library follows the array API standard.

    Parameters
    ----------
    library : str
        Name of its package. Overrides are registered under this name.
    arrays : tuple of str
        Classes of its arrays, as ``module:Class``. Arrays of subclasses belong to the library too.
    overrides : tuple of str
        Modules that register overrides, the preferred ones first. The first array of the library that an operation
        sees imports them.

    Raises
    ------
    InvalidArgumentError
        If a class is not spelled ``module:Class``.

    Examples
    --------
    >>> register("cubed", arrays=("cubed:Array",))
    >>> "cubed" in available()
    True
    """
    register_library(Library(library, arrays, overrides))


@annotated
def explain(operation: str, *arrays: Array, **arguments: Any) -> Selection:
    """Return the implementation of an operation that would run on some arguments, and the reason.

    Parameters
    ----------
    operation : str
        Name of an operation in :mod:`lqlora.ops`.
    *arrays : array
        Positional arguments of the call.
    **arguments
        Arguments of the call by name.

    Returns
    -------
    Selection
        The implementation, and the reason for the choice.

    Raises
    ------
    InvalidArgumentError
        If ``operation`` is not an operation.

    Examples
    --------
    >>> import numpy as np
    >>> explain("add_low_rank", *(np.ones((1, 1)) for _ in range(4)), 1.0).reason
    'numpy: no override is registered.'
    """
    known = _operations()
    if operation not in known:
        raise InvalidArgumentError(f"operation must be one of {', '.join(sorted(known))}, got {operation!r}.")
    return known[operation].select(*arrays, **arguments)
