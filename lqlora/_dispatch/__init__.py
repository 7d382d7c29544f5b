"""Dispatch: operations with a reference implementation, and overrides for the arrays of single libraries.

A function decorated with :func:`op` is the reference: array API code that runs on every library. A backend may register
an override, with a record of the calls that it takes. A call looks at the overrides for the library of its first array.
It runs the first one whose record fits the arguments, or else the reference. An override returns the same bytes as the
reference.

Arrays have two doors: :func:`namespace` in ``libraries`` refuses what is not computed with, and :func:`plain_array` in
``plain`` converts what can be. ``kinds`` words the refusals, and ``misfits`` the errors about arguments that do not fit together.

``operation`` makes the choice, and has :func:`forced`, which switches overrides off. ``overrides`` has the conditions.
"""

from __future__ import annotations

from lqlora._dispatch.kinds import FLOATS, NUMBERS, STORABLE, STORABLE_FLOATS, Dtypes
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
from lqlora._dispatch.misfits import fitting
from lqlora._dispatch.operation import (
    Operation,
    Selection,
    empty,
    forced,
    op,
    passes_over,
    prefer_maker,
    prefer_pieces,
    preferred_piece,
)
from lqlora._dispatch.overrides import Override, Takes
from lqlora._dispatch.plain import plain_array, require_writable, requires_gradient

__all__ = [
    "FLOATS",
    "NUMBERS",
    "STORABLE",
    "STORABLE_FLOATS",
    "Dtypes",
    "Library",
    "Operation",
    "Override",
    "Selection",
    "Takes",
    "array_library",
    "device_of",
    "dtype_name",
    "empty",
    "fitting",
    "forced",
    "is_contiguous",
    "is_on_host",
    "known_libraries",
    "namespace",
    "op",
    "passes_over",
    "plain_array",
    "prefer_maker",
    "prefer_pieces",
    "preferred_piece",
    "register_library",
    "require_writable",
    "requires_gradient",
]
