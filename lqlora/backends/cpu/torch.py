"""Overrides for torch tensors in host memory: NumPy's implementations on zero-copy views. ``benchmarks/quantize.py`` has the rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from lqlora._dispatch import Operation, Takes, prefer_maker, prefer_pieces
from lqlora.backends.cpu import compiled, loading
from lqlora.backends.cpu.buffer_pool import large_empty
from lqlora.ops.blocks import block_absmax, block_extremes
from lqlora.ops.coding import decode, encode, encode_by_absmax, encode_packed, nearest_codes
from lqlora.ops.matmul import matmul_packed
from lqlora.ops.packing import pack_codes, unpack_codes
from lqlora.ops.rounding import rounding_errors
from lqlora.ops.search import best_ratios
from lqlora.ops.slices import copy_across
from lqlora.ops.sums import bin_sums, level_sums, row_sums

__all__: list[str] = []

_WIDE = ("float32", "float64")
_FLOATS = (*_WIDE, "float16", "bfloat16")
_DECODED = ("float32", "float16", "bfloat16")
_OWN_SCALES = {"scales": _WIDE, "zero_points": ("uint8", None)}
_OF_CODES = {"packed": ("uint8",), "scales": ("float32",), "zero_points": ("uint8", None)}

#: What NumPy does faster than torch, compiled or not.
_TAKES: dict[Operation[Any, Any], Takes] = {
    nearest_codes: Takes({"values": _WIDE}),
    decode: Takes({**_OF_CODES, "out": _DECODED}),
    bin_sums: Takes({"terms": ("float64",), "bins": ("int64",)}),
}

#: What only compiled kernels do faster.
_TAKES_COMPILED: dict[Operation[Any, Any], Takes] = {
    block_absmax: Takes({"flat": _FLOATS}),
    block_extremes: Takes({"flat": _FLOATS}),
    encode: Takes({"flat": _WIDE, **_OWN_SCALES}),
    encode_packed: Takes({"flat": _FLOATS, **_OWN_SCALES}),
    encode_by_absmax: Takes({"flat": _FLOATS}),
    copy_across: Takes({"source": _FLOATS, "out": _FLOATS}),
    pack_codes: Takes({"codes": ("uint8",)}),
    unpack_codes: Takes({"packed": ("uint8",)}, bits=tuple(range(1, 8))),
    row_sums: Takes({"rows": _WIDE}),
    level_sums: Takes(
        {
            "rows": ("float32",),
            "weights": ("float32", None),
            "importance": ("float64",),
            "ratios": ("float32",),
            "codes": ("uint8",),
            "sets": ("int64",),
        }
    ),
    best_ratios: Takes({"rows": ("float32",), "weights": ("float32", None), "zeros": ("float32", None)}),
    rounding_errors: Takes(
        {"rows": _WIDE, "weights": (*_WIDE, None), "scales": ("float32",), "zero_points": ("uint8", None)}
    ),
    matmul_packed: Takes(
        {"x": _DECODED, **_OF_CODES, "out": _DECODED},
        contiguous=("x", "out"),
        condition=lambda x, *others: (
            x.shape[0] <= compiled.FEW_ROWS and x.shape[1] % 8 == 0 and x.dtype == others[-1].dtype
        ),
        sentence=f"up to {compiled.FEW_ROWS} rows of a multiple of eight entries, and results of their dtype",
    ),
}


def _view(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: Any) -> Any:
    if isinstance(array, tuple):
        return tuple(_tensor(part) for part in array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _share(operation: Operation[Any, Any], takes: Takes, backend: str) -> None:
    """Register a torch override that hands views to NumPy's implementation of the same operation."""
    writes = "out" in takes.dtypes  # which is the last argument then

    def on_views(*args: Any) -> Any:
        result = operation(*(_view(argument) for argument in args))
        return args[-1] if writes else _tensor(result)

    on_views.__name__ = f"{operation.name}_as_numpy"
    operation.register("torch", backend=backend, takes=takes)(on_views)


_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


def _large(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor | None:
    own = large_empty(shape, _DTYPES[dtype]) if like.device.type == "cpu" and dtype in _DTYPES else None
    return None if own is None else _tensor(own)


prefer_maker("torch", _large)
for _operation, _takes in _TAKES.items():
    _share(_operation, _takes, "torch")
if loading.status()[0]:
    prefer_pieces("torch", compiled.PIECE)
    for _operation, _takes in _TAKES_COMPILED.items():
        _share(_operation, _takes, "native")
