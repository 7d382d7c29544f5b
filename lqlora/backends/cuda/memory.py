"""What the kernels need of an array library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Memory"]


class Memory(Protocol):
    """What kernels are given for the arrays of one library, room for results, and the stream to run on."""

    @property
    def library(self) -> str:
        """Name of the library, as overrides are registered for it."""

    def device(self, array: Array) -> int | None:
        """Return the number of the CUDA device that an array is on, None if it is on none."""

    def stream(self, device: int) -> Any:
        """Return the stream of CuPy that is the library's current one on a device; None if that is CuPy's current one."""

    def address(self, array: Array) -> int:
        """Return where the memory of an array begins."""

    def view(self, array: Array) -> Any:
        """Return what a kernel is given for an array: a CuPy array, or the address of its memory as an integer."""

    def is_tracked(self, array: Array) -> bool:
        """Tell whether the library follows an array to differentiate what is computed from it: kernels would be a gap."""

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array of so many entries on the device of another one."""

    def zeros(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array of so many zeros on the device of another one."""
