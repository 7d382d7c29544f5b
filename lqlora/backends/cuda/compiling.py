"""Machine code of kernels, by NVIDIA's run-time compiler and from a cache on disk.

CuPy's own ``RawModule`` would do, but for one option that CuPy adds to all others: ``-ftz=true``, under which numbers
below 2**-126 count as zero. The bytes of the reference cannot be had with it. So the compiler is called here, through
CuPy's bindings, and what it returns is loaded as CuPy loads its own kernels.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lqlora._files import write_whole
from lqlora.backends.cuda.kernel_text import OPTIONS, source
from lqlora.errors import CheckpointError, KernelError

__all__ = ["Binary"]


class Binary(NamedTuple):
    """A compiled kernel.

    Parameters
    ----------
    symbol : str
        What the compiler calls it.
    code : bytes
        What is loaded.
    """

    symbol: str
    code: bytes

    @classmethod
    def of(cls, module: str, kernel: str) -> Binary:
        """Compile a kernel for the current device, or read what was compiled before.

        Parameters
        ----------
        module : str
            File that has the kernel.
        kernel : str
            The instance of a template.

        Returns
        -------
        Binary
            The kernel.

        Raises
        ------
        KernelError
            If the compiler refuses the text, with what it says.
        """
        cupy = importlib.import_module("cupy")
        nvrtc = cupy.cuda.nvrtc
        options = (*OPTIONS, f"--gpu-architecture={_architecture(cupy)}")
        text = source(module)
        key = hashlib.sha256("\0".join((text, kernel, *options, repr(nvrtc.getVersion()))).encode()).hexdigest()[:32]
        kept = _folder() / f"lqlora-{key}.bin"
        with suppress(OSError):
            if (binary := cls.from_bytes(kept.read_bytes())) is not None:
                return binary
        binary = _compile(nvrtc, text, kernel, options)
        with suppress(OSError, CheckpointError):  # compiled again, where nothing can be kept
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, binary.to_bytes())
        return binary

    def to_bytes(self) -> bytes:
        """Return what is kept of a kernel: a hash, the symbol, and the code.

        Returns
        -------
        bytes
            Content of a file.
        """
        content = self.symbol.encode() + b"\0" + self.code
        return hashlib.sha256(content).digest() + content

    @classmethod
    def from_bytes(cls, stored: bytes) -> Binary | None:
        """Read what :meth:`to_bytes` returned.

        Parameters
        ----------
        stored : bytes
            Content of a file.

        Returns
        -------
        Binary or None
            None if that was damaged.
        """
        symbol, _, code = stored[32:].partition(b"\0")
        return cls(symbol.decode(), code) if hashlib.sha256(stored[32:]).digest() == stored[:32] else None


def _architecture(cupy: Any) -> str:
    """Return the architecture of the device, or the nearest one below that the compiler knows."""
    own = int(cupy.cuda.Device().compute_capability)
    known = [number for number in cupy.cuda.nvrtc.getSupportedArchs() if number <= own]
    return f"sm_{own}" if own in known else f"compute_{max(known)}"


def _folder() -> Path:
    """Return where CuPy keeps its kernels, too."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))  # noqa: PTH111 - never raises


def _compile(nvrtc: Any, text: str, kernel: str, options: tuple[str, ...]) -> Binary:
    program = nvrtc.createProgram(text, "lqlora.cu", (), ())
    try:
        nvrtc.addNameExpression(program, kernel)
        nvrtc.compileProgram(program, options)
        code = nvrtc.getCUBIN(program) if "=sm_" in options[-1] else nvrtc.getPTX(program)
        return Binary(nvrtc.getLoweredName(program, kernel), bytes(code))
    except nvrtc.NVRTCError as error:
        raise KernelError(f"{kernel} was not compiled ({error}): {nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
