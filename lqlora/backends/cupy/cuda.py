"""Overrides of the operations: what each kernel takes, and how it is called."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lqlora import ops
from lqlora.backends.cupy.launch import launch, table
from lqlora.ops.casting import dtype_name

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._dispatch import Operation
    from lqlora._typing import Array
    from lqlora.backends.cupy.memory import Memory

__all__ = ["Kernels", "register"]

#: How the kernels call the dtypes.
_TYPES = {"float32": "float", "float16": "Float16", "bfloat16": "BFloat16", "float64": "double"}
_NARROW = ("float32", "float16", "bfloat16")
_BYTES = ("uint8",)

#: Weights that one team of lanes looks at; the statistics of the parts of longer blocks meet in global memory.
_PART = 4096

#: Rows of inputs that matrix products are compiled for. With more of them, dense products of decoded tiles are faster.
_INPUTS = (1, 4, 16)

#: Threads of a block, and those of a matrix product, whose blocks have four warps with one or several rows each.
_THREADS, _PRODUCT_THREADS = 256, 128

#: Weights, or codes, that a thread has at a time.
_GROUP = 8


#: An array, the dtypes it may have, and its shape; or None for an array that is not given.
_Expected: TypeAlias = tuple[Any, tuple[str, ...], tuple[int, ...]]


def register(memory: Memory) -> None:
    """Register the kernels for the arrays of one library.

    Parameters
    ----------
    memory : Memory
        How the arrays are reached.
    """
    kernels = Kernels(memory)
    for operation in _OPERATIONS:
        accepts = getattr(kernels, f"accepts_{operation.name}")
        operation.register(memory.library, accepts=accepts)(getattr(kernels, operation.name))


_OPERATIONS: tuple[Operation[Any, Any], ...] = (
    ops.block_absmax,
    ops.block_extremes,
    ops.decode,
    ops.encode_packed,
    ops.matmul_packed,
    ops.nearest_codes,
    ops.pack_codes,
    ops.unpack_codes,
)


class Kernels:
    """The operations on the arrays of one library; methods are named as the operations are.

    Parameters
    ----------
    memory : Memory
        How the arrays are reached.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def accepts_block_absmax(self, flat: Array, block_size: int) -> bool:
        """Accept flat arrays of any floating-point dtype."""
        return block_size >= 1 and len(flat.shape) == 1 and self._takes((flat, tuple(_TYPES), flat.shape))

    accepts_block_extremes = accepts_block_absmax

    def block_absmax(self, flat: Array, block_size: int) -> Array:
        """Reduce each block in a team of lanes."""
        return self._statistics(flat, block_size, extremes=False)[1]

    def block_extremes(self, flat: Array, block_size: int) -> tuple[Array, Array]:
        """Reduce each block in a team of lanes."""
        return self._statistics(flat, block_size, extremes=True)

    def _statistics(self, flat: Array, block_size: int, *, extremes: bool) -> tuple[Array, Array]:
        count, name = flat.shape[0], dtype_name(flat)
        block_size = max(1, min(block_size, count))
        blocks, wide = -(-count // block_size), "float64" if name == "float64" else "float32"
        high = self._memory.empty(blocks, wide, flat)
        low = self._memory.empty(blocks, wide, flat) if extremes else high
        if not count:
            return low, high
        parts = -(-block_size // _PART)
        if parts > 1:  # what the parts of a block are merged into
            with self._memory.scope(flat):
                high[...] = 0
                low[...] = 0
        lanes = _lanes(min(block_size, _PART, count), 16 // _ITEM_BYTES[name])
        kernel = f"block_statistics<{_TYPES[name]}, {str(extremes).lower()}>"
        sizes = (np.int64(count), np.int64(block_size), np.int64(_PART), np.int32(lanes))
        self._run("blocks", kernel, blocks * parts * lanes, (flat, low, high, *sizes))
        return low, high

    def accepts_nearest_codes(self, values: Array, boundaries: npt.NDArray[np.float32]) -> bool:
        """Accept arrays of any shape that lie in order, and as many boundaries as eight bits have."""
        return len(boundaries) <= 255 and self._takes((values, ("float32", "float64"), values.shape))

    def nearest_codes(self, values: Array, boundaries: npt.NDArray[np.float32]) -> Array:
        """Search the boundaries of each value."""
        count = 1
        for length in values.shape:
            count *= length
        codes = self._memory.empty(count, "uint8", values)
        if count:
            cells = 1 << len(boundaries).bit_length()
            cuts = (boundaries, max(1, cells - 1), inf)
            arguments = (values, cuts, np.int32(cells), codes, np.int64(count))
            self._run("encode", f"nearest_codes<{_TYPES[dtype_name(values)]}>", -(-count // _GROUP), arguments)
        return codes.reshape(values.shape)

    def accepts_encode_packed(
        self,
        flat: Array,
        scales: Array,
        zero_points: Array | None,
        boundaries: npt.NDArray[np.float32],
        bits: int,
        block_size: int,
    ) -> bool:
        """Accept flat arrays whose scales are as wide as the arithmetic."""
        if not _fits(bits, block_size, len(boundaries) + 1) or len(flat.shape) != 1:
            return False
        wide = "float64" if dtype_name(flat) == "float64" else "float32"
        blocks = (-(-flat.shape[0] // block_size),)
        return self._takes((flat, tuple(_TYPES), flat.shape), (scales, (wide,), blocks), (zero_points, _BYTES, blocks))

    def encode_packed(
        self,
        flat: Array,
        scales: Array,
        zero_points: Array | None,
        boundaries: npt.NDArray[np.float32],
        bits: int,
        block_size: int,
    ) -> Array:
        """Divide, search and pack in one pass."""
        count = flat.shape[0]
        packed = self._memory.empty(ops.packed_size(count, bits), "uint8", flat)
        if count:
            zeros, affine = _zero_points(zero_points, packed)
            cuts = (boundaries, 2**bits - 1, inf)
            arguments = (flat, scales, zeros, affine, cuts, packed, np.int64(count), np.int64(block_size))
            self._run("encode", f"encode_packed<{bits}, {_TYPES[dtype_name(flat)]}>", -(-count // _GROUP), arguments)
        return packed

    def accepts_decode(
        self,
        packed: Array,
        scales: Array,
        zero_points: Array | None,
        levels: npt.NDArray[np.float32],
        bits: int,
        block_size: int,
        out: Array,
    ) -> bool:
        """Accept flat results, and exactly the bytes that their codes take."""
        if not _fits(bits, block_size, len(levels)) or len(out.shape) != 1:
            return False
        weight = _weight(packed, scales, zero_points, out.shape[0], bits, block_size)
        return self._takes((out, _NARROW, out.shape), *weight)

    def decode(
        self,
        packed: Array,
        scales: Array,
        zero_points: Array | None,
        levels: npt.NDArray[np.float32],
        bits: int,
        block_size: int,
        out: Array,
    ) -> Array:
        """Look up, multiply and round in one pass."""
        count = out.shape[0]
        if count:
            zeros, affine = _zero_points(zero_points, packed)
            known = (levels, 2**bits, 0.0)
            arguments = (packed, scales, zeros, affine, known, out, np.int64(count), np.int64(block_size))
            self._run("decode", f"decode<{bits}, {_TYPES[dtype_name(out)]}>", -(-count // _GROUP), arguments)
        return out

    def accepts_pack_codes(self, codes: Array, bits: int) -> bool:
        """Accept flat arrays of bytes."""
        return 1 <= bits <= 8 and len(codes.shape) == 1 and self._takes((codes, _BYTES, codes.shape))

    def pack_codes(self, codes: Array, bits: int) -> Array:
        """Pack eight codes in each thread."""
        count = codes.shape[0]
        packed = self._memory.empty(ops.packed_size(count, bits), "uint8", codes)
        if count:
            self._run("packing", f"pack_codes<{bits}>", -(-count // _GROUP), (codes, packed, np.int64(count)))
        return packed

    def accepts_unpack_codes(self, packed: Array, bits: int, count: int) -> bool:
        """Accept exactly the bytes that the codes take."""
        return 1 <= bits <= 8 and self._takes((packed, _BYTES, (ops.packed_size(count, bits),)))

    def unpack_codes(self, packed: Array, bits: int, count: int) -> Array:
        """Unpack eight codes in each thread."""
        codes = self._memory.empty(count, "uint8", packed)
        if count:
            self._run("packing", f"unpack_codes<{bits}>", -(-count // _GROUP), (packed, codes, np.int64(count)))
        return codes

    def accepts_matmul_packed(
        self,
        x: Array,
        packed: Array,
        scales: Array,
        zero_points: Array | None,
        levels: npt.NDArray[np.float32],
        bits: int,
        block_size: int,
        out: Array,
    ) -> bool:
        """Accept a few rows of inputs, and weights whose rows are whole groups of codes."""
        if not _fits(bits, block_size, len(levels)) or len(x.shape) != 2 or len(out.shape) != 2:
            return False
        (inputs, columns), rows = x.shape, out.shape[1]
        few = 1 <= inputs <= _INPUTS[-1] and columns > 0 and columns % _GROUP == 0
        weight = _weight(packed, scales, zero_points, rows * columns, bits, block_size)
        return few and self._takes((x, _NARROW, x.shape), (out, (dtype_name(x),), (inputs, rows)), *weight)

    def matmul_packed(
        self,
        x: Array,
        packed: Array,
        scales: Array,
        zero_points: Array | None,
        levels: npt.NDArray[np.float32],
        bits: int,
        block_size: int,
        out: Array,
    ) -> Array:
        """Decode each weight once, in registers, for all rows of inputs."""
        (inputs, columns), rows = x.shape, out.shape[1]
        if not rows:
            return out
        most = next(most for most in _INPUTS if inputs <= most)
        zeros, affine = _zero_points(zero_points, packed)
        sizes = (np.int32(inputs), np.int64(rows), np.int64(columns), np.int64(block_size))
        arguments = (x, packed, scales, zeros, affine, (levels, 2**bits, 0.0), out, *sizes)
        rows_per_warp = 2 if most > 4 else 4
        kernel = f"matmul_packed<{bits}, {_TYPES[dtype_name(x)]}, {most}>"
        self._run("matmul", kernel, -(-rows // rows_per_warp) * 32, arguments, _PRODUCT_THREADS)
        return out

    def _takes(self, *arrays: _Expected) -> bool:
        """Tell whether arrays are on one device, of the dtypes and shapes that a kernel goes by."""
        given = [expected for expected in arrays if expected[0] is not None]
        return (
            all(self._memory.holds(array) for array, _, _ in given)
            and all(dtype_name(a) in dtypes and tuple(a.shape) == tuple(shape) for a, dtypes, shape in given)
            and len({self._memory.device(array) for array, _, _ in given}) == 1
        )

    def _run(self, module: str, kernel: str, work: int, arguments: tuple[Any, ...], threads: int = _THREADS) -> None:
        """Launch a kernel; a table of the host is given as its entries, their number, and what fills it up."""
        device = self._memory.device(arguments[0])
        with self._memory.scope(arguments[0]):
            launch(device, module, kernel, threads, work, tuple(self._argument(device, value) for value in arguments))

    def _argument(self, device: int, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value
        return table(device, *value) if isinstance(value, tuple) else self._memory.view(value)


_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def _lanes(weights: int, at_once: int) -> int:
    """Return how many lanes of a warp share a part of a block: a power of two, such that each loads sixteen bytes."""
    return min(32, 1 << max(0, (-(-weights // at_once) - 1).bit_length()))


def _zero_points(zero_points: Array | None, other: Array) -> tuple[Array, np.int32]:
    """Return what a kernel is given for zero points, and whether it may look: CuPy has no word for a null pointer."""
    return (other, np.int32(0)) if zero_points is None else (zero_points, np.int32(1))


def _fits(bits: int, block_size: int, levels: int) -> bool:
    return 1 <= bits <= 8 and block_size >= 1 and levels <= 2**bits


def _weight(
    packed: Array, scales: Array, zero_points: Array | None, count: int, bits: int, block_size: int
) -> tuple[_Expected, _Expected, _Expected]:
    """Return what the arrays of a quantized weight have to be."""
    blocks = (-(-count // block_size),)
    codes = (ops.packed_size(count, bits),)
    return (packed, _BYTES, codes), (scales, ("float32",), blocks), (zero_points, _BYTES, blocks)
