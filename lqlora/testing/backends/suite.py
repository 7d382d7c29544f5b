"""A suite of properties for any backend: overrides return the bytes of the reference, and so does every library."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lqlora._dispatch import array_library
from lqlora._optional import is_installed
from lqlora.errors import ConformanceError, InvalidArgumentError, MissingDependencyError
from lqlora.testing._running import try_properties
from lqlora.testing.backends import _subject as _backend_subject
from lqlora.testing.backends._properties import REGISTRY

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lqlora._typing import Namespace
    from lqlora.testing.report import Report

__all__ = ["BACKEND_PROPERTIES", "assert_backend_conforms", "check_backend"]

#: The promise of each property by its name.
BACKEND_PROPERTIES: Mapping[str, str] = MappingProxyType({name: prop.statement for name, prop in REGISTRY.items()})


def check_backend(
    library: str | Namespace,
    *,
    device: object = None,
    operations: Collection[str] | None = None,
    only: Collection[str] | None = None,
    exclude: Collection[str] = (),
    max_examples: int = 50,
    derandomize: bool = True,
) -> Report:
    """Try every property on a library: on each of its overrides, and on the reference where there is none.

    What is right is what the reference returns for NumPy arrays.

    Parameters
    ----------
    library : str or module
        Name of the library, such as ``"numpy"``, ``"torch"`` or one that was registered, or its array API namespace.
    device : object, optional
        Device that arrays are put on, in the words of the library.
    operations : collection of str, optional
        Names of operations of :mod:`lqlora.ops` to try; all by default.
    only : collection of str, optional
        Names of the properties to try.
    exclude : collection of str, optional
        Names of properties to skip.
    max_examples : int, default 50
        Calls per property and operation.
    derandomize : bool, default True
        The same calls at every run. False draws others each time.

    Returns
    -------
    Report
        A finding for each property; whatever an override raises is a finding too.

    Raises
    ------
    InvalidArgumentError
        If an operation or a property is unknown, the module makes no arrays, or a number is out of range.
    MissingDependencyError
        If the library is not installed.

    Notes
    -----
    An override is called with the arguments that its record takes, whichever override a call would pick, so those that
    are tried later are checked too. ``quantize`` and ``dequantize`` check what a call picks.

    Examples
    --------
    >>> report = check_backend("numpy", only=["bits", "tails"], operations=["decode"], max_examples=5)
    >>> report.passed
    True
    """
    names = _selected(operations)
    xp = _namespace(library) if isinstance(library, str) else library
    name = array_library(xp.zeros(1)) if hasattr(xp, "zeros") else None
    if name is None:
        raise InvalidArgumentError(f"A library is a name or a namespace of arrays, not {library!r}.")
    subject = _backend_subject.BackendSubject(xp, name, device, names)
    return try_properties(REGISTRY, subject, only, exclude, max_examples, derandomize=derandomize)


def _selected(names: Collection[str] | None) -> tuple[str, ...]:
    known = _backend_subject.operations()
    unknown = sorted(set(names or ()) - set(known))
    if isinstance(names, str) or unknown:
        raise InvalidArgumentError(f"Operations are chosen from {', '.join(sorted(known))}, not {names!r}.")
    return tuple(known if names is None else names)


def _namespace(library: str) -> Namespace:
    if not is_installed(library):
        raise MissingDependencyError(f"The backend to be checked needs {library}, which is not installed.")
    wrapped = f"array_api_compat.{library}"
    return importlib.import_module(wrapped if is_installed(wrapped) else library)


def assert_backend_conforms(library: str | Namespace, **options: Any) -> Report:
    """Raise if a property fails: one line of a test.

    Parameters
    ----------
    library : str or module
        The library, as in :func:`check_backend`.
    **options
        The options of :func:`check_backend`.

    Returns
    -------
    Report
        If nothing failed.

    Raises
    ------
    ConformanceError
        If a property failed or could not be tried. It is an AssertionError, and its message is the report.

    Examples
    --------
    >>> report = assert_backend_conforms("numpy", only=["empty"], max_examples=5)
    >>> report["empty"].result
    'passed'
    """
    report = check_backend(library, **options)
    if not report.passed:
        raise ConformanceError(f"The backend fails {', '.join(report.failed)}.\n{report}")
    return report
