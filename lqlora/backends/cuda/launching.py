"""Compiling kernels when they are first needed, and running them."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora.backends.cuda.compiling import Binary

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["capability", "launch", "table"]

#: Tables on devices, by what they hold.
_tables: dict[tuple[Any, ...], Any] = {}
_MOST_TABLES = 1024

#: Thread blocks of one launch; threads go on with what is beyond them.
MOST_BLOCKS = 1 << 16


def launch(
    device: int, stream: Any, module: str, kernel: str, threads: int, work: int, arguments: tuple[Any, ...]
) -> None:
    """Run a kernel.

    Parameters
    ----------
    device : int
        Where the arguments are.
    stream : cupy.cuda.Stream or None
        The stream to run on; None for the current one of CuPy.
    module : str
        File that has the kernel.
    kernel : str
        The instance of a template, such as ``"decode<4, float>"``.
    threads : int
        Threads of a block.
    work : int
        How many threads would have one piece of work each.
    arguments : tuple
        CuPy arrays, addresses as Python integers, and numbers, which must be ``np.int32``, ``np.int64``,
        ``np.float32`` or ``np.float64``, as the kernel has them.
    """
    cupy = importlib.import_module("cupy")
    grid = (min(-(-work // threads), MOST_BLOCKS),)
    if cupy.cuda.runtime.getDevice() == device:
        _loaded(cupy, device, module, kernel)(grid, (threads,), arguments, stream=stream)
        return
    with cupy.cuda.Device(device):
        _loaded(cupy, device, module, kernel)(grid, (threads,), arguments, stream=stream)


@functools.cache
def _loaded(cupy: Any, device: int, module: str, kernel: str) -> Any:  # noqa: ARG001 - code is loaded on one device
    binary = Binary.of(module, kernel)
    loaded = cupy.cuda.Module()
    loaded.load(binary.code)
    return loaded.get_function(binary.symbol)


def capability(device: int) -> int:
    """Return what a device can do, as CUDA counts it.

    Parameters
    ----------
    device : int
        Its number.

    Returns
    -------
    int
        Such as 80 for the Ampere generation.
    """
    return _capability(importlib.import_module("cupy"), device)


@functools.cache
def _capability(cupy: Any, device: int) -> int:
    return int(cupy.cuda.Device(device).compute_capability)


def table(device: int, values: npt.NDArray[np.float32], length: int, beyond: float) -> Any:
    """Return a small table of the host on the device, where it stays.

    Parameters
    ----------
    device : int
        Where to.
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
    cupy = importlib.import_module("cupy")
    key = cupy, device, values.tobytes(), length, beyond
    kept = _tables.get(key)
    if kept is None:
        kept = _copied(cupy, device, values, length, beyond)
        if len(_tables) >= _MOST_TABLES:  # kernels on any stream may still look at some of them
            _synchronize(cupy, {other_device for _, other_device, *_ in list(_tables)})
            _tables.clear()
        _tables[key] = kept
    return kept


def _copied(cupy: Any, device: int, values: npt.NDArray[np.float32], length: int, beyond: float) -> Any:
    padded = np.full(length, beyond, dtype=np.float32)
    padded[: len(values)] = values
    with cupy.cuda.Device(device):
        copied = cupy.asarray(padded)
        cupy.cuda.get_current_stream().synchronize()  # later calls may run on other streams
    return copied


def _synchronize(cupy: Any, devices: set[int]) -> None:
    for device in devices:
        cupy.cuda.Device(device).synchronize()
