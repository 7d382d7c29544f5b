"""Dispatch: operations with a reference implementation, and overrides for the arrays of single libraries.

A function decorated with :func:`op` is the reference: array API code that runs on every library. A backend may register
an override, with a record of the calls that it takes. A call looks at the overrides for the library of its first array.
It runs the first one whose record fits the arguments, or else the reference. An override returns the same bytes as the
reference.

``operation`` makes the choice, and has :func:`forced`, which switches overrides off. ``overrides`` has the conditions.
"""

from __future__ import annotations

from lqlora._dispatch.libraries import (
    Library,
    array_library,
    device_of,
    dtype_name,
    is_contiguous,
    is_on_host,
    known_libraries,
    namespace,
    register_library,
)
from lqlora._dispatch.operation import (
    Operation,
    Selection,
    empty,
    forced,
    op,
    prefer_maker,
    prefer_pieces,
    preferred_piece,
)
from lqlora._dispatch.overrides import Override, Takes

__all__ = [
    "Library",
    "Operation",
    "Override",
    "Selection",
    "Takes",
    "array_library",
    "device_of",
    "dtype_name",
    "empty",
    "forced",
    "is_contiguous",
    "is_on_host",
    "known_libraries",
    "namespace",
    "op",
    "prefer_maker",
    "prefer_pieces",
    "preferred_piece",
    "register_library",
]
