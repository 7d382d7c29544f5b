"""Matrices in blocks along their rows, which layouts of other programs hold: why others do not fit, and their scales and zero points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora.quantized._decoding import decode_scales, zero_point_codes

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.quantized import QuantizedArray

__all__ = ["row_fault", "row_scales", "row_zero_points"]


def row_fault(q: QuantizedArray, program: str) -> str:
    """Return why a quantized array is not one matrix of whole blocks along its rows; nothing if it is.

    Parameters
    ----------
    q : QuantizedArray
        Array of any library.
    program : str
        Name of the program, for the sentence.

    Returns
    -------
    str
        A sentence.
    """
    fmt, shape = q.format, q.shape
    if fmt.rotation is not None:
        return f"rotation must be None for {program}, which stores weights as they are, got {fmt}."
    if q.batch_shape or len(shape) != 2:
        return f"q must be one matrix for {program}, got shape {shape}."
    if fmt.axis not in (None, -1, 1) or not min(shape) or shape[1] % fmt.block_size:
        return f"blocks must be along the rows and divide them for {program}, got {fmt} for shape {shape}."
    return ""


def row_scales(q: QuantizedArray) -> npt.NDArray[np.float32]:
    """Return the decoded scales of a matrix that :func:`row_fault` lets pass.

    Parameters
    ----------
    q : QuantizedArray of shape (m, n)
        The matrix, as NumPy arrays.

    Returns
    -------
    ndarray of float32, shape (m, n / block_size)
        A row for each row of the matrix.

    Raises
    ------
    NonFiniteError
        If a scale is NaN or infinite.
    """
    scales = decode_scales(q.scales, q.format.scales)
    ops.require_finite(scales, "scales")
    return np.asarray(scales, np.float32).reshape(q.shape[0], -1)


def row_zero_points(q: QuantizedArray) -> npt.NDArray[np.uint8]:
    """Return the zero points of an affine matrix that :func:`row_fault` lets pass.

    Parameters
    ----------
    q : QuantizedArray of shape (m, n)
        The matrix, as NumPy arrays.

    Returns
    -------
    ndarray of uint8, shape (m, n / block_size)
        A row for each row of the matrix.
    """
    return np.asarray(zero_point_codes(q)).reshape(q.shape[0], -1)
