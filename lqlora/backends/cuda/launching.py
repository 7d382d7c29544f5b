"""Launches of CUDA kernels, which are compiled and loaded at first use, and a cache of tables on devices."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora.backends.cuda.compiling import Binary

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["capability", "launch", "table"]

#: Tables on devices, by device and contents.
_tables: dict[tuple[Any, ...], Any] = {}
_MOST_TABLES = 1024

#: Largest number of thread blocks in a launch. Kernels step by the size of the grid (grid-stride loops), so that a
#: smaller grid does the same work. This bounds the atomic additions and the tables that blocks copy to shared memory.
MOST_BLOCKS = 1 << 16


def launch(
    device: int, stream: Any, module: str, kernel: str, threads: int, work: int, arguments: tuple[Any, ...]
) -> None:
    """Run a kernel on a device; compile and load it first if this is its first launch there.

    Parameters
    ----------
    device : int
        Number of the device that holds the arguments.
    stream : cupy.cuda.Stream or None
        Stream to run on; None for CuPy's current one.
    module : str
        Name of the file with the kernel.
    kernel : str
        Template instance, such as ``"decode<4, float>"``.
    threads : int
        Threads of a block.
    work : int
        Number of pieces of work, one for each thread of a large enough grid.
    arguments : tuple
        CuPy arrays, addresses as Python integers, and numbers. A number is a ``np.int32``, ``np.int64``, ``np.float32``
        or ``np.float64``, as the parameter of the kernel is.
    """
    cupy = importlib.import_module("cupy")
    grid = (min(-(-work // threads), MOST_BLOCKS),)
    if cupy.cuda.runtime.getDevice() == device:
        _loaded(cupy, device, module, kernel)(grid, (threads,), arguments, stream=stream)
        return
    with cupy.cuda.Device(device):
        _loaded(cupy, device, module, kernel)(grid, (threads,), arguments, stream=stream)


@functools.cache
def _loaded(cupy: Any, device: int, module: str, kernel: str) -> Any:  # noqa: ARG001 - the key: code is loaded on one device
    # `cupy` is part of the key too: tests replace the module, and a kernel of one module cannot run in another.
    binary = Binary.of(module, kernel)
    loaded = cupy.cuda.Module()
    loaded.load(binary.code)
    return loaded.get_function(binary.symbol)


def capability(device: int) -> int:
    """Return the compute capability of a device.

    Parameters
    ----------
    device : int
        Number of the device.

    Returns
    -------
    int
        Ten times the capability, such as 80 for the Ampere generation.
    """
    return _capability(importlib.import_module("cupy"), device)


@functools.cache
def _capability(cupy: Any, device: int) -> int:
    return int(cupy.cuda.Device(device).compute_capability)


def table(device: int, values: npt.NDArray[np.float32], length: int, beyond: float) -> Any:
    """Return a copy of a small table on a device, from a cache.

    Parameters
    ----------
    device : int
        Number of the device.
    values : ndarray of float32
        Levels or boundaries.
    length : int
        Entries that a kernel may read.
    beyond : float
        Value of the entries beyond those of ``values``.

    Returns
    -------
    cupy.ndarray
        The table, which must not be written to.
    """
    cupy = importlib.import_module("cupy")
    key = cupy, device, values.tobytes(), length, beyond
    kept = _tables.get(key)
    if kept is None:
        kept = _copied(cupy, device, values, length, beyond)
        if len(_tables) >= _MOST_TABLES:  # kernels on any stream may still read some of them
            _synchronize(cupy, {other_device for _, other_device, *_ in list(_tables)})
            _tables.clear()
        _tables[key] = kept
    return kept


def _copied(cupy: Any, device: int, values: npt.NDArray[np.float32], length: int, beyond: float) -> Any:
    # Kernels read all entries of a table, whose length follows from the number of bits. Infinite boundaries are above
    # every value, and levels beyond a short codebook are NaN.
    padded = np.full(length, beyond, dtype=np.float32)
    padded[: len(values)] = values
    with cupy.cuda.Device(device):
        copied = cupy.asarray(padded)
        cupy.cuda.get_current_stream().synchronize()  # later calls may run on other streams
    return copied


def _synchronize(cupy: Any, devices: set[int]) -> None:
    for device in devices:
        cupy.cuda.Device(device).synchronize()
