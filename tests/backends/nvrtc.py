"""NVIDIA's run-time compiler without a device or driver: it returns PTX, and the registers of each kernel."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Compiled", "Usage", "compile_for", "is_available"]


class Usage(NamedTuple):
    """Registers, spilled bytes and stack bytes of a kernel, as ptxas reports them."""

    registers: int
    spilled: int
    stack: int


class Compiled(NamedTuple):
    """A module for one architecture."""

    ptx: str
    usage: dict[str, Usage]


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder, "lib").glob("libnvrtc.so.*"))
    return ctypes.CDLL(str(found[0])) if found else None


def is_available() -> bool:
    """Return whether the package of the compiler is installed."""
    return _library() is not None


def compile_for(architecture: int, source: str, options: tuple[str, ...], expressions: list[str]) -> Compiled:
    """Return the named instances of templates, compiled. Raise an AssertionError with the log if that fails."""
    library = _library()
    assert library is not None
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        for expression in expressions:
            _check(library, library.nvrtcAddNameExpression(program, expression.encode()))
        words = [*options, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
        given = (ctypes.c_char_p * len(words))(*[word.encode() for word in words])
        failed = library.nvrtcCompileProgram(program, len(words), given)
        log = _text(library, "ProgramLog", program)
        assert not failed, log
        names = {_lowered(library, program, expression): expression for expression in expressions}
        return Compiled(_text(library, "PTX", program), _usage(log, names))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check(library: ctypes.CDLL, result: int) -> None:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    assert result == 0, library.nvrtcGetErrorString(result)


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode()


def _lowered(library: ctypes.CDLL, program: ctypes.c_void_p, expression: str) -> str:
    name = ctypes.c_char_p()
    _check(library, library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)))
    assert name.value is not None
    return name.value.decode()


_FUNCTION = re.compile(
    r"Function properties for (\w+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


def _usage(log: str, names: dict[str, str]) -> dict[str, Usage]:
    """Return the usage of each kernel from the log of ptxas, which has a paragraph for each."""
    return {
        names[name]: Usage(int(registers), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, registers in _FUNCTION.findall(log)
    }
