"""What the kernels need of an array library: views of its memory as CuPy arrays, results, and the stream to run on."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import TYPE_CHECKING, Any, Protocol

from lqlora._optional import is_installed

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lqlora._typing import Array

__all__ = ["CuPyMemory", "Memory", "TorchMemory", "device_kernels_run"]


@functools.cache
def device_kernels_run() -> bool:
    """Tell whether CuPy is installed and finds a CUDA device; without a driver it can be imported all the same.

    Returns
    -------
    bool
        Found out once.
    """
    return is_installed("cupy") and bool(importlib.import_module("cupy").cuda.is_available())


class Memory(Protocol):
    """Where the arrays of one library are."""

    @property
    def library(self) -> str:
        """Name of the library, as the dispatcher knows it."""

    def holds(self, array: Array) -> bool:
        """Tell whether an array is a plain one of this library on a CUDA device, its entries in row-major order."""

    def device(self, array: Array) -> int:
        """Return the number of the CUDA device that an array is on."""

    def scope(self, array: Array) -> AbstractContextManager[Any]:
        """Return what makes an array's device, and the library's stream on it, the current ones of CuPy."""

    def view(self, array: Array) -> Any:
        """Return the memory of an array as a CuPy array; its dtype may be another of the same size."""

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array of so many entries on the device of another one."""


class CuPyMemory:
    """CuPy's own arrays, on CuPy's current stream."""

    library = "cupy"

    def holds(self, array: Array) -> bool:
        """Tell whether an array is a CuPy array with its entries in row-major order."""
        cupy = importlib.import_module("cupy")
        return device_kernels_run() and isinstance(array, cupy.ndarray) and bool(array.flags.c_contiguous)

    def device(self, array: Array) -> int:
        """Return the number of the device."""
        return int(array.device.id)

    def scope(self, array: Array) -> AbstractContextManager[Any]:
        """Return the device."""
        device: AbstractContextManager[Any] = array.device
        return device

    def view(self, array: Array) -> Any:
        """Return the array itself."""
        return array

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array from CuPy's allocator."""
        with like.device:
            return importlib.import_module("cupy").empty((count,), dtype=dtype)


class TorchMemory:
    """Torch tensors on a CUDA device, on torch's current stream. Nothing is copied."""

    library = "torch"

    def holds(self, array: Array) -> bool:
        """Tell whether a value is a plain tensor on a CUDA device; not one that a compiler traces with."""
        torch = importlib.import_module("torch")
        plain = type(array) in (torch.Tensor, torch.nn.Parameter) and self._is_on_device(array)
        return plain and array.is_contiguous() and device_kernels_run()

    @staticmethod
    def _is_on_device(tensor: Any) -> bool:
        return bool(tensor.is_cuda)

    def device(self, array: Array) -> int:
        """Return the number of the device."""
        return int(array.get_device())

    @contextlib.contextmanager
    def scope(self, array: Array) -> Any:
        """Make the tensor's device and torch's current stream on it those of CuPy."""
        cupy, torch = importlib.import_module("cupy"), importlib.import_module("torch")
        stream = torch.cuda.current_stream(array.device).cuda_stream
        with cupy.cuda.Device(self.device(array)), cupy.cuda.ExternalStream(stream):
            yield

    def view(self, array: Array) -> Any:
        """Return a CuPy array of the same memory; CuPy is told that bfloat16 is int16."""
        torch = importlib.import_module("torch")
        tensor = array.detach()
        tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return importlib.import_module("cupy").from_dlpack(tensor)

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return a tensor from torch's allocator."""
        torch = importlib.import_module("torch")
        return torch.empty((count,), dtype=getattr(torch, dtype), device=like.device)
