"""Compiling kernels when they are first needed, and running them."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora.backends.cupy.source import OPTIONS, source

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["launch", "table"]

#: Thread blocks of one launch; threads go on with what is beyond them.
MOST_BLOCKS = 1 << 16


def launch(device: int, module: str, kernel: str, threads: int, work: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel on the current stream.

    Parameters
    ----------
    device : int
        The current device.
    module : str
        File that has the kernel.
    kernel : str
        The instance of a template, such as ``"decode<4, float>"``.
    threads : int
        Threads of a block.
    work : int
        How many threads would have one piece of work each.
    arguments : tuple
        CuPy arrays and Python integers. The integers must be ``np.int32`` or ``np.int64``, as the kernel has them.
    """
    blocks = min(-(-work // threads), MOST_BLOCKS)
    _compiled(importlib.import_module("cupy"), device, module, kernel)((blocks,), (threads,), arguments)


@functools.cache
def _compiled(cupy: Any, device: int, module: str, kernel: str) -> Any:  # noqa: ARG001 - code is loaded on one device
    code = cupy.RawModule(code=source(module), options=OPTIONS, name_expressions=(kernel,))
    return code.get_function(kernel)


def table(device: int, values: npt.NDArray[np.float32], length: int, beyond: float) -> Any:
    """Return a small table of the host on the device, where it stays.

    Parameters
    ----------
    device : int
        The current device.
    values : ndarray of float32
        Levels or boundaries.
    length : int
        Entries that a kernel may look at.
    beyond : float
        What is in those that ``values`` does not have.

    Returns
    -------
    cupy.ndarray
        Not to be written to.
    """
    return _on_device(importlib.import_module("cupy"), device, values.tobytes(), length, beyond)


@functools.lru_cache(maxsize=256)
def _on_device(cupy: Any, device: int, values: bytes, length: int, beyond: float) -> Any:  # noqa: ARG001
    padded = np.full(length, beyond, dtype=np.float32)
    known = np.frombuffer(values, dtype=np.float32)
    padded[: len(known)] = known
    copied = cupy.asarray(padded)
    cupy.cuda.get_current_stream().synchronize()  # later calls may run on other streams
    return copied
