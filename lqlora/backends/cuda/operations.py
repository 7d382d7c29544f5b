"""Calls of the CUDA kernels: grid sizes, template instances and arguments of each operation."""

from __future__ import annotations

import math
from math import inf, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora._dispatch import dtype_name
from lqlora.backends.cuda.launching import capability, launch, table

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._typing import Array
    from lqlora.backends.cuda.memory import Memory

__all__ = ["GROUP", "MOST_INPUTS", "Kernels", "lanes_for"]

#: Names of the dtypes in the kernels, and the bytes of a number.
_TYPES = {"float32": "float", "float16": "Float16", "bfloat16": "BFloat16", "float64": "double"}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}

#: Weights of a block that one team of lanes reduces. Longer blocks are split into parts, so that a tensor with one
#: scale still fills the device; the parts are merged in global memory.
_PART = 4096

#: Vectors of sixteen bytes that a lane loads at a time: ``batch`` of blocks.cu.
_LOADS = 4

#: Largest numbers of input rows for which products are compiled. A thread keeps a sum for each of them in registers, so
#: a kernel for many rows wastes registers on few. For more rows, dense products of decoded tiles are faster.
_INPUTS = (1, 4, 16)
MOST_INPUTS = _INPUTS[-1]

#: Tensor cores multiply rows of 16-bit inputs if there are more than the first number of rows, and the device has at
#: least the compute capability of the second. A block of threads then has the third number of rows of the weight.
_FEW, _MULTIPLIES_MATRICES, _TILE = 4, 80, 16

#: Rows of inputs that a block or team of threads multiplies by one row of a low-rank factor.
_INPUTS_AT_ONCE = 4

#: Threads of a block in general, and in products, where each warp has one row or two. Blocks of products are small
#: because their threads need up to 168 registers, and a multiprocessor hands out its 65,536 registers block by block.
_THREADS, _PRODUCT_THREADS = 256, 128

#: Weights or codes of a thread at a time. Eight codes are whole bytes for any number of bits, so that no two threads
#: write the same byte.
GROUP = 8


class Kernels:
    """Calls of the kernels on the arrays of one library. Each method has the name of its operation.

    Parameters
    ----------
    memory : Memory
        Access to the memory of the arrays.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def block_absmax(self, flat: Array, block_size: int) -> Array:
        """Find the largest magnitude of each block in a team of lanes."""
        return self._statistics(flat, block_size, extremes=False)[1]

    def block_extremes(self, flat: Array, block_size: int) -> tuple[Array, Array]:
        """Find the extremes of each block in a team of lanes."""
        return self._statistics(flat, block_size, extremes=True)

    def _statistics(self, flat: Array, block_size: int, *, extremes: bool) -> tuple[Array, Array]:
        count, name = flat.shape[0], dtype_name(flat)
        block_size = max(1, min(block_size, count))
        blocks, wide = -(-count // block_size), "float64" if name == "float64" else "float32"
        parts = -(-block_size // _PART)
        make = self._memory.empty if parts == 1 else self._memory.zeros  # atomic maxima start from zeros
        high = make(blocks, wide, flat)
        low = make(blocks, wide, flat) if extremes else high
        if not count:
            return low, high
        lanes = lanes_for(min(block_size, _PART), _LOADS * 16 // _ITEM_BYTES[name], 32)
        kernel = f"block_statistics<{_TYPES[name]}, {str(extremes).lower()}>"
        sizes = (np.int64(count), np.int64(block_size), np.int64(_PART))
        cut = (*_blocks(parts), np.int64(blocks * parts), np.int32(lanes))
        self._run("blocks", kernel, blocks * parts * lanes, (flat, low, high, *sizes, *cut))
        return low, high

    def nearest_codes(self, values: Array, boundaries: npt.NDArray[np.float32]) -> Array:
        """Search the boundaries for each value."""
        count = prod(values.shape)
        codes = self._memory.empty(count, "uint8", values)
        if count:
            # The binary search needs 2**n cells, which 2**n - 1 boundaries separate: the table is padded with infinity.
            cells = 1 << len(boundaries).bit_length()
            cuts = (boundaries, max(1, cells - 1), inf)
            arguments = (values, cuts, np.int32(cells), codes, np.int64(count))
            self._run("encode", f"nearest_codes<{_TYPES[dtype_name(values)]}>", -(-count // GROUP), arguments)
        return codes.reshape(values.shape)

    def encode(
        self,
        flat: Array,
        scales: Array,
        zero_points: Array | None,
        boundaries: npt.NDArray[np.float32],
        block_size: int,
    ) -> Array:
        """Pack codes of eight bits, which are whole bytes."""
        return self.encode_packed(flat, scales, zero_points, boundaries, 8, block_size)

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
            arguments = (flat, scales, zeros, affine, cuts, packed, np.int64(count), *_blocks(block_size))
            self._run("encode", f"encode_packed<{bits}, {_TYPES[dtype_name(flat)]}>", -(-count // GROUP), arguments)
        return packed

    def decode(self, stored: ops.PackedBlocks, out: Array) -> Array:
        """Look up, multiply and round in one pass."""
        count = out.shape[0]
        if count:
            arguments = (*_codes(stored), out, np.int64(count), *_blocks(stored.block_size))
            self._run("decode", f"decode<{stored.bits}, {_TYPES[dtype_name(out)]}>", -(-count // GROUP), arguments)
        return out

    def decode_trellis(self, stored: ops.PackedTrellis, out: Array) -> Array:
        """Find states, look up, multiply and round in one pass."""
        count = out.shape[0]
        if count:
            packed, scales, levels, sizes = _states(stored)
            arguments = (packed, scales, levels, out, np.int64(count), *sizes)
            self._run("trellis", f"decode_trellis<{_TYPES[dtype_name(out)]}>", -(-count // GROUP), arguments)
        return out

    def matmul_trellis(self, x: Array, stored: ops.PackedTrellis, out: Array) -> Array:
        """Decode each weight once, in registers, for all rows of inputs."""
        (inputs, columns), rows = x.shape, out.shape[1]
        if rows:
            packed, scales, levels, sizes = _states(stored)
            most = next(most for most in _INPUTS if inputs <= most)
            arguments = (x, packed, scales, levels, out, np.int32(inputs), np.int64(rows), np.int32(columns), *sizes)
            kernel = f"matmul_trellis<{_TYPES[dtype_name(x)]}, {most}>"
            self._run("trellis_matmul", kernel, rows * 32, arguments, _PRODUCT_THREADS)
        return out

    def pack_codes(self, codes: Array, bits: int) -> Array:
        """Pack eight codes in each thread."""
        count = codes.shape[0]
        packed = self._memory.empty(ops.packed_size(count, bits), "uint8", codes)
        if count:
            self._run("packing", f"pack_codes<{bits}>", -(-count // GROUP), (codes, packed, np.int64(count)))
        return packed

    def unpack_codes(self, packed: Array, bits: int, count: int) -> Array:
        """Unpack eight codes in each thread."""
        codes = self._memory.empty(count, "uint8", packed)
        if count:
            self._run("packing", f"unpack_codes<{bits}>", -(-count // GROUP), (packed, codes, np.int64(count)))
        return codes

    def matmul_packed(self, x: Array, stored: ops.PackedBlocks, out: Array) -> Array:
        """Decode each weight once, in registers, for all rows of inputs."""
        (inputs, columns), rows = x.shape, out.shape[1]
        if not rows:
            return out
        own, bits, block_size = _TYPES[dtype_name(x)], stored.bits, stored.block_size
        # For block sizes that are powers of two a shift replaces the division in the innermost loop.
        shift = block_size.bit_length() - 1 if block_size & (block_size - 1) == 0 else -1
        sizes = (np.int32(inputs), np.int64(rows), np.int32(columns), *_blocks(block_size), np.int32(shift))
        arguments = (x, *_codes(stored), out, *sizes)
        if inputs <= _FEW or own == "float":
            most = next(most for most in _INPUTS if inputs <= most)
            work = -(-rows // (2 if most > 1 else 1)) * 32
            self._run("matmul", f"matmul_packed<{bits}, {own}, {most}>", work, arguments, _PRODUCT_THREADS)
        elif capability(self._memory.device(x) or 0) >= _MULTIPLIES_MATRICES:
            self._run("tensor", f"matmul_tensor<{bits}, {own}>", -(-rows // _TILE) * _THREADS, arguments)
        else:
            ops.matmul_packed.reference(x, stored, out)
        return out

    def add_low_rank(self, y: Array, x: Array, lora_A: Array, lora_B: Array, scaling: float) -> Array:
        """Multiply by one factor, keep the result in float32, and multiply that by the other."""
        (rank, columns), rows, inputs = lora_A.shape, lora_B.shape[0], prod(y.shape[:-1])
        own, factor = _TYPES[dtype_name(y)], _TYPES[dtype_name(lora_A)]
        out = self._memory.empty(inputs * rows, dtype_name(y), y).reshape(y.shape)
        if not rows:
            return out
        inner = self._memory.empty(inputs * rank, "float32", y)
        most = 1 if inputs == 1 else _INPUTS_AT_ONCE
        kind, parts, lanes = f"<{own}, {factor}, {most}>", -(-inputs // most), lanes_for(rank, GROUP, 32)
        sizes = np.int32(inputs), np.int32(rank)
        given: tuple[Any, ...] = x, lora_A, inner, *sizes, np.int32(columns)
        self._run("lowrank", f"low_rank_inner{kind}", parts * rank * _THREADS, given)
        given = y, inner, lora_B, np.float32(scaling), out, *sizes, np.int64(rows), np.int32(lanes)
        self._run("lowrank", f"low_rank_outer{kind}", parts * rows * lanes, given)
        return out

    def _run(self, module: str, kernel: str, work: int, arguments: tuple[Any, ...], threads: int = _THREADS) -> None:
        """Launch a kernel. A tuple stands for a table of the host: its entries, its padded length, and the padding."""
        memory, device = self._memory, self._memory.device(arguments[0]) or 0
        given = tuple(
            value
            if isinstance(value, np.generic)
            else table(device, *value)
            if isinstance(value, tuple)
            else memory.view(value)
            for value in arguments
        )
        launch(device, memory.stream(device), module, kernel, threads, work, given)


def lanes_for(entries: int, each: int, most: int) -> int:
    """Return the number of threads that share a row, or a part of a block.

    Parameters
    ----------
    entries : int
        Entries of a row.
    each : int
        Entries that a thread takes at a time.
    most : int
        Largest number of threads, a power of two.

    Returns
    -------
    int
        Number of threads, a power of two.

    Examples
    --------
    >>> lanes_for(64, 16, 32), lanes_for(65, 16, 32), lanes_for(4096, 16, 32)
    (4, 8, 32)
    """
    return min(most, 1 << max(0, (-(-entries // each) - 1).bit_length()))


def _zero_points(zero_points: Array | None, other: Array) -> tuple[Array, np.int32]:
    """Return an array to pass for zero points, and a flag for the kernel, because CuPy cannot pass a null pointer."""
    return (other, np.int32(0)) if zero_points is None else (zero_points, np.int32(1))


def _codes(stored: ops.PackedBlocks) -> tuple[Any, ...]:
    """Return stored weights as arguments of a kernel, but for the block size."""
    zeros, affine = _zero_points(stored.zero_points, stored.packed)
    return stored.packed, stored.scales, zeros, affine, (stored.levels, 2**stored.bits, math.nan)


def _states(stored: ops.PackedTrellis) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """Return stored trellis codes as arguments of a kernel: codes, scales, table of levels, and sizes."""
    levels = stored.table()
    blocks = -(-stored.length // stored.block_size)
    state_bits = len(levels).bit_length() - 1
    sizes = (
        *_blocks(stored.length),
        *_blocks(stored.block_size),
        np.int64(blocks),
        np.int32(stored.bits),
        np.int32(state_bits),
    )
    return stored.packed, stored.scales, (levels, len(levels), math.nan), sizes


def _blocks(block_size: int) -> tuple[np.int64, np.float64]:
    """Return the block size and its reciprocal, because dividing 64-bit integers is a slow call on a device."""
    return np.int64(block_size), np.float64(1 / block_size)
