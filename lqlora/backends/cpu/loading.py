"""Finding the compiled library, and making sure that it is the one of these sources."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lqlora._threads import num_threads
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["instruction_sets", "loaded", "status", "using"]

_FOLDER = Path(__file__).parent / "kernels"

_POINTER, _INT, _LONG, _REAL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double

#: Parameters of what ``library.cpp`` exports, but for the number of threads, which is the last one of all.
_FUNCTIONS = {
    "absmax": (_POINTER, _INT, _LONG, _LONG, _POINTER),
    "extremes": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER),
    "encode": (*(_POINTER, _INT, _LONG, _LONG), *(_POINTER, _POINTER), *(_POINTER, _INT, _INT), *(_POINTER, _POINTER)),
    "encode_by_absmax": (*(_POINTER, _INT, _LONG, _LONG), _POINTER, *(_POINTER, _INT, _INT), _POINTER),
    "cross": (_POINTER, _POINTER, *(_LONG, _LONG, _LONG, _LONG), _INT),
    "decode": (*(_POINTER, _POINTER, _POINTER), *(_POINTER, _INT, _INT), *(_LONG, _LONG), *(_POINTER, _INT)),
    "pack": (_POINTER, _INT, _LONG, _POINTER),
    "unpack": (_POINTER, _INT, _LONG, _POINTER),
    "level_maxima": (*(_POINTER, _POINTER, _POINTER, _POINTER), *(_LONG, _LONG), _POINTER),
    "level_sums": (
        *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_LONG, _LONG, _LONG, _LONG),
        *(_REAL, _REAL, _POINTER, _POINTER),
    ),
    "multiply": (
        *(_POINTER, _LONG, _LONG, _LONG),
        *(_POINTER, _POINTER, _POINTER),
        *(_POINTER, _INT, _INT, _LONG),
        _POINTER,
    ),
    "row_sums": (_POINTER, _INT, _LONG, _LONG, _POINTER),
    "rounding_errors": (
        *(_POINTER, _INT, _POINTER, _INT, _LONG, _LONG),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _INT),
        _POINTER,
    ),
    "search": (
        *(_POINTER, _POINTER, _LONG, _LONG, _POINTER),
        *(_POINTER, _POINTER, _INT, _POINTER, _INT, _INT),
        _POINTER,
    ),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, and what there is to say of it."""
    path = _FOLDER / "kernels.shared"
    if not path.exists():
        return None, "not compiled: there was no C++ compiler when lqlora was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"cannot be loaded: {error}"
    library.lqlora_sources.restype = ctypes.c_char_p
    if library.lqlora_sources().decode() != _digest():
        return None, "compiled from other sources than these: install lqlora again"
    for name, parameters in _FUNCTIONS.items():
        function = getattr(library, f"lqlora_{name}")
        function.argtypes, function.restype = (*parameters, _INT), None
    library.lqlora_isa_name.restype = library.lqlora_isa_chosen.restype = ctypes.c_char_p
    return library, ""


def _digest() -> str:
    """Return the hash that the build wrote into the library; ``hatch_build.py`` has the same."""
    sources = sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")], key=lambda path: path.name)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def loaded() -> ctypes.CDLL | None:
    """Return the library.

    Returns
    -------
    ctypes.CDLL or None
        None where it cannot be used; :func:`status` says why.

    Examples
    --------
    >>> (loaded() is not None) == status()[0]
    True
    """
    return _load()[0]


def status() -> tuple[bool, str]:
    """Tell whether the compiled kernels can be used, and which.

    Returns
    -------
    tuple of bool and str
        Whether; and the instruction set and the number of threads, or what is wrong.

    Examples
    --------
    >>> usable, reason = status()
    >>> usable == reason.startswith("compiled for")
    True
    """
    library, fault = _load()
    if library is None:
        return False, fault
    return True, f"compiled for {library.lqlora_isa_chosen().decode()}, at most {num_threads()} thread(s)"


def instruction_sets() -> list[str]:
    """List the instruction sets that the kernels were compiled for and this machine has, the best one last.

    Returns
    -------
    list of str
        Of ``baseline``, ``avx2`` and ``avx512``; empty where there are no compiled kernels.

    Examples
    --------
    >>> "baseline" in instruction_sets() or instruction_sets() == []
    True
    """
    library = loaded()
    if library is None:
        return []
    return [library.lqlora_isa_name(index).decode() for index in range(library.lqlora_isa_count())]


@contextlib.contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Run the kernels of one instruction set inside the ``with`` block, in all threads of the process.

    Parameters
    ----------
    instruction_set : str
        One of :func:`instruction_sets`.

    Yields
    ------
    None
        The choice before is restored at the end.

    Raises
    ------
    InvalidArgumentError
        If there is no such one here.

    Examples
    --------
    >>> for name in instruction_sets():
    ...     with using(name):
    ...         assert name in status()[1]
    """
    library = loaded()
    known = instruction_sets()
    if library is None or instruction_set not in known:
        raise InvalidArgumentError(f"There are kernels for {', '.join(known) or 'nothing'}, not {instruction_set!r}.")
    before = library.lqlora_isa_chosen()
    library.lqlora_isa_choose(instruction_set.encode())
    try:
        yield
    finally:
        library.lqlora_isa_choose(before)
