"""Product of a few rows with a quantized weight and its low-rank factors: one call of a compiled kernel, planned once.

:func:`lqlora.matmul` runs several operations, and each of them chooses its implementation. Where a matrix has fewer than a
thousand rows and columns, that takes longer than the product. What depends on the format and the shape alone is worked out
here once, so that a layer's call passes addresses only. ``benchmarks/operators.py`` measures the gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lqlora._dispatch import passes_over
from lqlora._threads import num_threads
from lqlora.backends.cpu.compiled import FEW_ROWS
from lqlora.backends.cpu.loading import WORTH_THREADS, function, loaded
from lqlora.formats import ScaleFormat
from lqlora.quantized._layout import layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lqlora.formats import BlockFormat

__all__ = ["planned_linear"]

#: Numbers of the dtypes in ``kernels.h``.
_NUMBER = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}


def planned_linear(fmt: BlockFormat, shape: tuple[int, int]) -> Callable[..., torch.Tensor | None] | None:
    """Plan products of a few rows with the weights of a format and shape.

    Parameters
    ----------
    fmt : BlockFormat
        Format of the weights.
    shape : tuple of int
        Their rows and columns.

    Returns
    -------
    callable or None
        Takes rows of shape (..., columns), the stored tensors in the order of :meth:`lqlora.QuantizedArray.to_arrays`,
        ``lora_A``, ``lora_B`` and the scaling. Returns ``x @ (W + scaling * lora_B @ lora_A).T`` in the dtype of the rows,
        or None where the kernel does not take the arguments. The caller has checked that all are on one device, the dtypes
        and shapes of the stored tensors, and the shapes of the others. If the kernel does not take the format, the result
        is None instead of a callable.
    """
    (rows, columns), addresses = shape, _addresses(fmt, shape)
    if loaded() is None or addresses is None or columns % 8:
        return None
    run, is_small = function("linear", "pilllpppiilppiilpppildp"), rows * columns < WORTH_THREADS

    def linear(
        x: torch.Tensor, stored: Sequence[torch.Tensor], lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Multiply a few rows, or return None."""
        count = x.numel() // columns
        if not 0 < count <= FEW_ROWS or not x.is_cpu or passes_over("native"):
            return None
        dtype, factor_dtype = _NUMBER.get(x.dtype), _NUMBER.get(lora_A.dtype)
        if dtype is None or factor_dtype is None or lora_A.dtype != lora_B.dtype:
            return None
        for tensor in (x, lora_A, lora_B, *stored):
            # The kernel reads memory as it lies, without signs that torch turns when it reads. Memory may have been taken away
            # from a tensor, as fully_shard and hooks of activations do.
            if (
                tensor.layout is not torch.strided
                or not tensor.is_contiguous()
                or tensor.is_neg()
                or tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
            ):
                return None
        y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
        # Addresses keep nothing alive, but the arguments of this call do.
        run(
            x.data_ptr(), dtype, count, rows, columns, *addresses(stored),
            lora_A.data_ptr(), lora_B.data_ptr(), factor_dtype, lora_A.shape[0], scaling, y.data_ptr(),
            1 if is_small else num_threads(),
        )  # fmt: skip
        return y

    return linear


def _addresses(fmt: BlockFormat, shape: tuple[int, int]) -> Callable[[Sequence[torch.Tensor]], tuple[Any, ...]] | None:
    """Return a function from the stored tensors of a weight to the arguments of the kernel; None for other formats."""
    layout, at = layout_of(fmt, shape), {name: index for index, name in enumerate(fmt.stored_arrays(shape))}
    has_one_set = "levels" not in at or fmt.level_sets(shape) == 1
    dtype = fmt.scales.dtype if isinstance(fmt.scales, ScaleFormat) else fmt.scales
    if (
        not (layout.follows_rows and layout.count and has_one_set)
        or layout.is_trellis
        or fmt.rotation is not None
        or "zero_points" in at
        or dtype != "float32"
    ):
        return None
    # Names of stored arrays, or the addresses of constant tables, which live as long as the format.
    table: int | None = None if "levels" in at else fmt.codebook.levels.ctypes.data
    coding = len(fmt.codebook.levels), layout.bits, layout.block_size
    scale_table, scale_coding = None, (0, 0, 0)
    if isinstance(fmt.scales, ScaleFormat):
        nested = layout_of(fmt.scales.format, (layout.blocks,))
        levels = nested.codebook.levels
        scale_table, scale_coding = levels.ctypes.data, (len(levels), nested.bits, nested.block_size)
    scales = at["scales" if "scales" in at else "scales.scales"]

    def addresses(stored: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        found = [tensor.data_ptr() for tensor in stored]
        return (
            found[0], found[scales], table or found[at["levels"]], *coding,
            found[at["scales.codes"]] if scale_table else None, scale_table, *scale_coding,
            found[at["scales.offset"]] if "scales.offset" in at else None,
        )  # fmt: skip

    return addresses
