"""Loading of the compiled kernels: the library, a check against its sources, and its instruction sets."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqlora._threads import num_threads
from lqlora.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["WORTH_THREADS", "function", "instruction_sets", "kernel", "loaded", "status", "using"]

_FOLDER = Path(__file__).parent / "kernels"

#: C types of parameters by their letters in :func:`kernel`: pointer, int32, int64 and double.
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "d": ctypes.c_double}

#: Entries below which a kernel always runs on one thread: twice ``kWorthAThread`` of ``ranges.h``. Below it the number
#: of threads is not looked up, because that takes longer than a small kernel.
WORTH_THREADS = 1 << 18


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason why it cannot be used."""
    path = _FOLDER / "kernels.shared"
    if not path.exists():
        return None, "not compiled: there was no C++ compiler when lqlora was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"cannot be loaded: {error}"
    # A library of other sources may have other parameters, and ctypes cannot see that: a call would read wrong memory.
    library.lqlora_sources.restype = ctypes.c_char_p
    if library.lqlora_sources().decode() != _digest():
        return None, "compiled from other sources: install lqlora again"
    library.lqlora_isa_name.restype = library.lqlora_isa_chosen.restype = ctypes.c_char_p
    return library, ""


def _digest() -> str:
    """Return the hash of the sources, as ``hatch_build.py`` computes it and compiles it into the library."""
    sources = sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")], key=lambda path: path.name)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def loaded() -> ctypes.CDLL | None:
    """Return the library.

    Returns
    -------
    ctypes.CDLL or None
        None if it cannot be used; :func:`status` says why.

    Examples
    --------
    >>> (loaded() is not None) == status()[0]
    True
    """
    return _load()[0]


def kernel(name: str, parameters: str) -> Callable[..., None]:
    """Return a function that calls an exported function of the library.

    Parameters
    ----------
    name : str
        The function ``lqlora_NAME``. Its last parameter is the number of threads.
    parameters : str
        One letter for each other parameter: ``p`` for a pointer, passed as an array or None; ``i`` and ``l`` for
        integers of 32 and 64 bits; ``d`` for a double.

    Returns
    -------
    callable
        Takes the number of entries, by which the work is divided among threads, and the arguments. Arrays must be
        contiguous, of the dtypes that C reads, and long enough: nothing is checked here.

    Raises
    ------
    AttributeError
        If the library has no such function.

    Examples
    --------
    >>> import numpy as np
    >>> if loaded() is not None:
    ...     packed = np.empty(1, dtype=np.uint8)
    ...     kernel("pack", "pilp")(2, np.array([1, 2], dtype=np.uint8), 4, 2, packed)
    ...     assert packed.tolist() == [33]
    """
    if loaded() is None:
        return _refuse
    run = function(name, parameters)
    pointers = tuple(index for index, letter in enumerate(parameters) if letter == "p")

    def call(entries: int, *arguments: Any) -> None:
        """Run the kernel on addresses and numbers."""
        given = list(arguments)
        for index in pointers:
            if (array := arguments[index]) is not None:
                # An integer keeps nothing alive: `arguments` holds the arrays until the function has returned.
                given[index] = array.__array_interface__["data"][0]
        # ctypes releases the interpreter lock here. Kernels keep no state but the chosen instruction set, so several
        # threads may call them at once.
        run(*given, 1 if entries < WORTH_THREADS else num_threads())

    return call


def function(name: str, parameters: str) -> Callable[..., None]:
    """Return an exported function of the library, which takes addresses.

    Parameters
    ----------
    name : str
        The function ``lqlora_NAME``.
    parameters : str
        Letters of its parameters, as for :func:`kernel`, without the number of threads.

    Returns
    -------
    callable
        The function. Its last argument is the number of threads.

    Raises
    ------
    MissingDependencyError
        If the library cannot be used.
    AttributeError
        If the library has no such function.
    """
    library = loaded()
    if library is None:
        _refuse()
    found: Callable[..., None] = getattr(library, f"lqlora_{name}")
    found.argtypes, found.restype = (*(_TYPES[letter] for letter in parameters), ctypes.c_int32), None  # type: ignore[attr-defined]
    return found


def _refuse(*_: object) -> None:
    raise MissingDependencyError(f"compiled kernels cannot run: {_load()[1]}.")


def status() -> tuple[bool, str]:
    """Return whether the compiled kernels can be used, and the reason.

    Returns
    -------
    tuple of bool and str
        True, the instruction set and the number of threads; or False and what is missing.

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
    """Return the instruction sets that the kernels were compiled for and this machine has, the best one last.

    Returns
    -------
    list of str
        Some of ``baseline``, ``avx2`` and ``avx512``; empty if the kernels cannot be used.

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
        One of those that :func:`instruction_sets` returns.

    Yields
    ------
    None
        The earlier choice is restored at the end.

    Raises
    ------
    InvalidArgumentError
        If the machine or the library does not have the instruction set.

    Examples
    --------
    >>> for name in instruction_sets():
    ...     with using(name):
    ...         assert name in status()[1]
    """
    library = loaded()
    known = instruction_sets()
    if library is None or instruction_set not in known:
        raise InvalidArgumentError(
            f"instruction_set must be one of {', '.join(known) or 'none'}, got {instruction_set!r}."
        )
    before = library.lqlora_isa_chosen()
    library.lqlora_isa_choose(instruction_set.encode())
    try:
        yield
    finally:
        library.lqlora_isa_choose(before)
