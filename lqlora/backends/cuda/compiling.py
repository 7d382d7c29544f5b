"""Compilation of CUDA kernels by NVIDIA's run-time compiler (NVRTC), with a cache on disk.

CuPy's ``RawModule`` adds ``-ftz=true`` to all options, which flushes numbers below 2**-126 to zero. With it kernels
would not return the bytes of the reference. So this module calls the compiler through CuPy's bindings, and loads the
code as CuPy loads its own kernels.

The code runs on the device of the user, so files are read and written only where nobody else can write.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lqlora.backends.cuda.kernel_text import OPTIONS, source
from lqlora.backends.cuda.private_files import read_private, write_private
from lqlora.errors import KernelError

__all__ = ["Binary"]


class Binary(NamedTuple):
    """A compiled kernel: its code, and the name of its entry point.

    Parameters
    ----------
    symbol : str
        Name of the kernel in the code.
    code : bytes
        Machine code, or PTX.
    """

    symbol: str
    code: bytes

    @classmethod
    def of(cls, module: str, kernel: str) -> Binary:
        """Return a kernel for the current device, compiled now or read from the cache.

        Parameters
        ----------
        module : str
            Name of the file with the kernel.
        kernel : str
            Template instance, such as ``"decode<4, float>"``.

        Returns
        -------
        Binary
            Compiled kernel.

        Raises
        ------
        KernelError
            If the compiler refuses the text. The error has its log.
        """
        cupy = importlib.import_module("cupy")
        nvrtc = cupy.cuda.nvrtc
        options = (*OPTIONS, f"--gpu-architecture={_architecture(cupy)}")
        text = source(module)
        key = hashlib.sha256("\0".join((text, kernel, *options, repr(nvrtc.getVersion()))).encode()).hexdigest()[:32]
        kept = _folder() / f"{key}.bin"
        # The hash in a file finds damage and no forgery. Who could write the file is what makes it safe to run.
        stored = read_private(kept)
        if stored is not None and (binary := cls.from_bytes(stored)) is not None:
            return binary
        binary = _compile(nvrtc, text, kernel, options)
        with suppress(OSError):  # without a folder that only this user can write, kernels are compiled again
            write_private(kept, binary.to_bytes())
        return binary

    def to_bytes(self) -> bytes:
        """Return the content of a cache file: a hash, the symbol, and the code.

        Returns
        -------
        bytes
            Content of a file.
        """
        content = self.symbol.encode() + b"\0" + self.code
        return hashlib.sha256(content).digest() + content

    @classmethod
    def from_bytes(cls, stored: bytes) -> Binary | None:
        """Return the kernel in the content of a cache file.

        Parameters
        ----------
        stored : bytes
            Content of a file.

        Returns
        -------
        Binary or None
            None if the content does not have its hash.
        """
        symbol, _, code = stored[32:].partition(b"\0")
        return cls(symbol.decode(), code) if hashlib.sha256(stored[32:]).digest() == stored[:32] else None


def _architecture(cupy: Any) -> str:
    """Return the architecture of the device, or the nearest one below that the compiler knows."""
    own = int(cupy.cuda.Device().compute_capability)
    known = [number for number in cupy.cuda.nvrtc.getSupportedArchs() if number <= own]
    return f"sm_{own}" if own in known else f"compute_{max(known)}"


def _folder() -> Path:
    """Return a folder in CuPy's own cache of kernels. That one may be writable by others, who could not write here."""
    cache = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")  # noqa: PTH111 - never raises
    return Path(cache) / "lqlora"


def _compile(nvrtc: Any, text: str, kernel: str, options: tuple[str, ...]) -> Binary:
    program = nvrtc.createProgram(text, "lqlora.cu", (), ())
    try:
        nvrtc.addNameExpression(program, kernel)
        nvrtc.compileProgram(program, options)
        code = nvrtc.getCUBIN(program) if "=sm_" in options[-1] else nvrtc.getPTX(program)
        return Binary(nvrtc.getLoweredName(program, kernel), bytes(code))
    except nvrtc.NVRTCError as error:
        raise KernelError(f"kernel {kernel} was not compiled ({error}): {nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
