"""Gram matrices: checks of second moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._dispatch import fitting, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.ops.casting import widen
from lqlora.ops.finite import require_finite

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["symmetric_moment"]

#: Largest difference between mirrored entries, relative to the largest entry. Products in float16 come that close.
_ASYMMETRY = 1e-3


@fitting
def symmetric_moment(gram: Array, what: str) -> Array:
    """Return a Gram matrix in float64, symmetric to the last bit.

    Parameters
    ----------
    gram : array of a floating-point dtype, shape (n, n)
        Matrix, symmetric up to rounding. Whether it is positive semidefinite is checked when it is factored.
    what : str
        Name of the matrix in errors, such as ``"the gram"``.

    Returns
    -------
    array of float64, shape (n, n)
        The mean of the matrix and its transpose.

    Raises
    ------
    InvalidArgumentError
        If it is not square, or an entry and its mirror image differ by more than 1e-3 of the largest entry.
    NonFiniteError
        If an entry is NaN or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> symmetric_moment(np.array([[2.0, 1.0], [1.0009765625, 3.0]]), "the gram").tolist()
    [[2.0, 1.00048828125], [1.00048828125, 3.0]]
    """
    gram = widen(gram, what)
    if len(gram.shape) != 2 or gram.shape[0] != gram.shape[1]:
        raise InvalidArgumentError(f"{what} must be square, got shape {tuple(gram.shape)}.")
    require_finite(gram, what)
    xp = namespace(gram)
    wide = xp.astype(gram, xp.float64)
    largest = float(xp.max(xp.abs(wide))) if 0 not in gram.shape else 0.0
    # Large entries are halved before they are added, so that no sum overflows, and small ones after it, so that
    # subnormal numbers lose no bit.
    before, after = (2.0, 1.0) if largest > 1 else (1.0, 2.0)
    part = wide / before
    turned = xp.matrix_transpose(part)
    # Products of float16 inputs come with rounding errors that differ across the diagonal. Larger differences show
    # another matrix than a second moment, for example weights passed by mistake.
    if largest and float(xp.max(xp.abs(part - turned))) / (largest / before) > _ASYMMETRY:
        raise InvalidArgumentError(
            f"{what} must be symmetric, got mirrored entries that differ by more than {_ASYMMETRY} of the largest."
        )
    return (part + turned) / after
