"""Access to the memory of array libraries, as the CUDA kernels need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Memory"]


class Memory(Protocol):
    """Access to the arrays of one library: addresses, devices, streams, and new arrays for results."""

    @property
    def library(self) -> str:
        """Name of the library, under which overrides are registered."""

    def device(self, array: Array) -> int | None:
        """Return the number of the CUDA device that holds an array, or None."""

    def stream(self, device: int) -> Any:
        """Return the library's current stream on a device, as a stream of CuPy; None for CuPy's current one."""

    def address(self, array: Array) -> int:
        """Return the address of the first entry of an array."""

    def view(self, array: Array) -> Any:
        """Return the argument of a kernel for an array: a CuPy array, or an address as an integer."""

    def is_tracked(self, array: Array) -> bool:
        """Return whether autograd follows an array. A kernel would break the graph."""

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return a flat array of ``count`` entries, of any contents, on the device of another array."""

    def zeros(self, count: int, dtype: str, like: Array) -> Array:
        """Return a flat array of ``count`` zeros on the device of another array."""
