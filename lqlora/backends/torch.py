"""Overrides for torch tensors in host memory: NumPy's implementations on zero-copy views. ``benchmarks/quantize.py`` has the rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from lqlora.ops.quantize import decode, nearest_codes
from lqlora.ops.sums import bin_sums

__all__: list[str] = []


def _on_cpu(*args: Any) -> bool:
    """Accept strided tensors in host memory; not the fake ones that compilers trace with."""
    return all(_is_plain(value) or value is None or isinstance(value, int) for value in args if not _is_table(value))


def _is_table(value: Any) -> bool:
    """Tell whether a value is levels or boundaries, which every library is given as a read-only NumPy array."""
    return isinstance(value, np.ndarray) and not value.flags.writeable


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu"


def _view(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: Any) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _share(operation: Any) -> None:
    """Register a torch override that hands views to NumPy's implementation of the same operation."""

    def on_views(*args: Any, **kwargs: Any) -> torch.Tensor:
        views = [_view(argument) for argument in args]
        return _tensor(operation(*views, **{key: _view(value) for key, value in kwargs.items()}))

    on_views.__name__ = f"{operation.name}_as_numpy"
    operation.register("torch", accepts=_on_cpu)(on_views)


for _operation in (nearest_codes, decode, bin_sums):
    _share(_operation)
