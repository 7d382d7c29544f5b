"""Registers the kernels for torch tensors. Their memory is used as it is: nothing is copied."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import torch

from lqlora.backends.cupy.taken import register

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TorchMemory"]


class TorchMemory:
    """Tensors on a CUDA device, on torch's current stream."""

    library = "torch"

    def device(self, array: torch.Tensor) -> int | None:
        """Return the number of the CUDA device, None for other devices."""
        return array.get_device() if array.is_cuda else None

    @contextlib.contextmanager
    def scope(self, array: torch.Tensor) -> Iterator[None]:
        """Make the tensor's device, and torch's current stream on it, those of CuPy."""
        cupy = importlib.import_module("cupy")
        stream = cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(array.device).cuda_stream))
        with cupy.cuda.Device(self.device(array)), stream:
            yield

    def view(self, array: torch.Tensor) -> Any:
        """Return a CuPy array of the same memory. Of bfloat16 CuPy is told that it is int16."""
        tensor = array.detach()
        tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return importlib.import_module("cupy").from_dlpack(tensor)

    def empty(self, count: int, dtype: str, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor from torch's allocator."""
        return torch.empty((count,), dtype=getattr(torch, dtype), device=like.device)


class _Stream:
    """A stream as CUDA libraries tell each other of one; torch's own streams do so since a later version."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


register(TorchMemory())
