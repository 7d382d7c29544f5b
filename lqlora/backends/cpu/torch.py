"""Overrides for torch tensors in host memory: NumPy's implementations on views of the same memory.

Every operation with overrides for NumPy gets one override for torch, which takes the same calls.
``benchmarks/quantize.py`` measures their gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from lqlora import ops
from lqlora._dispatch import Operation, Override, Takes, prefer_maker, prefer_pieces
from lqlora.backends.cpu import compiled, loading
from lqlora.backends.cpu.buffer_pool import large_empty

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__: list[str] = []

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Further conditions for operations whose calls do not go to NumPy by dtype alone. Products have no fixed order of
#: additions, so torch multiplies a tensor that the compiled kernel does not take, and not the reference on NumPy.
_STRICTER = {
    ops.matmul_packed: Takes(
        {},
        contiguous=("x", "out"),
        condition=lambda x, out: (
            x.ndim == out.ndim == 2 and x.shape[0] <= compiled.FEW_ROWS and x.shape[1] % 8 == 0 and x.dtype == out.dtype
        ),
        sentence=f"up to {compiled.FEW_ROWS} rows of a multiple of eight entries, and results of their dtype",
    ),
    ops.matmul_trellis: Takes(
        {},
        contiguous=("x", "out"),
        condition=lambda x, stored, out: (
            x.ndim == out.ndim == 2
            and x.shape[0] <= compiled.FEW_ROWS
            and x.dtype == out.dtype
            and compiled.begins_rows(stored, x.shape[1] * out.shape[1], x.shape[1])
        ),
        sentence=f"up to {compiled.FEW_ROWS} rows, a matrix whose rows begin with a block, and results of their dtype",
    ),
}


def _takes(operation: Operation[Any, Any], overrides: tuple[Override, ...]) -> Takes:
    """Return a record of the calls that one of NumPy's overrides may take; NumPy's dispatch checks the rest."""
    # The union of all records: a call that fits it and yet none of them runs the reference on the views. That costs
    # time at most, since references return the same bytes on both libraries.
    records = [override.takes for override in overrides]
    names = dict.fromkeys(name for record in records for name in record.dtypes)
    dtypes = {name: tuple(dict.fromkeys(d for own in records for d in own.dtypes.get(name, ()))) for name in names}
    bits = (
        None
        if any(own.bits is None for own in records)
        else tuple(sorted({b for own in records for b in own.bits or ()}))
    )
    stricter = _STRICTER.get(operation, Takes({}))
    return Takes(dtypes, bits, contiguous=stricter.contiguous, condition=stricter.condition, sentence=stricter.sentence)


def _on_views(operation: Operation[Any, Any], takes: Takes) -> Callable[..., Any]:
    """Return a function that runs NumPy's implementation of an operation on views of tensors."""
    arguments = operation.arguments
    names = arguments.flat
    positions = [names.index(name) for name in takes.dtypes]
    returns_out = "out" in names  # the last argument, which is written to and returned

    def on_views(*args: Any) -> Any:
        flat = arguments.flatten(args)
        given = list(flat)
        try:
            for position in positions:
                if (tensor := flat[position]) is not None:
                    given[position] = _view(tensor) if tensor.dtype == torch.bfloat16 else tensor.detach().numpy()
        except (RuntimeError, TypeError):
            # NumPy cannot see a tensor that torch negates lazily or has in a layout of its own.
            return operation.reference(*args)
        result = operation(*arguments.unflatten(tuple(given)))
        if returns_out:
            return args[-1]
        return tuple(map(_tensor, result)) if isinstance(result, tuple) else _tensor(result)

    on_views.__name__ = f"{operation.name}_as_numpy"
    return on_views


def _view(tensor: torch.Tensor) -> Any:
    """Return a NumPy view of a tensor of bfloat16, which ``Tensor.numpy`` refuses."""
    return tensor.detach().view(torch.uint16).numpy().view(_BFLOAT16)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor in the memory of an array."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _BFLOAT16,
}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor beside another one, in memory of the pool if it is large and on the host."""
    if not like.is_cpu or dtype not in _DTYPES:
        return torch.empty(shape, dtype=dtype, device=like.device)
    large = large_empty(shape, _DTYPES[dtype])
    return torch.empty(shape, dtype=dtype) if large is None else _tensor(large)


prefer_maker("torch", _empty)
if loading.loaded() is not None:
    prefer_pieces("torch", compiled.PIECE)
for _operation in (getattr(ops, _name) for _name in ops.__all__):
    if isinstance(_operation, Operation) and (_overrides := _operation.overrides("numpy")):
        _record = _takes(_operation, _overrides)
        _backend = "torch" if any(_override.backend == "numpy" for _override in _overrides) else "native"
        _operation.register("torch", backend=_backend, takes=_record)(_on_views(_operation, _record))
