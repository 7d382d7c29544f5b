"""Array libraries: whose an array is, and what can be asked of every one without knowing whose it is.

Every public function asks these things, so the answers are kept by class and by dtype.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, Literal

import array_api_compat

from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora._typing import Array, Namespace

__all__ = [
    "Library",
    "array_library",
    "device_of",
    "dtype_name",
    "is_contiguous",
    "is_on_host",
    "known_libraries",
    "namespace",
    "register_library",
]

Memory = Literal["host", "device", "either"]


@dataclass(frozen=True)
class Library:
    """An array library that overrides are registered for.

    Parameters
    ----------
    name : str
        Name of the package, which is also the name its overrides are registered under.
    arrays : tuple of str
        Classes of its arrays, as ``module:Class``. They are looked up among the modules that are imported already.
    overrides : tuple of str
        Modules that register overrides, the preferred ones first; imported with the first array of the library.
    memory : {"host", "device", "either"}
        Where its arrays may be.
    exact : bool
        True if arrays of subclasses are not given to overrides.
    """

    name: str
    arrays: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    memory: Memory = "either"
    exact: bool = False

    def classes(self) -> tuple[type, ...]:
        """Return the classes of the arrays, none if the library is not imported."""
        pairs = (place.partition(":")[::2] for place in self.arrays)
        return tuple(getattr(sys.modules[module], name) for module, name in pairs if module in sys.modules)

    def takes_class(self, cls: type) -> bool:
        """Tell whether arrays of a class may be given to overrides."""
        return cls in self.classes() if self.exact else issubclass(cls, self.classes())

    @functools.cache  # noqa: B019 - libraries are few and stay
    def load(self) -> None:
        """Import the modules of overrides, once."""
        for module in self.overrides:
            importlib.import_module(module)


#: NumPy's scalars count as arrays of no dimensions: its reductions return them. Subclasses of tensors are those that
#: compilers trace with, which have no memory.
_LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        Library(
            "numpy",
            ("numpy:ndarray", "numpy:generic"),
            ("lqlora.backends.cpu.compiled", "lqlora.backends.cpu.numpy"),
            "host",
        ),
        Library(
            "torch",
            ("torch:Tensor", "torch.nn:Parameter"),
            ("lqlora.backends.cpu.torch", "lqlora.backends.cuda.torch"),
            exact=True,
        ),
        Library("cupy", ("cupy:ndarray",), ("lqlora.backends.cuda.cupy",), "device"),
    )
}


def known_libraries() -> dict[str, Library]:
    """Return the libraries that overrides are registered for, by name.

    Returns
    -------
    dict of str to Library
        A copy.
    """
    return dict(_LIBRARIES)


def register_library(library: Library) -> None:
    """Make a library known, or replace what is known of it.

    Parameters
    ----------
    library : Library
        The library.

    Raises
    ------
    InvalidArgumentError
        If a class is not spelled ``module:Class``.
    """
    for place in library.arrays or ("",):
        module, _, name = place.partition(":")
        if not module or not name:
            raise InvalidArgumentError(f"A class of arrays is spelled 'module:Class', not {place!r}.")
    _LIBRARIES[library.name] = library
    forget()


def forget() -> None:
    """Drop the answers that are kept, after the libraries have changed."""
    for answers in (LIBRARY_OF, PLAIN_LIBRARY_OF, _NAMESPACE_OF):
        answers.clear()


class _ByClass(dict[type, Any]):
    """Answers by class: the first question computes, later ones cost one look-up."""

    def __init__(self, answer: Callable[[type], Any]) -> None:
        self._answer = answer

    def __missing__(self, cls: type) -> Any:
        self[cls] = answer = self._answer(cls)
        return answer


def _class_library(cls: type) -> str | None:
    for library in reversed(_LIBRARIES.values()):  # a library that builds on another one comes later
        if issubclass(cls, library.classes()):
            return library.name
    return "array-api" if hasattr(cls, "__array_namespace__") else None


def _plain_class_library(cls: type) -> str | None:
    name = LIBRARY_OF[cls]
    library = _LIBRARIES.get(name or "")
    return name if library is not None and library.takes_class(cls) else None


#: The library of a class, and the same for classes whose arrays may be given to overrides.
LIBRARY_OF = _ByClass(_class_library)
PLAIN_LIBRARY_OF = _ByClass(_plain_class_library)

_NAMESPACE_OF: dict[type, Namespace] = {}


def array_library(value: object) -> str | None:
    """Name the library an array belongs to, without importing that library.

    Parameters
    ----------
    value : object
        Anything.

    Returns
    -------
    str or None
        ``"numpy"``, ``"torch"``, ``"cupy"``, the name of a library that was registered, ``"array-api"`` for any other
        library that follows the standard, None if ``value`` is not an array.

    Examples
    --------
    >>> import numpy as np
    >>> array_library(np.zeros(3)), array_library([0.0])
    ('numpy', None)
    """
    library: str | None = LIBRARY_OF[type(value)]
    return library


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
    if len(arrays) == 1 and (known := _NAMESPACE_OF.get(type(arrays[0]))) is not None:
        return known
    present = [array for array in arrays if array is not None]
    if not present:
        raise UnsupportedArrayError("Expected a NumPy, torch, CuPy or array API array, got nothing.")
    library = LIBRARY_OF[type(present[0])]
    if library is None or len(present) > 1:
        _require_one_home(present)
    first = present[0]
    found = _NAMESPACE_OF.get(type(first))
    if found is None:
        found = _NAMESPACE_OF[type(first)] = array_api_compat.array_namespace(first)
    return found


def _require_one_home(present: list[Array]) -> None:
    """Raise unless all are arrays of one library on one device."""
    homes = [LIBRARY_OF[type(array)] for array in present]
    library = homes[0]
    if None in homes:
        wrong = type(present[homes.index(None)]).__name__
        raise UnsupportedArrayError(f"Expected a NumPy, torch, CuPy or array API array, got {wrong}.")
    if homes.count(library) != len(homes):
        raise MixedArraysError(f"Arrays of {' and '.join(sorted(set(homes)))} in one call: convert one.")
    if library == "array-api" and len({type(array) for array in present}) > 1:
        raise MixedArraysError("Arrays of two array API libraries in one call: convert one.")
    if library == "numpy":
        return
    devices = [device_of(array) for array in present]
    if devices.count(devices[0]) != len(devices):
        named = " and ".join(sorted(set(map(str, devices))))
        raise MixedArraysError(f"Arrays on {named} in one call: move one, lqlora never copies.")


#: By the class of the dtype too: dtypes of two libraries may have one hash, and dislike being compared.
_dtype_names: dict[tuple[type, Any], str] = {}


def dtype_name(array: Array) -> str:
    """Name of an array's dtype, the same word for every library.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    str
        Such as ``"float32"``, ``"bfloat16"`` or ``"uint8"``.

    Examples
    --------
    >>> import numpy as np
    >>> dtype_name(np.zeros(1, dtype=np.float16))
    'float16'
    """
    dtype = array.dtype
    key = type(dtype), dtype
    name = _dtype_names.get(key)
    if name is None:
        name = _dtype_names[key] = spelled(dtype)
    return name


def spelled(dtype: Any) -> str:
    """Return the name of a dtype without that of its library."""
    return str(dtype).rpartition(".")[2]


def device_of(array: Array) -> Any:
    """Return the device of an array, in the words of its library.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    object
        What the functions of the library that make arrays take as ``device``.

    Examples
    --------
    >>> import numpy as np
    >>> device_of(np.zeros(1))
    'cpu'
    """
    return array.device if LIBRARY_OF[type(array)] == "torch" else array_api_compat.device(array)


def is_on_host(array: Array) -> bool:
    """Tell whether the entries of an array are in the memory of the host.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    bool
        False for arrays on an accelerator.

    Examples
    --------
    >>> import numpy as np
    >>> is_on_host(np.zeros(1))
    True
    """
    return bool(host_test(LIBRARY_OF[type(array)])(array))


def host_test(library: str | None) -> Callable[[Array], Any]:
    """Return what tells of arrays of one library whether they are on the host, called for every argument."""
    known = _LIBRARIES.get(library or "")
    if library == "torch":
        return attrgetter("is_cpu")
    if known is not None and known.memory != "either":
        return _always if known.memory == "host" else _never
    return _names_the_host


def _always(_: Array) -> bool:
    return True


def _never(_: Array) -> bool:
    return False


def _names_the_host(array: Array) -> bool:
    return "cpu" in str(array_api_compat.device(array)).lower()


#: NumPy's flags of an array that is laid out row by row, at an address its dtype may have.
_PLAIN_FLAGS = 0x101


def is_contiguous(array: Array) -> bool:
    """Tell whether an array is known to be dense and row-major, so that flattening it gives a view.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    bool
        False for libraries that do not say so, and for memory that is not aligned to the dtype.

    Examples
    --------
    >>> import numpy as np
    >>> is_contiguous(np.zeros((2, 3))), is_contiguous(np.zeros((2, 3)).T)
    (True, False)
    """
    return bool(dense_test(LIBRARY_OF[type(array)])(array))


def dense_test(library: str | None) -> Callable[[Array], Any]:
    """Return what tells of arrays of one library whether they are dense, called for every argument."""
    return _DENSE_TESTS.get(library or "", _says_so)


def _is_dense_and_aligned(array: Array) -> bool:
    return bool(array.flags.num & _PLAIN_FLAGS == _PLAIN_FLAGS)


def _says_so(array: Array) -> bool:
    return bool(getattr(getattr(array, "flags", None), "c_contiguous", False))


_DENSE_TESTS: dict[str, Callable[[Array], Any]] = {
    "numpy": _is_dense_and_aligned,
    "torch": methodcaller("is_contiguous"),
}
