"""Registration of the CUDA kernels, with the conditions under which they take a call."""

from __future__ import annotations

import functools
import importlib
from inspect import Parameter, Signature
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora import ops
from lqlora._dispatch import Takes, dtype_name
from lqlora._optional import is_installed
from lqlora.backends.cuda.fits import LONGEST_SEARCH, Fits
from lqlora.backends.cuda.operations import GROUP, MOST_INPUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from lqlora._dispatch import Operation
    from lqlora._typing import Array
    from lqlora.backends.cuda.memory import Memory

__all__ = ["kernels_run", "register"]


@functools.cache
def kernels_run() -> bool:
    """Return whether CuPy is installed and finds a CUDA device; CuPy can be imported without a driver too.

    Returns
    -------
    bool
        Computed once.
    """
    return is_installed("cupy") and bool(importlib.import_module("cupy").cuda.is_available())


def register(memory: Memory) -> None:
    """Register the kernels for the arrays of one library.

    Parameters
    ----------
    memory : Memory
        Access to the memory of the arrays.
    """
    kernels = Fits(memory)
    for operation, taken in _TAKEN.items():
        takes = Takes(
            taken.dtypes,
            bits=tuple(range(1, 9)) if "bits" in operation.arguments.flat else None,
            memory="device",
            contiguous=tuple(taken.dtypes),
            condition=_Condition(memory, operation, taken),
            sentence=f"{taken.sentence}, on one CUDA device that CuPy can use",
        )
        operation.register(memory.library, backend="cuda", takes=takes)(getattr(kernels, operation.name))


class _Condition:
    """The condition of a kernel: arrays of fitting shapes on one device, aligned, and not followed by autograd.

    Its signature names all flat arguments of the operation; ``taken.fits`` names those that it needs.
    """

    def __init__(self, memory: Memory, operation: Operation[Any, Any], taken: _Taken) -> None:
        names = operation.arguments.flat
        self.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
        self._memory, self._taken = memory, taken
        self._arrays = tuple(i for i, name in enumerate(names) if name in taken.dtypes)
        self._aligned = tuple(names.index(name) for name in taken.aligned)
        self._named = operation.arguments.picker(taken.fits, f"cuda.{operation.name}")

    def __call__(self, *args: Any) -> bool:
        if not kernels_run():
            return False
        memory, taken = self._memory, self._taken
        # A kernel gets plain addresses. These show neither a wrong device, nor that autograd loses track of the result.
        first, *others = (args[position] for position in self._arrays)
        device = memory.device(first)
        one_device = all(array is None or memory.device(array) == device for array in others)
        if device is None or not one_device or not taken.fits(*self._named(args)):
            return False
        if taken.differentiable and any(memory.is_tracked(array) for array in (first, *others)):
            return False
        return not any(memory.address(args[position]) % 16 for position in self._aligned)


class _Taken(NamedTuple):
    """Dtypes of arrays, a condition on shapes as code and in words, and the arguments that must be aligned to 16 bytes.

    ``differentiable`` marks operations whose reference autograd can follow. A kernel must not run on arrays that it follows.
    """

    dtypes: dict[str, tuple[str | None, ...]]
    fits: Callable[..., bool]
    sentence: str
    aligned: tuple[str, ...] = ()
    differentiable: bool = False


def _is_flat(flat: Array, block_size: int) -> bool:
    return len(flat.shape) == 1 and block_size >= 1


def _values_fit(boundaries: npt.NDArray[np.float32]) -> bool:
    return len(boundaries) <= 255


def _encoding_fits(
    flat: Array,
    scales: Array,
    zero_points: Array | None,
    boundaries: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
) -> bool:
    wide = "float64" if dtype_name(flat) == "float64" else "float32"
    plain = _is_flat(flat, block_size) and len(boundaries) < 2**bits and dtype_name(scales) == wide
    return plain and _scales_fit(flat.shape[0], scales, zero_points, block_size)


def _whole_codes_fit(
    flat: Array,
    scales: Array,
    zero_points: Array | None,
    boundaries: npt.NDArray[np.float32],
    block_size: int,
) -> bool:
    return _encoding_fits(flat, scales, zero_points, boundaries, 8, block_size)


def _scales_fit(count: int, scales: Array, zero_points: Array | None, block_size: int) -> bool:
    blocks = (-(-count // block_size),)
    return tuple(scales.shape) == blocks and (zero_points is None or tuple(zero_points.shape) == blocks)


def _decoding_fits(stored: ops.PackedBlocks, out: Array) -> bool:
    return len(out.shape) == 1 and stored.fits(out.shape[0])


def _states_fit(stored: ops.PackedTrellis, out: Array) -> bool:
    return len(out.shape) == 1 and 1 <= stored.block_size < 2**62 and stored.fits(out.shape[0])


def _state_products_fit(x: Array, stored: ops.PackedTrellis, out: Array) -> bool:
    if len(x.shape) != 2 or len(out.shape) != 2 or out.shape[0] != x.shape[0] or out.dtype != x.dtype:
        return False
    (inputs, columns), rows = x.shape, out.shape[1]
    vectors = 1 <= inputs <= MOST_INPUTS and columns > 0 and columns % GROUP == 0
    return vectors and columns < 2**30 and 1 <= stored.block_size < 2**62 and stored.fits(rows * columns)


def _codes_fit(codes: Array) -> bool:
    return len(codes.shape) == 1


def _packed_fits(packed: Array, bits: int, count: int) -> bool:
    return tuple(packed.shape) == (ops.packed_size(count, bits),)


def _product_fits(x: Array, stored: ops.PackedBlocks, out: Array) -> bool:
    if len(x.shape) != 2 or len(out.shape) != 2 or out.shape[0] != x.shape[0] or out.dtype != x.dtype:
        return False
    (inputs, columns), rows = x.shape, out.shape[1]
    vectors = 1 <= inputs <= MOST_INPUTS and columns > 0 and columns % GROUP == 0
    return vectors and columns < 2**30 and stored.block_size < 2**31 and stored.fits(rows * columns)


def _factors_fit(y: Array, x: Array, lora_A: Array, lora_B: Array) -> bool:
    if not x.shape or len(lora_A.shape) != 2 or len(lora_B.shape) != 2 or y.dtype != x.dtype:
        return False
    (rank, columns), rows = lora_A.shape, lora_B.shape[0]
    shapes = tuple(lora_B.shape) == (rows, rank) and tuple(x.shape) == (*y.shape[:-1], columns)
    few = 1 <= prod(x.shape[:-1]) <= MOST_INPUTS and 1 <= rank < 2**20 and 1 <= columns < 2**30
    dtypes = lora_A.dtype == lora_B.dtype and (lora_A.dtype == x.dtype or dtype_name(lora_A) == "float32")
    return shapes and few and dtypes and bool(y.shape) and y.shape[-1] == rows


def _rows_fit(rows: Array) -> bool:
    return len(rows.shape) == 2 and rows.shape[1] >= 1


def _search_fits(
    rows: Array,
    weights: Array | None,
    levels: npt.NDArray[np.float32],
    boundaries: npt.NDArray[np.float32],
    zeros: Array | None,
    grid: Sequence[float],
    refinements: int,
) -> bool:
    if not _rows_fit(rows) or rows.shape[1] > LONGEST_SEARCH:
        return False
    weights_fit = weights is None or tuple(weights.shape) == tuple(rows.shape)
    zeros_fit = zeros is None or tuple(zeros.shape) == (rows.shape[0], 1)
    tables_fit = 1 <= len(levels) <= 256 and len(boundaries) == len(levels) - 1 and len(grid) >= 1
    return weights_fit and zeros_fit and tables_fit and 0 <= refinements < 2**31


def _bins_fit(terms: Array, bins: Array, count: int) -> bool:
    return len(terms.shape) == 1 and terms.shape[0] >= 2 and tuple(bins.shape) == tuple(terms.shape) and count >= 1


def _levels_fit(
    rows: Array,
    weights: Array | None,
    importance: Array,
    ratios: Array,
    codes: Array,
    sets: Array,
    size: int,
    count: int,
) -> bool:
    if not _rows_fit(rows) or rows.shape[0] * rows.shape[1] < 2 or size < 1 or count < 1:
        return False
    by_row = {tuple(array.shape) for array in (importance, ratios, sets)} == {(rows.shape[0],)}
    return by_row and {tuple(array.shape) for array in (codes, rows if weights is None else weights, rows)} == {
        tuple(rows.shape)
    }


_NARROW = ("float32", "float16", "bfloat16")
_FLOATS = (*_NARROW, "float64")
_WIDE = ("float32", "float64")
_CODES: dict[str, tuple[str | None, ...]] = {"packed": ("uint8",)}
_SCALES: dict[str, tuple[str | None, ...]] = {"scales": ("float32",), "zero_points": ("uint8", None)}

_TAKEN: dict[Operation[Any, Any], _Taken] = {
    ops.block_absmax: _Taken({"flat": _FLOATS}, _is_flat, "flat arrays"),
    ops.block_extremes: _Taken({"flat": _FLOATS}, _is_flat, "flat arrays"),
    ops.nearest_codes: _Taken({"values": _WIDE}, _values_fit, "up to 255 boundaries"),
    ops.encode: _Taken(
        {"flat": _WIDE, "scales": _WIDE, "zero_points": ("uint8", None)},
        _whole_codes_fit,
        "up to 255 boundaries, and flat arrays with a scale for each block",
    ),
    ops.encode_packed: _Taken(
        {"flat": _FLOATS, "scales": _WIDE, "zero_points": ("uint8", None)},
        _encoding_fits,
        "flat arrays with a scale for each block",
    ),
    ops.decode: _Taken(
        {**_CODES, **_SCALES, "out": _NARROW}, _decoding_fits, "as many codes and scales as a flat result takes"
    ),
    ops.decode_trellis: _Taken(
        {**_CODES, "scales": ("float32",), "out": _NARROW},
        _states_fit,
        "as many codes and scales as a flat result takes",
    ),
    ops.matmul_trellis: _Taken(
        {"x": _NARROW, **_CODES, "scales": ("float32",), "out": _NARROW},
        _state_products_fit,
        f"1 to {MOST_INPUTS} rows of a multiple of {GROUP} inputs below 2**30, as many codes and scales as the weight takes, and "
        "inputs that begin at multiples of 16 bytes",
        aligned=("x",),
    ),
    ops.pack_codes: _Taken({"codes": ("uint8",)}, _codes_fit, "flat arrays"),
    ops.unpack_codes: _Taken(_CODES, _packed_fits, "as many bytes as the codes take"),
    ops.matmul_packed: _Taken(
        {"x": _NARROW, **_CODES, **_SCALES, "out": _NARROW},
        _product_fits,
        f"1 to {MOST_INPUTS} rows of a multiple of {GROUP} inputs below 2**30, blocks below 2**31, as many codes and "
        "scales as the weight takes, and inputs and codes that begin at multiples of 16 bytes",
        aligned=("x", "packed"),
    ),
    ops.add_low_rank: _Taken(
        dict.fromkeys(("y", "x", "lora_A", "lora_B"), _NARROW),
        _factors_fit,
        f"1 to {MOST_INPUTS} rows, factors of one rank or more, of their dtype or of float32, and no gradients",
        differentiable=True,
    ),
    ops.row_sums: _Taken({"rows": _WIDE}, _rows_fit, "rows of one entry or more"),
    ops.best_ratios: _Taken(
        {"rows": ("float32",), "weights": ("float32", None), "zeros": ("float32", None)},
        _search_fits,
        f"rows of 1 to {LONGEST_SEARCH} entries, with a weight for each, and up to 256 levels",
    ),
    ops.bin_sums: _Taken(
        {"terms": ("float64",), "bins": ("int64",)}, _bins_fit, "two terms or more, each with its bin"
    ),
    ops.level_sums: _Taken(
        {
            "rows": ("float32",),
            "weights": ("float32", None),
            "importance": ("float64",),
            "ratios": ("float32",),
            "codes": ("uint8",),
            "sets": ("int64",),
        },
        _levels_fit,
        "two entries or more, with a code for each, and a set and a ratio for each row",
    ),
}
