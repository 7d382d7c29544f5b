"""What the kernels need of an array library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lqlora._typing import Array

__all__ = ["Memory"]


class Memory(Protocol):
    """Views of the memory of one library as CuPy arrays, room for results, and the stream to run on."""

    @property
    def library(self) -> str:
        """Name of the library, as overrides are registered for it."""

    def device(self, array: Array) -> int | None:
        """Return the number of the CUDA device that an array is on, None if it is on none."""

    def scope(self, array: Array) -> AbstractContextManager[Any]:
        """Return what makes an array's device, and the library's stream on it, the current ones of CuPy."""

    def view(self, array: Array) -> Any:
        """Return the memory of an array as a CuPy array; its dtype may be another of the same size."""

    def empty(self, count: int, dtype: str, like: Array) -> Array:
        """Return an array of so many entries on the device of another one."""
