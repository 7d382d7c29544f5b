"""From weights to packed codes and back, given the scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import array_api_compat
import numpy as np

from lqlora._dispatch import namespace, op
from lqlora.ops.blocks import from_blocks, to_blocks
from lqlora.ops.packing import pack_codes, unpack_codes

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["decode", "encode", "nearest_codes"]

#: Up to this many boundaries, counting those below a value beats a binary search on every library measured.
_FEW = 15


def nearest_codes(values: Array, boundaries: npt.NDArray[np.float32]) -> Array:
    """Index of the cell each value falls into.

    Parameters
    ----------
    values : array of float32 or float64
        Normalized weights, any shape. Infinite values take the first or the last cell.
    boundaries : ndarray of float32, shape (n - 1,)
        Sorted boundaries between the cells.

    Returns
    -------
    array of uint8, same shape as ``values``
        The number of boundaries strictly below the value: at a boundary the lower index wins.

    Examples
    --------
    >>> import numpy as np
    >>> nearest_codes(np.array([-2.0, 0.5, 0.6]), np.array([-0.5, 0.5], dtype=np.float32)).tolist()
    [0, 1, 2]
    """
    xp = namespace(values)
    if len(boundaries) > _FEW:
        # A copy of the boundaries, as torch warns of memory it may not write to; flat, as it warns of strided values.
        cells = xp.asarray(boundaries.copy(), dtype=values.dtype, device=array_api_compat.device(values))
        codes = xp.searchsorted(cells, xp.reshape(values, (-1,)), side="left")
        return xp.reshape(xp.astype(codes, xp.uint8), values.shape)
    codes = xp.zeros(values.shape, dtype=xp.uint8, device=array_api_compat.device(values))
    for boundary in boundaries.tolist():
        codes += xp.astype(values > boundary, xp.uint8)
    return codes


@op
def encode(flat: Array, scales: Array, boundaries: npt.NDArray[np.float32], bits: int, block_size: int) -> Array:
    """Divide each block by its scale, round to the nearest level, pack.

    Parameters
    ----------
    flat : array of float32 or float64, shape (n,)
        Weights.
    scales : array of the same dtype, shape (ceil(n / block_size),)
        Scales as they will be decoded, not negative. A block whose scale is zero is encoded as zeros.
    boundaries : ndarray of float32
        Boundaries of the codebook.
    bits : int
        Bits per code.
    block_size : int
        Weights per scale.

    Returns
    -------
    array of uint8, shape (ceil(n * bits / 8),)
        Packed codes.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; encoding is against the decoded scale, as in its published code.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> encode(np.array([-2.0, 2.0]), np.array([2.0]), lq.NF4.boundaries, 4, 64).tolist()
    [240]
    """
    xp = namespace(flat, scales)
    column = scales[:, None]
    positive = column > 0
    ones = xp.ones_like(column)
    with np.errstate(over="ignore"):  # a weight far above its decoded scale rounds to the outermost level
        normalized = to_blocks(flat, block_size) / xp.where(positive, column, ones)
    normalized = xp.where(positive, normalized, xp.zeros_like(column))
    codes = nearest_codes(normalized, boundaries)
    return pack_codes(from_blocks(codes, flat.shape[0]), bits)


@op
def decode(
    packed: Array, scales: Array, levels: npt.NDArray[np.float32], bits: int, block_size: int, count: int
) -> Array:
    """Look the codes up and multiply by the scales.

    Parameters
    ----------
    packed : array of uint8, shape (ceil(count * bits / 8),)
        Packed codes.
    scales : array of float32, shape (ceil(count / block_size),)
        Decoded scales.
    levels : ndarray of float32
        Levels of the codebook; every code must be below their number.
    bits : int
        Bits per code.
    block_size : int
        Weights per scale.
    count : int
        Number of weights.

    Returns
    -------
    array of float32, shape (count,)
        ``levels[code] * scale``: one multiplication, rounded once.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> one = np.ones(1, dtype=np.float32)
    >>> decode(np.array([240], dtype=np.uint8), 2 * one, lq.NF4.levels, 4, 64, 2).tolist()
    [-2.0, 2.0]
    """
    xp = namespace(packed, scales)
    codes = xp.astype(unpack_codes(packed, bits, count), xp.int64)
    table = xp.asarray(levels.copy(), dtype=xp.float32, device=array_api_compat.device(packed))
    blocks = to_blocks(xp.take(table, codes), block_size)
    return from_blocks(blocks * scales[:, None], count)
