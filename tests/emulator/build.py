"""Compilation of CUDA C++ kernels for the host: unchanged text, between a header and exports of the emulator."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["VARIABLE", "EmulationError", "Kernel", "Range", "build", "is_available"]

#: Environment variable that chooses another kind of emulation for a process: ``addresses`` uses AddressSanitizer, and
#: ``portable`` the fibers of the C library.
VARIABLE = "LQLORA_EMULATOR"

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-w")

#: ThreadSanitizer's instrumentation turns every memory access into a call, which the emulator answers instead of its
#: library. AddressSanitizer checks for accesses beyond arrays only.
_ACCESSES = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
_ADDRESSES = ("-fsanitize=address", "-DEMULATED_ADDRESSES")

#: The runtime has one set of fibers, so one launch runs at a time; ctypes releases the interpreter lock meanwhile.
_ONE_AT_A_TIME = threading.Lock()

_BOUNDS = re.compile(r"__launch_bounds__\((\d+)[^)]*\)\s+(\w+)\(")


class EmulationError(RuntimeError):
    """A fault of a kernel, such as a race or an access out of bounds, or an error of the compiler."""


class Range(NamedTuple):
    """Memory of an array: the address of its first byte, and the address after its last byte."""

    begin: int
    end: int


def is_available() -> bool:
    """Return whether a compiler is installed."""
    return shutil.which("g++") is not None


class Kernel:
    """One kernel of a library.

    ``parameters`` has two letters for each parameter. The first is the kind: ``p`` for pointers, ``i`` for integers and
    ``f`` for floats. The second is the size in bytes of the number, or of the entries that the pointer points to.
    """

    def __init__(self, library: ctypes.CDLL, number: int, name: str, most_threads: int) -> None:
        self.name, self.most_threads = name, most_threads
        buffer = ctypes.create_string_buffer(256)
        getattr(library, f"emulated_signature_{number}")(buffer)
        words = buffer.value.decode()
        self.parameters = [words[i : i + 2] for i in range(0, len(words), 2)]
        self._launch = getattr(library, f"emulated_launch_{number}")
        self._launch.restype = ctypes.c_char_p

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: list[bytes],
        arrays: list[Range],
        schedule: int = 0,
    ) -> None:
        """Run all threads to the end. ``arguments`` has the bytes of each parameter, ``arrays`` the memory to allow."""
        sizes = (ctypes.c_uint * 6)(*((*grid, 1, 1, 1))[:3], *((*block, 1, 1, 1))[:3])
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in arguments]
        addresses = (ctypes.c_void_p * len(buffers))(*[ctypes.addressof(buffer) for buffer in buffers])
        ranges = (ctypes.c_void_p * (2 * len(arrays)))(*[end for bounds in arrays for end in bounds])
        with _ONE_AT_A_TIME:
            error = self._launch(sizes, ctypes.c_uint(schedule), addresses, ranges, len(arrays))
        if error:
            raise EmulationError(f"{self.name}: {error.decode()}")


@functools.cache
def build(text: str, expressions: tuple[str, ...]) -> dict[str, Kernel]:
    """Return kernels by name, compiled now or read from the cache of libraries with the same text."""
    exports = "".join(f"\nEMULATED_EXPORT({number}, {name})" for number, name in enumerate(expressions))
    whole = f'#include "device.h"\n{text}\n{exports}\n'
    mode = os.environ.get(VARIABLE)
    runtime = (_HERE / "runtime.cpp").read_text(encoding="utf-8")
    fibers = ("-DEMULATED_UCONTEXT",) if mode == "portable" else ()
    # Global: the library of the kernels, which is loaded next, finds the functions of the runtime by name.
    ctypes.CDLL(str(_library(runtime, "-O2", *fibers)), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(_library(whole, *(_ADDRESSES if mode == "addresses" else _ACCESSES))))
    bounds = {name: int(threads) for threads, name in _BOUNDS.findall(text)}
    return {
        name: Kernel(loaded, number, name, bounds.get(name.partition("<")[0], 1024))
        for number, name in enumerate(expressions)
    }


def _library(text: str, *flags: str) -> Path:
    """Compile a text to a library. It is linked without ThreadSanitizer's library, which the runtime replaces."""
    header = (_HERE / "device.h").read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join((text, header, *_FLAGS, *flags)).encode()).hexdigest()[:20]
    linked = ["-fsanitize=address"] if "-fsanitize=address" in flags else []

    def make(library: Path) -> None:
        compiled = library.with_suffix(".o")
        _run(["g++", *_FLAGS, *flags, "-x", "c++", f"-I{_HERE}", "-c", "-", "-o", str(compiled)], text)
        _run(["g++", "-shared", *linked, str(compiled), "-o", str(library)])
        compiled.unlink()

    return _stored(f"{key}.so", make)


def _run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise EmulationError(done.stderr)


def _stored(name: str, make: Callable[[Path], None]) -> Path:
    """Return a file of the cache. It is made under another name and moved, because tests run in several processes."""
    folder = Path(tempfile.gettempdir()) / f"lqlora-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    if not path.exists():
        unfinished = folder / f"{os.getpid()}-{name}"
        make(unfinished)
        unfinished.replace(path)
    return path
