r"""Rotated formats: the array that is stored, and products with it.

With the rotations :math:`R_n` of the inputs and :math:`R_m` of the outputs, the stored array is :math:`W' = R_m W R_n^T`. All code below
this module knows only the stored array, in the format without its rotation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat, Rotation
    from lqlora.quantized.array import QuantizedArray

__all__ = ["as_rotated", "as_stored", "product", "rotated", "unrotate"]


def as_stored(q: QuantizedArray) -> QuantizedArray:
    """Return the stored array of a quantized one: its dense values are those of the rotated array."""
    return q if q.format.rotation is None else replace(q, format=q.format.unrotated)


def as_rotated(stored: QuantizedArray, fmt: BlockFormat) -> QuantizedArray:
    """Return the quantized array of a stored one: the inverse of :func:`as_stored`. Levels may have been fitted meanwhile."""
    return replace(stored, format=replace(stored.format, rotation=fmt.rotation))


def rotated(array: Array, rotation: Rotation, name: str, *, check_finite: bool = True) -> Array:
    """Return ``R_m @ array @ R_n.T``, for each array of a stack.

    Raises
    ------
    NonFiniteError
        If an entry is NaN or infinite, or so large that sums of entries may be.
    """
    array = given = ops.widen(array, name)
    if check_finite:  # a rotation spreads NaN over its line
        ops.require_finite(array, name)
    for axis, seed in rotation.seeds.items():
        array = ops.rotate(array, seed, axis=axis, out=None if array is given else array)
    if check_finite and 0 not in array.shape:
        xp = namespace(array)
        # Values are rotated back with their errors, which may be as large as they are.
        largest, limit = max(float(xp.max(array)), -float(xp.min(array))), float(xp.finfo(array.dtype).max) / 4
        if not largest <= limit:
            raise NonFiniteError(
                f"{name} must be small enough to be rotated, at most about {limit:.1e}, got sums up to {largest:.1e}."
            )
    return array


def unrotate(dense: Array, rotation: Rotation) -> Array:
    """Replace a rotated array by ``R_m.T @ dense @ R_n``, in its memory: the inverse of :func:`rotated`, up to rounding."""
    for axis, seed in rotation.seeds.items():
        ops.rotate(dense, seed, axis=axis, inverse=True, out=dense)
    return dense


def product(
    x: Array, q: QuantizedArray, multiply: Callable[[Array, QuantizedArray], Array], *, adjoint: bool = False
) -> Array:
    """Return the product of rows and a quantized matrix, given a function for products with the stored one.

    Parameters
    ----------
    x : array, shape (..., n), or (..., m) if adjoint
        Rows.
    q : QuantizedArray of shape (m, n)
        Matrix.
    multiply : callable
        Function that multiplies rows by the transpose of a stored matrix, or by itself if adjoint.
    adjoint : bool
        True multiplies by the matrix, False by its transpose.

    Returns
    -------
    array
        Products.
    """
    if q.format.rotation is None:
        return multiply(x, q)
    # x W^T = x R_n^T W'^T R_m. A row x R_n^T is the rotated row x, and a row y R_m is the row y rotated back.
    seeds, (before, after) = q.format.rotation.seeds, (-2, -1) if adjoint else (-1, -2)
    y = multiply(ops.rotate_rows(x, seeds[before]) if before in seeds else x, as_stored(q))
    return ops.rotate_rows(y, seeds[after], inverse=True) if after in seeds else y
