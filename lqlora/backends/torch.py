"""Overrides for torch tensors in host memory: NumPy's implementations on zero-copy views. ``benchmarks/quantize.py`` has the rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from lqlora._dispatch import Takes
from lqlora.ops.quantize import decode, nearest_codes
from lqlora.ops.sums import bin_sums

__all__: list[str] = []

_TAKES = {
    nearest_codes: Takes({"values": ("float32", "float64")}),
    decode: Takes(
        {
            "packed": ("uint8",),
            "scales": ("float32",),
            "zero_points": ("uint8", None),
            "out": ("float32", "float16", "bfloat16"),
        }
    ),
    bin_sums: Takes({"terms": ("float64",), "bins": ("int64",)}),
}


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


def _share(operation: Any, takes: Takes) -> None:
    """Register a torch override that hands views to NumPy's implementation of the same operation."""

    def on_views(*args: Any) -> torch.Tensor:
        return _tensor(operation(*(_view(argument) for argument in args)))

    on_views.__name__ = f"{operation.name}_as_numpy"
    operation.register("torch", takes=takes)(on_views)


for _operation, _takes in _TAKES.items():
    _share(_operation, _takes)
