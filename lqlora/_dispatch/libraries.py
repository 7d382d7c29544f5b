"""Array libraries: the library of an array, its namespace, device, dtype name and memory layout.

Every public function needs these, so the answers are cached by class and by dtype. The record of a library names the
modules that register overrides for it. Dispatch imports these modules, and depends on nothing in them.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import array_api_compat

from lqlora._dispatch.kinds import NUMBERS, STORABLE, Dtypes, class_fault, facts_of, fault_of, is_native, spelled
from lqlora.errors import InvalidArgumentError, MixedArraysError, UnsupportedArrayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora._typing import Array, Namespace

__all__ = [
    "PASSED_OVER",
    "Library",
    "array_library",
    "device_of",
    "dtype_name",
    "is_contiguous",
    "is_on_host",
    "known_libraries",
    "load_overrides",
    "namespace",
    "register_library",
]

Memory = Literal["host", "device", "either"]


@dataclass(frozen=True)
class Library:
    """An array library with overrides.

    Parameters
    ----------
    name : str
        Name of the package. Overrides are registered under the same name.
    arrays : tuple of str
        Classes of its arrays, as ``module:Class``. They are looked up among the modules that are already imported.
    overrides : tuple of str
        Modules that register overrides, the preferred ones first. The first array of the library imports them.
    memory : {"host", "device", "either"}
        The memory that its arrays may be in.
    exact : bool
        True if overrides take no arrays of subclasses.
    """

    name: str
    arrays: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    memory: Memory = "either"
    exact: bool = False

    def classes(self) -> tuple[type, ...]:
        """Return the classes of the arrays; an empty tuple if the library is not imported."""
        # An array can only exist after its library was imported. So a library that is missing here has no arrays to ask
        # about, and dispatch does not have to import torch (a second or more) for a call on NumPy arrays.
        pairs = (place.partition(":")[::2] for place in self.arrays)
        return tuple(getattr(sys.modules[module], name) for module, name in pairs if module in sys.modules)

    def takes_class(self, cls: type) -> bool:
        """Return whether overrides take arrays of a class."""
        return cls in self.classes() if self.exact else issubclass(cls, self.classes())


#: NumPy's scalars count as arrays without dimensions, because NumPy's reductions return them. Overrides do not take
#: subclasses of torch's tensors: compilers trace with such classes, whose tensors have no memory.
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

#: Words that ``forced()`` accepts besides "reference", and the backends that each of them passes over.
PASSED_OVER: dict[str, frozenset[str]] = {"numpy": frozenset({"native"})}

#: Libraries whose modules of overrides are imported.
_loaded: set[str] = set()


def known_libraries() -> dict[str, Library]:
    """Return the libraries that overrides may be registered for, by name.

    Returns
    -------
    dict of str to Library
        A copy.
    """
    return dict(_LIBRARIES)


def load_overrides(name: str | None) -> None:
    """Import the modules with overrides for a library, unless that was done before.

    Parameters
    ----------
    name : str or None
        Name of the library. Nothing is imported for libraries that are not registered.

    Examples
    --------
    >>> load_overrides("numpy")
    """
    if name in _loaded or name not in _LIBRARIES:
        return
    for module in _LIBRARIES[name].overrides:
        importlib.import_module(module)
    _loaded.add(name)  # last: another thread that comes here meanwhile waits for the same imports


def register_library(library: Library) -> None:
    """Register a library, or replace its record.

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
            raise InvalidArgumentError(
                f"arrays must name classes as 'module:Class', such as 'array_api_strict:Array', got {place!r}."
            )
    _LIBRARIES[library.name] = library
    _loaded.discard(library.name)
    forget()


def forget() -> None:
    """Clear the cached answers after the registered libraries have changed."""
    for answers in (LIBRARY_OF, PLAIN_LIBRARY_OF, ENTRY_OF, _HOST_TESTS):
        answers.clear()


class _ByClass(dict[type, Any]):
    """Cache of answers by class: the first question computes the answer, later ones cost one look-up."""

    def __init__(self, answer: Callable[[type], Any]) -> None:
        self._answer = answer

    # No lock: two threads that ask first at once compute the same answer, and storing it is one atomic operation. The
    # classes of arrays are few, so the cache is not bounded.
    def __missing__(self, cls: type) -> Any:
        self[cls] = answer = self._answer(cls)
        return answer


def _class_library(cls: type) -> str | None:
    if class_fault(cls):
        return None
    for library in reversed(_LIBRARIES.values()):  # a library that builds on another one comes later
        if issubclass(cls, library.classes()):
            return library.name
    return "array-api" if hasattr(cls, "__array_namespace__") else None


def _plain_class_library(cls: type) -> str | None:
    name = LIBRARY_OF[cls]
    library = _LIBRARIES.get(name or "")
    return name if library is not None and library.takes_class(cls) else None


#: The library of a class; the second gives None for classes whose arrays overrides do not take.
LIBRARY_OF = _ByClass(_class_library)
PLAIN_LIBRARY_OF = _ByClass(_plain_class_library)


class _Entry(NamedTuple):
    """Namespace of a class of arrays, the index of its library in ``Dtypes.taken``, and the facts that are asked there."""

    xp: Namespace
    at: int
    facts: Callable[[Array], Any]


#: Entries of the classes that were given so far.
ENTRY_OF: dict[type, _Entry] = {}


def array_library(value: object) -> str | None:
    """Return the name of the library that an array belongs to, without importing that library.

    Parameters
    ----------
    value : object
        Any object.

    Returns
    -------
    str or None
        ``"numpy"``, ``"torch"``, ``"cupy"``, the name of a registered library, ``"array-api"`` for any other library
        that follows the standard, or None if ``value`` is not an array.

    Examples
    --------
    >>> import numpy as np
    >>> array_library(np.zeros(3)), array_library([0.0])
    ('numpy', None)
    """
    library: str | None = LIBRARY_OF[type(value)]
    return library


def namespace(*arrays: Array, dtypes: Dtypes = NUMBERS, what: str | None = None) -> Namespace:
    """Return the array API namespace that all the arrays share.

    Parameters
    ----------
    *arrays : array
        At least one array; None entries are passed over.
    dtypes : Dtypes
        The dtypes that the caller computes with.
    what : str, optional
        Name of the arrays, which errors begin with. By default that of the variable in the calling function.

    Returns
    -------
    module
        The namespace, wrapped by array-api-compat where the library itself does not follow the standard.

    Raises
    ------
    UnsupportedArrayError
        If a value is not an array, or is of a kind or dtype that the caller does not compute with.
    MixedArraysError
        If the arrays belong to two libraries, or to two devices.
    """
    taken = dtypes.taken
    # One array cannot be on two devices or of two libraries. This is the common case, and takes three look-ups.
    if len(arrays) == 1 and (entry := ENTRY_OF.get(type(arrays[0]))) is not None:
        xp, at, facts = entry
        if taken[at][facts(arrays[0])]:
            return xp
    first = home = None
    for array in arrays:
        if array is None:
            continue
        library = LIBRARY_OF[type(array)]
        if library is None:
            raise _refusal(array, None, dtypes, what)
        entry = ENTRY_OF.get(type(array)) or new_entry(array, library)
        if not taken[entry.at][entry.facts(array)]:
            _require_one_home(arrays)
            raise _refusal(array, library, dtypes, what)
        if first is None:
            first, home, xp = array, library, entry.xp
        elif library != home or not (home in _ONE_HOME or (home == "torch" and array.device == first.device)):
            _require_one_home(arrays)
    if first is None:
        raise UnsupportedArrayError("arrays must be NumPy, torch, CuPy or array API arrays, got none.")
    return xp


def new_entry(array: Array, library: str) -> _Entry:
    """Keep and return the entry of the class of an array.

    Parameters
    ----------
    array : array
        Array of any library.
    library : str
        Name of the library.

    Returns
    -------
    tuple
        Its namespace, and how its dtype is looked up.
    """
    entry = ENTRY_OF[type(array)] = _Entry(array_api_compat.array_namespace(array), *facts_of(library))
    return entry


def _refusal(value: object, library: str | None, dtypes: Dtypes, what: str | None) -> UnsupportedArrayError:
    """Return the error for an argument of :func:`namespace`, by default named as in the function that called it."""
    # The name is looked up in the frame of the caller, because this costs nothing until there is an error.
    caller = sys._getframe(2).f_locals  # noqa: SLF001 - this is how inspect does it
    name = what or next((key for key, own in caller.items() if own is value), "array")
    return UnsupportedArrayError(f"{name} {fault_of(value, library, dtypes)}")


#: Libraries whose arrays are all on one device.
_ONE_HOME = ("numpy",)


def _require_one_home(arrays: tuple[Array | None, ...]) -> None:
    """Raise unless the arrays are of one library and on one device."""
    present = [array for array in arrays if LIBRARY_OF[type(array)] is not None]
    homes = [LIBRARY_OF[type(array)] for array in present]
    library = homes[0]
    if homes.count(library) != len(homes):
        raise MixedArraysError(
            f"arrays must be of one library, got {' and '.join(sorted(set(homes)))}. Convert some of them."
        )
    if library == "array-api" and len({type(array) for array in present}) > 1:
        raise MixedArraysError("arrays must be of one library, got two array API libraries. Convert some of them.")
    if library in _ONE_HOME:
        return
    devices = [device_of(array) for array in present]
    if devices.count(devices[0]) != len(devices):
        named = " and ".join(sorted(set(map(str, devices))))
        raise MixedArraysError(
            f"arrays must be on one device, got {named}. Move some of them: lqlora never copies by itself."
        )


#: The key holds the class of the dtype too: dtypes of two libraries may have one hash, and comparing them may raise.
_dtype_names: dict[tuple[type, Any], str] = {}


def dtype_name(array: Array) -> str:
    """Return the name of an array's dtype, spelled the same for every library.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    str
        Name, such as ``"float32"``, ``"bfloat16"`` or ``"uint8"``.

    Raises
    ------
    UnsupportedArrayError
        If the value is not an array, or has another byte order than this machine.

    Examples
    --------
    >>> import numpy as np
    >>> dtype_name(np.zeros(1, dtype=np.float16))
    'float16'
    """
    try:
        dtype = array.dtype
    except AttributeError:
        raise _refusal(array, None, NUMBERS, None) from None
    key = type(dtype), dtype
    name = _dtype_names.get(key)
    if name is None:
        if not is_native(dtype):
            raise _refusal(array, "numpy", NUMBERS, None)
        name = _dtype_names[key] = spelled(dtype)
    return name


def device_of(array: Array) -> Any:
    """Return the device of an array, as an object of its library.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    object
        A value that the library's functions take as ``device``.

    Examples
    --------
    >>> import numpy as np
    >>> device_of(np.zeros(1))
    'cpu'
    """
    library = LIBRARY_OF[type(array)]
    if library == "numpy":
        return "cpu"
    return array.device if library == "torch" else array_api_compat.device(array)


def is_on_host(array: Array) -> bool:
    """Return whether the entries of an array are in the memory of the host.

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
    return bool(_HOST_TESTS[LIBRARY_OF[type(array)]](array))


def host_test(library: str | None) -> Callable[[Array], Any]:
    """Return a fast test of whether an array of one library is on the host, which runs for every argument."""
    known = _LIBRARIES.get(library or "")
    if library is None:
        return _refused
    if library == "torch":
        return attrgetter("is_cpu")
    if known is not None and known.memory != "either":
        return _always if known.memory == "host" else _never
    return _names_the_host


def _refused(value: object) -> Any:
    raise UnsupportedArrayError(f"array {fault_of(value, None, NUMBERS)}")


def _always(_: Array) -> bool:
    return True


def _never(_: Array) -> bool:
    return False


def _names_the_host(array: Array) -> bool:
    return "cpu" in str(array_api_compat.device(array)).lower()


class Layouts(NamedTuple):
    """A function that returns the layout of an array, and the layouts that are dense, row-major and aligned."""

    layout_of: Callable[[Array], Any]
    dense: frozenset[Any]


def layouts(library: str | None) -> Layouts:
    """Return the layout test of a library's arrays: functions in C, because it runs for every argument."""
    return _LAYOUTS.get(library, _BY_FLAG)


#: Bits of NumPy's ``flags.num``: C_CONTIGUOUS and ALIGNED, which dense arrays have; F_CONTIGUOUS, OWNDATA, WRITEABLE
#: and WRITEBACKIFCOPY, which may be set. All 16 sums are listed, so that the test is one look-up: the property
#: ``c_contiguous`` says nothing about alignment, and masking the bits would need a function in Python.
_DENSE, _OTHERS = 0x101, 0x2406


def _says_so(array: Array) -> bool:
    return bool(getattr(getattr(array, "flags", None), "c_contiguous", False))


_BY_FLAG = Layouts(_says_so, frozenset({True}))
_LAYOUTS: dict[str | None, Layouts] = {
    None: Layouts(_refused, frozenset()),
    "numpy": Layouts(
        attrgetter("flags.num"), frozenset(_DENSE | other for other in range(0x4000) if other & ~_OTHERS == 0)
    ),
    "torch": Layouts(methodcaller("is_contiguous"), frozenset({True})),
}


def is_contiguous(array: Array) -> bool:
    """Return whether an array is known to be dense and row-major, so that flattening it gives a view.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    bool
        False if the library has no such flag, or the memory is not aligned to the dtype.

    Examples
    --------
    >>> import numpy as np
    >>> is_contiguous(np.zeros((2, 3))), is_contiguous(np.zeros((2, 3)).T)
    (True, False)
    """
    known = _LAYOUTS.get(LIBRARY_OF[type(array)], _BY_FLAG)
    try:
        return known.layout_of(array) in known.dense
    except RuntimeError as error:  # a sparse tensor has no strides to ask about
        raise _refusal(array, LIBRARY_OF[type(array)], STORABLE, None) from error


class _ByLibrary(dict["str | None", Any]):
    """Cache of answers by library."""

    def __init__(self, answer: Callable[[str | None], Any]) -> None:
        self._answer = answer

    def __missing__(self, library: str | None) -> Any:
        self[library] = answer = self._answer(library)
        return answer


_HOST_TESTS = _ByLibrary(host_test)
