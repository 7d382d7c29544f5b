"""Products with a quantized weight, given as packed codes and scales, and with low-rank factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lqlora._dispatch import FLOATS, device_of, dtype_name, fitting, is_on_host, namespace, op, require_writable
from lqlora.ops.casting import native_dtype, storage_cast
from lqlora.ops.coding import PackedBlocks, decode
from lqlora.ops.packing import packed_size
from lqlora.ops.trellis import PackedTrellis, decode_trellis

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora._dispatch.examples import ProductProblem
    from lqlora._typing import Array

__all__ = ["add_low_rank", "factor_dtype", "matmul_dense", "matmul_packed", "matmul_trellis"]

#: Weights that are decoded at a time: 2 MiB of float32, which stay in the cache until they are multiplied, and 8 MiB for
#: many rows, since BLAS multiplies these faster by a wider matrix. On a device 128 MiB, which most weights fit into.
_TILE = 1 << 19
_TILE_FOR_MANY = 1 << 21
_MANY = 128
_TILE_ON_DEVICE = {"float16": 1 << 26, "bfloat16": 1 << 26, "float32": 1 << 25, "float64": 1 << 24}

#: Numbers of 16 bits in host memory that are widened at a time.
_WIDENED = 1 << 17


@op(products=lambda problem: (problem.x, PackedBlocks.of(problem), problem.y), record=("stored", PackedBlocks))
def matmul_packed(x: Array, stored: PackedBlocks, out: Array) -> Array:
    """Write the product of rows and a quantized matrix, decoding a few rows of the matrix at a time.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (m, k)
        Rows of inputs.
    stored : PackedBlocks
        A matrix of shape (n, k), row by row. A block may begin in one row of the matrix and end in the next.
    out : array of the dtype of ``x``, shape (m, n)
        Array that is written.

    Returns
    -------
    array, shape (m, n)
        ``out``, which holds ``x @ w.T``, as :func:`matmul_dense` multiplies. The library decides the order of additions.

    Raises
    ------
    InvalidArgumentError
        If the arrays do not hold a matrix of that shape, or ``out`` cannot be written to.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> scale = np.array([2], dtype=np.float32)
    >>> stored = PackedBlocks(np.array([240], dtype=np.uint8), scale, None, lq.NF4.levels, 4, 64)
    >>> x, out = np.ones((1, 1), dtype=np.float32), np.empty((1, 2), dtype=np.float32)
    >>> matmul_packed(x, stored, out).tolist()
    [[-2.0, 2.0]]
    """
    packed, scales, zero_points, _, bits, block_size = stored
    namespace(x, packed, scales, zero_points, out)
    rows, columns = out.shape[1], x.shape[1]
    stored.require_fit(rows * columns)
    require_writable(out, "out")

    def decode_rows(first: int, last: int, tile: Array) -> None:
        """Decode a range of rows into a flat array."""
        codes, blocks = _within(first * columns, last * columns, bits, block_size)
        zeros = None if zero_points is None else zero_points[blocks]
        decode(stored._replace(packed=packed[codes], scales=scales[blocks], zero_points=zeros), tile)

    return _multiply_tiles(x, out, _rows_per_tile(rows, columns, block_size, _tile_size(x)), decode_rows)


def _multiply_tiles(x: Array, out: Array, step: int, decode_rows: Callable[[int, int, Array], None]) -> Array:
    """Write the product of rows and a matrix that is decoded a few rows at a time."""
    # Decoding a tile costs one pass over its codes, whatever the number of rows of x. The tile is reused, so the
    # workspace is bounded by its size, and a large matrix never exists decoded as a whole.
    xp, rows, columns = namespace(x), out.shape[1], x.shape[1]
    tile = xp.empty((step * columns,), dtype=native_dtype(x, factor_dtype(x)), device=device_of(x))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        own = tile[: (last - first) * columns]
        decode_rows(first, last, own)
        out[:, first:last] = matmul_dense(x, xp.reshape(own, (last - first, columns)))
    return out


def _trellis_product(problem: ProductProblem) -> tuple[Array, PackedTrellis, Array]:
    """Return example arguments of a product, whose levels are small integers."""
    x, y, bits = problem.x, problem.y, min(problem.bits, 3)
    count = x.shape[1] * y.shape[1]
    levels = (np.arange(4**bits) % 7 - 3).astype(np.float32)
    packed = problem.packed[: packed_size(count, bits)]
    return x, PackedTrellis(packed, problem.scales, levels, bits, problem.block_size, count), y


@op(products=_trellis_product, record=("stored", PackedTrellis))
def matmul_trellis(x: Array, stored: PackedTrellis, out: Array) -> Array:
    """Write the product of rows and a matrix in trellis codes, decoding a few rows of the matrix at a time.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (m, k)
        Rows of inputs.
    stored : PackedTrellis
        A matrix of shape (n, k), row by row. Its lines are the rows of the matrix, or the whole matrix is one line.
        Under other lines it is decoded as a whole.
    out : array of the dtype of ``x``, shape (m, n)
        Array that is written.

    Returns
    -------
    array, shape (m, n)
        ``out``, which holds ``x @ w.T``, as :func:`matmul_dense` multiplies. The library decides the order of additions.

    Raises
    ------
    InvalidArgumentError
        If the arrays do not hold a matrix of that shape, or ``out`` cannot be written to.

    Examples
    --------
    >>> import numpy as np
    >>> levels = np.array([-1.5, -0.5, 0.5, 1.5], dtype=np.float32)
    >>> stored = PackedTrellis(np.array([3], dtype=np.uint8), np.ones(1, dtype=np.float32), levels, 1, 64, 3)
    >>> x, out = np.array([[1, 2, 4]], dtype=np.float32), np.empty((1, 1), dtype=np.float32)
    >>> matmul_trellis(x, stored, out).tolist()
    [[1.5]]
    """
    packed, scales, _, bits, block_size, length = stored
    namespace(x, packed, scales, out)
    rows, columns = out.shape[1], x.shape[1]
    stored.require_fit(rows * columns)
    require_writable(out, "out")
    step, blocks_of_row = rows, 0
    if length == columns:
        step, blocks_of_row = _rows_per_tile(rows, columns, 1, _tile_size(x)), -(-columns // block_size)
    elif length == rows * columns:
        step = _rows_per_tile(rows, columns, block_size, _tile_size(x))

    def decode_rows(first: int, last: int, tile: Array) -> None:
        """Decode a range of rows into a flat array."""
        if last - first == rows:
            decode_trellis(stored, tile)
            return
        codes, blocks = _within(first * columns, last * columns, bits, block_size)
        if blocks_of_row:
            blocks = slice(first * blocks_of_row, last * blocks_of_row)
        own = columns if blocks_of_row else (last - first) * columns
        decode_trellis(stored._replace(packed=packed[codes], scales=scales[blocks], length=own), tile)

    return _multiply_tiles(x, out, max(1, step), decode_rows)


@fitting
def matmul_dense(x: Array, weight: Array) -> Array:
    """Return the product of rows and a dense matrix.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (m, k)
        Rows of inputs.
    weight : array of float32, or of the dtype of ``x``, shape (n, k)
        Dense matrix.

    Returns
    -------
    array of the dtype of ``x``, shape (m, n)
        ``x @ weight.T``. In host memory, float16 and bfloat16 rows are multiplied as float32 copies, which processors do
        faster, and the result is rounded once. On a device the weight is rounded to the dtype of the rows, which its
        matrix units multiply; the library decides how they add, in float32 unless it is configured otherwise.

    Examples
    --------
    >>> import numpy as np
    >>> matmul_dense(np.ones((1, 2), dtype=np.float16), np.eye(2, dtype=np.float32)).tolist()
    [[1.0, 1.0]]
    """
    xp = namespace(x, weight, dtypes=FLOATS)
    own = x.dtype if dtype_name(x) == "float64" else native_dtype(x, factor_dtype(x))
    product = xp.astype(x, own, copy=False) @ xp.matrix_transpose(xp.astype(weight, own, copy=False))
    return product if product.dtype == x.dtype else storage_cast(product, dtype_name(x))


def factor_dtype(x: Array) -> str:
    """Return the dtype that a quantized weight is decoded to before rows are multiplied by it.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Rows of inputs.

    Returns
    -------
    str
        The dtype of float16 and bfloat16 rows on a device, else ``"float32"``.

    Examples
    --------
    >>> import numpy as np
    >>> factor_dtype(np.ones(1, dtype=np.float16))
    'float32'
    """
    name = dtype_name(x)
    return name if name in ("float16", "bfloat16") and not is_on_host(x) else "float32"


def _tile_size(x: Array) -> int:
    """Return how many weights are decoded at a time."""
    if not is_on_host(x):
        return _TILE_ON_DEVICE[dtype_name(x)]
    return _TILE if x.shape[0] < _MANY else _TILE_FOR_MANY


def _rows_per_tile(rows: int, columns: int, block_size: int, limit: int) -> int:
    """Return how many rows are decoded at a time, so that every tile begins with a block and with a byte.

    A weight begins a block if its index is a multiple of ``block_size``, and a byte if its bit index is a multiple of 8,
    which holds for multiples of 8 whatever the bits. So tiles of ``r`` rows need ``lcm(8, block_size)`` to divide
    ``r * columns``. The least such ``r`` is ``lcm / gcd(lcm, columns)``, and every multiple of it works.
    """
    common = math.lcm(8, block_size)
    unit = common // math.gcd(common, columns) if columns else 1
    return max(1, min(max(1, limit // max(1, unit * columns)) * unit, rows))


def _within(start: int, stop: int, bits: int, block_size: int) -> tuple[slice, slice]:
    """Return the slices of codes and scales for a range of weights that begins with a byte and with a block."""
    return slice(start * bits // 8, -(-stop * bits // 8)), slice(start // block_size, -(-stop // block_size))


@op(products=lambda problem: (problem.y, problem.x, problem.lora_A, problem.lora_B, 0.5))
def add_low_rank(y: Array, x: Array, lora_A: Array, lora_B: Array, scaling: float) -> Array:
    """Return a sum of rows and low-rank products, without forming the product of the factors.

    Parameters
    ----------
    y : array of float16, bfloat16, float32 or float64, shape (..., m)
        Rows that the product is added to.
    x : array of the same dtype, shape (..., n)
        Rows of inputs.
    lora_A, lora_B : array of the same dtype or of float32, shape (rank, n) and (m, rank)
        Low-rank factors.
    scaling : float
        Factor of the product.

    Returns
    -------
    array of the dtype of ``y``, shape (..., m)
        ``y + scaling * (x @ lora_A.T) @ lora_B.T``, rounded once. In host memory float16 and bfloat16 are widened to
        float32, as they are for the few rows that a kernel takes on a device. More rows on a device are multiplied in
        their own dtype. The library decides the order of additions.

    Examples
    --------
    >>> import numpy as np
    >>> add_low_rank(np.zeros(2), np.ones(3), np.ones((1, 3)), np.array([[1.0], [2.0]]), 0.5).tolist()
    [1.5, 3.0]
    """
    xp = namespace(y, x, lora_A, lora_B, dtypes=FLOATS)
    own = y.dtype if dtype_name(y) == "float64" else native_dtype(y, factor_dtype(x))
    # (x A^T) B^T takes rank * (n + m) multiplications per row; x (B A)^T would take n * m and form the product of the
    # factors.
    inner, outer = (xp.matrix_transpose(xp.astype(array, own, copy=False)) for array in (lora_A, lora_B))
    count = math.prod(y.shape[:-1])
    sums, rows = xp.reshape(y, (count, y.shape[-1])), xp.reshape(x, (count, x.shape[-1]))
    step = max(1, _WIDENED // max(1, *inner.shape, *outer.shape))
    if own == y.dtype or count <= step:
        return xp.reshape(_added(sums, rows, inner, outer, scaling), y.shape)
    # Wide copies of a few rows at a time stay in the cache.
    out = xp.empty(sums.shape, dtype=y.dtype, device=device_of(y))
    for first in range(0, count, step):
        last = first + step
        out[first:last, :] = _added(sums[first:last, :], rows[first:last, :], inner, outer, scaling)
    return xp.reshape(out, y.shape)


def _added(sums: Array, rows: Array, inner: Array, outer: Array, scaling: float) -> Array:
    """Return ``sums + scaling * rows @ inner @ outer``, computed in the dtype of the factors, rounded to that of the sums."""
    xp = namespace(rows)
    total = ((xp.astype(rows, inner.dtype, copy=False) @ inner) * scaling) @ outer
    total += xp.astype(sums, inner.dtype, copy=False)
    return total if total.dtype == sums.dtype else storage_cast(total, dtype_name(sums))
