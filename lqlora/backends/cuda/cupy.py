"""Registration of the CUDA kernels for CuPy arrays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lqlora._dispatch import prefer_pieces
from lqlora.backends.cuda.registration import kernels_run, register

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__: list[str] = []


class CuPyMemory:
    """CuPy arrays, on CuPy's current stream."""

    library = "cupy"

    def device(self, array: Array) -> int:
        """Return the number of the device."""
        return int(array.data.device_id)

    def stream(self, device: int) -> None:
        """Return None, which stands for CuPy's current stream."""

    def address(self, array: Array) -> int:
        """Return the address of the first entry of an array."""
        return int(array.data.ptr)

    def view(self, array: Array) -> Any:
        """Return the array itself."""
        return array

    def is_tracked(self, array: Array) -> bool:  # noqa: ARG002
        """Return False: CuPy has no gradients."""
        return False

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array from CuPy's allocator."""
        with like.device:
            return importlib.import_module("cupy").empty((count,), dtype=dtype)

    def zeros(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array from CuPy's allocator, set to zero."""
        with like.device:
            return importlib.import_module("cupy").zeros((count,), dtype=dtype)


register(CuPyMemory())
if kernels_run():  # kernels need no workspace
    prefer_pieces("cupy", 1 << 30)
