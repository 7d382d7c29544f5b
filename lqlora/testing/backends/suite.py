"""Conformance suite for backends: every override and every library returns the bytes of the reference."""

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
    shrink: bool = True,
) -> Report:
    """Check every property on a library: on each of its overrides, and on the reference where there is none.

    Results are compared with those of the reference on NumPy arrays.

    Parameters
    ----------
    library : str or module
        Name of the library, such as ``"numpy"``, ``"torch"`` or one that was registered, or its array API namespace.
    device : object, optional
        Device of the arrays, as an object or string of the library.
    operations : collection of str, optional
        Names of operations of :mod:`lqlora.ops` to check; all by default.
    only : collection of str, optional
        Names of the properties to check; all by default.
    exclude : collection of str, optional
        Names of properties to skip.
    max_examples : int, default 50
        Number of calls for each property and operation.
    derandomize : bool, default True
        True makes the same calls in every run; False draws new ones each time.
    shrink : bool, default True
        True searches for a small counterexample after a failure, False reports the first one, which is faster.

    Returns
    -------
    Report
        A finding for each property. An error that an override raises is a finding too.

    Raises
    ------
    InvalidArgumentError
        If an operation or a property is unknown, ``library`` has no arrays, or a number is out of range.
    MissingDependencyError
        If the library is not installed.

    Notes
    -----
    Every override is called with the arguments that its record takes, even if a call would pick an earlier one. The
    properties ``quantize`` and ``dequantize`` check what a call picks.

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
        raise InvalidArgumentError(f"library must be a name or a namespace of arrays, got {library!r}.")
    subject = _backend_subject.BackendSubject(xp, name, device, names)
    return try_properties(REGISTRY, subject, only, exclude, max_examples, derandomize=derandomize, shrink=shrink)


def _selected(names: Collection[str] | None) -> tuple[str, ...]:
    known = _backend_subject.operations()
    unknown = sorted(set(names or ()) - set(known))
    if isinstance(names, str) or unknown:
        raise InvalidArgumentError(f"operations must be chosen from {', '.join(sorted(known))}, got {names!r}.")
    return tuple(known if names is None else names)


def _namespace(library: str) -> Namespace:
    if not is_installed(library):
        raise MissingDependencyError(f"library {library!r} is not installed. Install it to check its backend.")
    wrapped = f"array_api_compat.{library}"
    return importlib.import_module(wrapped if is_installed(wrapped) else library)


def assert_backend_conforms(library: str | Namespace, **options: Any) -> Report:
    """Raise an error if a property of a backend fails; a test needs one line.

    Parameters
    ----------
    library : str or module
        Library to check, as for :func:`check_backend`.
    **options
        Options of :func:`check_backend`.

    Returns
    -------
    Report
        Report of the properties, all of which passed or were skipped.

    Raises
    ------
    ConformanceError
        If a property failed or raised. The error is an AssertionError, and its message is the report.

    Examples
    --------
    >>> report = assert_backend_conforms("numpy", only=["empty"], max_examples=5)
    >>> report["empty"].result
    'passed'
    """
    report = check_backend(library, **options)
    if not report.passed:
        raise ConformanceError(f"backend fails {', '.join(report.failed)}.\n{report}")
    return report
