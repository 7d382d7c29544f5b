"""Registration of the CUDA kernels for torch tensors, which the kernels use in place without copies."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch.autograd.forward_ad import unpack_dual

from lqlora.backends.cuda.registration import register

__all__ = ["TorchMemory"]


class TorchMemory:
    """Tensors on a CUDA device, on torch's current stream."""

    library = "torch"

    def device(self, array: torch.Tensor) -> int | None:
        """Return the number of the CUDA device, or None for other devices and for tensors that torch negates lazily."""
        return array.get_device() if array.is_cuda and not array.is_neg() else None

    def stream(self, device: int) -> Any:
        """Return torch's current stream, as a stream of CuPy."""
        return _stream_of_cupy(torch.cuda.current_stream(device).cuda_stream)

    def address(self, array: torch.Tensor) -> int:
        """Return the address of the first entry of a tensor."""
        return array.data_ptr()

    def view(self, array: torch.Tensor) -> int:
        """Return the address of the tensor's memory."""
        return array.data_ptr()

    def is_tracked(self, array: torch.Tensor) -> bool:
        """Return whether a tensor requires a gradient now, or has a tangent of forward-mode autograd."""
        return (array.requires_grad and torch.is_grad_enabled()) or unpack_dual(array).tangent is not None

    def empty(self, count: int, dtype: str, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor from torch's allocator."""
        return torch.empty((count,), dtype=getattr(torch, dtype), device=like.device)

    def zeros(self, count: int, dtype: str, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor from torch's allocator, set to zero."""
        return torch.zeros((count,), dtype=getattr(torch, dtype), device=like.device)


@functools.lru_cache(maxsize=64)
def _stream_of_cupy(handle: int) -> Any:
    return importlib.import_module("cupy").cuda.Stream.from_external(_Stream(handle))


class _Stream:
    """A stream with the ``__cuda_stream__`` protocol, which later versions of torch implement themselves."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


register(TorchMemory())
