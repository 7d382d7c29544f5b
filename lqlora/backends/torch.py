"""Overrides for torch tensors in host memory: NumPy's implementations on zero-copy views. ``benchmarks/quantize.py`` has the rows."""

from __future__ import annotations

from typing import Any

import torch

from lqlora._dispatch import Takes
from lqlora.ops.quantize import decode, nearest_codes
from lqlora.ops.sums import bin_sums

__all__: list[str] = []

_TAKES = {
    nearest_codes: Takes({"values": ("float32", "float64")}),
    decode: Takes({"packed": ("uint8",), "scales": ("float32",), "zero_points": ("uint8", None), "out": ("float32",)}),
    bin_sums: Takes({"terms": ("float64",), "bins": ("int64",)}),
}


def _view(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def _share(operation: Any, takes: Takes) -> None:
    """Register a torch override that hands views to NumPy's implementation of the same operation."""

    def on_views(*args: Any) -> torch.Tensor:
        return torch.from_numpy(operation(*(_view(argument) for argument in args)))

    on_views.__name__ = f"{operation.name}_as_numpy"
    operation.register("torch", takes=takes)(on_views)


for _operation, _takes in _TAKES.items():
    _share(_operation, _takes)
