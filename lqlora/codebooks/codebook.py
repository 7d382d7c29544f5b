"""The codebook itself: levels, boundaries, and how a block is normalized."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Codebook", "Normalization", "cell_boundaries"]

#: What a block is divided by, or shifted by, before its entries are rounded to levels.
Normalization: TypeAlias = Literal["absmax", "signed", "affine"]

_MAX_LEVELS = 256


@dataclass(frozen=True, eq=False)
class Codebook:
    """Sorted levels, the boundaries between the cells that are rounded to them, and the normalization they are for.

    Parameters
    ----------
    levels : sequence of float, length 2 to 256
        Strictly increasing finite values, kept as float32, except that -0.0 may stand directly before 0.0. A length
        that is no power of two is allowed: the codes then do not use all their bits.
    name : str, optional
        How plans and reports spell it: a letter, then letters, digits, ``_``, ``.`` and ``-``. Codebooks with a name
        that :func:`lqlora.codebooks.by_name` knows are not stored in files.
    normalization : {"absmax", "signed", "affine"}, optional
        ``"absmax"``: a block is divided by its largest absolute value, so its scale is not negative. ``"signed"``: a
        block is divided by its entry of largest magnitude, sign included, so that this entry becomes 1 and the scale
        may be negative. ``"affine"``: an entry is its code, less the zero point of its block, times the scale; the
        levels are then the integers 0 to ``2**bits - 1``.

    Attributes
    ----------
    levels : ndarray of float32, shape (n,)
        Read-only.
    boundaries : ndarray of float32, shape (n - 1,)
        Midpoints of neighboring levels, rounded to float32. A value equal to a boundary belongs to the lower level.
        Between -0.0 and 0.0 it is the negative normal number next to zero, so that zero of either sign becomes 0.0.

    Raises
    ------
    InvalidArgumentError
        If the levels are not 2 to 256 strictly increasing finite numbers (after rounding to float32), if they do not
        suit the normalization, or if the name has characters that the spelling of a format does not allow.

    References
    ----------
    ``"absmax"``: QLoRA, arXiv 2305.14314, equation 1. ``"signed"``: BOF4, arXiv 2505.06653, equation 4.
    ``"affine"``: PEQA, arXiv 2305.14152, equation 1.

    Examples
    --------
    >>> ternary = Codebook([-1, 0, 1], name="ternary")
    >>> ternary.bits, ternary.boundaries.tolist()
    (2, [-0.5, 0.5])
    """

    levels: npt.NDArray[np.float32]
    name: str = "custom"
    normalization: Normalization = "absmax"
    boundaries: npt.NDArray[np.float32] = field(init=False, repr=False)

    def __init__(
        self,
        levels: Sequence[float] | npt.NDArray[np.floating],
        name: str = "custom",
        normalization: Normalization = "absmax",
    ) -> None:
        with np.errstate(over="ignore"):  # what overflows is refused below
            values = np.array(levels, dtype=np.float32)  # a copy: the caller's array stays his own
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) is None:
            raise InvalidArgumentError(f"A codebook is named by letters, digits, '_', '.' and '-', not {name!r}.")
        _check_levels(values)
        _check_normalization(values, normalization)
        boundaries = cell_boundaries(values)
        values.flags.writeable = boundaries.flags.writeable = False
        attributes = {"levels": values, "name": name, "normalization": normalization, "boundaries": boundaries}
        for attribute, value in attributes.items():
            object.__setattr__(self, attribute, value)

    @property
    def bits(self) -> int:
        """Bits of one code, ``ceil(log2(number of levels))``."""
        return (len(self.levels) - 1).bit_length()

    @property
    def widest(self) -> float:
        """The level that the largest entry of a block is scaled to: the largest absolute one, or the last if signed."""
        return float(self.levels[-1] if self.normalization == "signed" else np.abs(self.levels).max())

    def __len__(self) -> int:
        """Return the number of levels."""
        return len(self.levels)

    def __eq__(self, other: object) -> bool:
        """Compare levels bit for bit, and normalizations; the name does not count."""
        return isinstance(other, Codebook) and self._identity() == other._identity()

    def __hash__(self) -> int:
        """Hash the levels and the normalization."""
        return hash(self._identity())

    def _identity(self) -> tuple[bytes, str]:
        return self.levels.tobytes(), self.normalization


def _twin_zeros(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Where -0.0 stands directly before 0.0."""
    zero, negative = values == 0, np.signbit(values)
    twins: npt.NDArray[np.bool_] = zero[:-1] & zero[1:] & negative[:-1] & ~negative[1:]
    return twins


def _check_levels(values: npt.NDArray[np.float32]) -> None:
    if values.ndim != 1 or not 2 <= values.size <= _MAX_LEVELS:
        raise InvalidArgumentError(f"A codebook has 2 to {_MAX_LEVELS} levels in one dimension, not {values.shape}.")
    if not np.isfinite(values).all() or not ((values[1:] > values[:-1]) | _twin_zeros(values)).all():
        raise InvalidArgumentError("The levels of a codebook must be finite and strictly increasing in float32.")


def _check_normalization(values: npt.NDArray[np.float32], normalization: object) -> None:
    if normalization not in get_args(Normalization):
        raise InvalidArgumentError(f"A block is normalized by 'absmax', 'signed' or 'affine', not {normalization!r}.")
    if normalization == "signed" and values[-1] <= 0:
        raise InvalidArgumentError("A signed codebook needs a largest level above zero.")
    count = values.size
    if normalization == "affine" and (count & (count - 1) or (values != np.arange(count)).any()):
        raise InvalidArgumentError("The levels of an affine codebook are the integers from 0 to 2**bits - 1.")


def cell_boundaries(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Boundaries between the cells of levels: what is above one of them is rounded to a higher level.

    Parameters
    ----------
    levels : ndarray of float32, shape (n,)
        In ascending order.

    Returns
    -------
    ndarray of float32, shape (n - 1,)
        Midpoints, rounded to float32. Between two zeros it is below zero, so that zero is rounded to the upper one.

    Examples
    --------
    >>> cell_boundaries(np.array([-1, 0, 3], dtype=np.float32)).tolist()
    [-0.5, 1.5]
    """
    wide = levels.astype(np.float64)
    middles = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
    # A normal number, as some devices read smaller ones as zero.
    middles[(levels[1:] == 0) & (levels[:-1] == 0)] = -np.finfo(np.float32).tiny
    boundaries: npt.NDArray[np.float32] = np.maximum.accumulate(middles)
    return boundaries
