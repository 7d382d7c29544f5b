"""Blocks of a flat array: as rows, and their absolute maxima and extremes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._dispatch import STORABLE, device_of, fitting, namespace, op
from lqlora.ops.casting import widen

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["block_absmax", "block_extremes", "from_blocks", "to_blocks"]


@fitting
def to_blocks(flat: Array, block_size: int) -> Array:
    """Split a flat array into blocks, one per row.

    Parameters
    ----------
    flat : array, shape (n,)
        Array of any dtype.
    block_size : int
        Entries per block, at least 1.

    Returns
    -------
    array, shape (ceil(n / block_size), min(block_size, n))
        Rows. Zeros pad the last one, since they raise no absolute maximum. A block is at most as long as the array.

    Examples
    --------
    >>> import numpy as np
    >>> to_blocks(np.array([1, 2, 3]), 2).tolist()
    [[1, 2], [3, 0]]
    """
    xp = namespace(flat, dtypes=STORABLE)
    block_size = max(1, min(block_size, flat.shape[0]))
    tail = -flat.shape[0] % block_size
    if tail:
        padding = xp.zeros((tail,), dtype=flat.dtype, device=device_of(flat))
        flat = xp.concat([flat, padding])
    return xp.reshape(flat, (-1, block_size))


@fitting
def from_blocks(blocks: Array, count: int) -> Array:
    """Join rows of blocks to a flat array: the inverse of :func:`to_blocks`.

    Parameters
    ----------
    blocks : array, shape (n_blocks, block_size)
        Rows of blocks.
    count : int
        Number of entries without the padding.

    Returns
    -------
    array, shape (count,)
        The entries in order.

    Examples
    --------
    >>> import numpy as np
    >>> from_blocks(np.array([[1, 2], [3, 0]]), 3).tolist()
    [1, 2, 3]
    """
    return namespace(blocks, dtypes=STORABLE).reshape(blocks, (-1,))[:count]


@op(examples=lambda problem: (problem.weights, problem.block_size))
def block_absmax(flat: Array, block_size: int) -> Array:
    """Return the largest absolute value of each block.

    Parameters
    ----------
    flat : array of float16, bfloat16, float32 or float64, shape (n,)
        Values. The maximum of a block with a NaN is NaN.
    block_size : int
        Entries per block; the last block may be short.

    Returns
    -------
    array of float32, or float64 for float64, shape (ceil(n / block_size),)
        Absolute maxima.

    Examples
    --------
    >>> import numpy as np
    >>> block_absmax(np.array([1.0, -3.0, 2.0]), 2).tolist()
    [3.0, 2.0]
    """
    xp = namespace(flat, dtypes=STORABLE)
    blocks = to_blocks(widen(flat, "flat"), block_size)
    if blocks.shape[0] == 0:  # a maximum over an empty array is not defined, not even along a non-empty axis
        return xp.reshape(blocks, (0,))
    return xp.max(xp.abs(blocks), axis=1)


@op(examples=lambda problem: (problem.weights, problem.block_size))
def block_extremes(flat: Array, block_size: int) -> tuple[Array, Array]:
    """Return the smallest and largest value of each block, zero included.

    Parameters
    ----------
    flat : array of float16, bfloat16, float32 or float64, shape (n,)
        Values. Both extremes of a block with a NaN are NaN.
    block_size : int
        Entries per block; the last block may be short.

    Returns
    -------
    tuple of array of float32, or float64 for float64, shape (ceil(n / block_size),)
        Minima, which are at most zero, and maxima, which are at least zero.

    Examples
    --------
    >>> import numpy as np
    >>> [x.tolist() for x in block_extremes(np.array([1.0, -3.0, 2.0]), 2)]
    [[-3.0, 0.0], [1.0, 2.0]]
    """
    xp = namespace(flat, dtypes=STORABLE)
    blocks = to_blocks(widen(flat, "flat"), block_size)
    if blocks.shape[0] == 0:
        return xp.reshape(blocks, (0,)), xp.reshape(blocks, (0,))
    low, high = xp.min(blocks, axis=1), xp.max(blocks, axis=1)
    zero = xp.zeros_like(low)
    # Comparisons with NaN are false, so NaN passes and reaches the check for finite values. Adding +0.0 turns -0.0 into
    # +0.0, and changes nothing else: backends that compare bits would tell the two zeros apart.
    return xp.where(low > 0, zero, low) + zero, xp.where(high < 0, zero, high) + zero
