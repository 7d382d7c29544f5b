"""The Codebook class: levels, cell boundaries and normalization of a block."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lqlora._annotations import annotated_class
from lqlora._dispatch import array_library, plain_array
from lqlora._options import require_choice
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora._typing import Array

__all__ = ["Codebook", "Normalization", "StoredNormalization", "cell_boundaries"]

#: Rule that maps the entries of a block to the range of the levels before they are rounded.
Normalization: TypeAlias = Literal["absmax", "signed", "affine"]
#: The same, and the root mean square of a block, which the codebooks of trellis codes have.
StoredNormalization: TypeAlias = Literal["absmax", "signed", "affine", "rms"]

_MAX_LEVELS = 256


@annotated_class
@dataclass(frozen=True, eq=False)
class Codebook:
    """Sorted levels, with the boundaries of their rounding cells and the normalization of a block.

    Pass one to :class:`lqlora.BlockFormat` to quantize with levels of your own.

    Parameters
    ----------
    levels : sequence of float, length 2 to 256
        Finite values, strictly increasing after rounding to float32, in which they are kept. One exception: -0.0 may
        stand directly before 0.0. The length need not be a power of two; some codes then stay unused.
    name : str, optional
        Name in the spelling of a format: a letter, then letters, digits, ``_``, ``.`` and ``-``. Files store the name
        alone if :func:`lqlora.codebooks.by_name` restores the codebook from it, else the levels too.
    normalization : {"absmax", "signed", "affine"}, optional
        ``"absmax"`` divides a block by its largest absolute value, so scales are never negative. ``"signed"`` divides a
        block by its entry of largest magnitude with its sign, so that this entry becomes 1 and scales may be negative.
        ``"affine"`` decodes an entry as ``scale * (level - zero_point)``; the levels must be the integers 0 to
        ``2**bits - 1``, or their products with a power of two that stay below 256.

    Attributes
    ----------
    levels : ndarray of float32, shape (n,)
        The levels, read-only.
    boundaries : ndarray of float32, shape (n - 1,)
        Midpoints of neighboring levels, rounded to float32. A value equal to a boundary is rounded to the lower level.
        Between -0.0 and 0.0 the boundary is the largest negative normal number, so that zero of either sign becomes
        0.0.

    Raises
    ------
    InvalidArgumentError
        If the levels are not 2 to 256 finite numbers that strictly increase in float32, if they contradict the
        normalization, or if the name has a character that the spelling of a format does not allow.

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
    normalization: StoredNormalization = "absmax"
    boundaries: npt.NDArray[np.float32] = field(init=False, repr=False)

    def __init__(
        self,
        levels: Sequence[float] | npt.NDArray[np.floating],
        name: str = "custom",
        normalization: Normalization = "absmax",
    ) -> None:
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which _check_levels refuses
            values = np.array(_numbers(levels), dtype=np.float32)  # a copy: it is made read-only below
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) is None:
            raise InvalidArgumentError(
                f"name must be a letter followed by letters, digits, '_', '.' or '-', as in formats, got {name!r}."
            )
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
    def zero_point_bits(self) -> int:
        """Bits of the zero point of a block: those of a code, and one more for each factor of two in the levels. 0 if not affine."""
        return self.bits + int(self.levels[1]).bit_length() - 1 if self.normalization == "affine" else 0

    @property
    def widest(self) -> float:
        """Level that the largest entry of a block is scaled to: the largest in magnitude, or the last one if signed."""
        return float(self.levels[-1] if self.normalization == "signed" else np.abs(self.levels).max())

    def __len__(self) -> int:
        """Return the number of levels."""
        return len(self.levels)

    def __repr__(self) -> str:
        """Return the name and how many levels there are; the levels themselves of one without a name."""
        levels = self.levels.tolist()
        shown = levels if self.name == "custom" else f"{len(levels)} from {levels[0]:g} to {levels[-1]:g}"
        return f"Codebook(name={self.name!r}, levels={shown}, normalization={self.normalization!r})"

    def __eq__(self, other: object) -> bool:
        """Compare the levels bit by bit, and the normalization; names are ignored."""
        return isinstance(other, Codebook) and self._identity() == other._identity()

    def __hash__(self) -> int:
        """Hash the levels and the normalization."""
        return hash(self._identity())

    def _identity(self) -> tuple[bytes, str]:
        return self.levels.tobytes(), self.normalization


def _twin_zeros(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return a mask of the pairs of neighbors that are -0.0 and 0.0, in this order."""
    zero, negative = values == 0, np.signbit(values)
    twins: npt.NDArray[np.bool_] = zero[:-1] & zero[1:] & negative[:-1] & ~negative[1:]
    return twins


def _numbers(levels: Sequence[float] | Array) -> Any:
    """Return levels as a NumPy array, or as a list of what Python takes for numbers."""
    if hasattr(levels, "dtype") or isinstance(levels, str | bytes) or not isinstance(levels, Iterable):
        array = plain_array(levels, "levels")
        return array if array_library(array) == "numpy" else array.tolist()
    numbers = [*levels]
    if wrong := [
        level for level in numbers if not isinstance(level, int | float | np.number) or isinstance(level, bool)
    ]:
        raise InvalidArgumentError(f"levels must be numbers, got {type(wrong[0]).__name__}.")
    return numbers


def _check_levels(values: npt.NDArray[np.float32]) -> None:
    if values.ndim != 1 or not 2 <= values.size <= _MAX_LEVELS:
        raise InvalidArgumentError(
            f"levels must be a sequence of 2 to {_MAX_LEVELS} numbers, got an array of shape {values.shape}."
        )
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InvalidArgumentError(f"levels must be finite in float32, got {values[index]} at index {index}.")
    increasing = (values[1:] > values[:-1]) | _twin_zeros(values)
    if not increasing.all():
        index = int(np.flatnonzero(~increasing)[0])
        raise InvalidArgumentError(
            f"levels must strictly increase in float32, got {values[index]} before {values[index + 1]} "
            f"at index {index}."
        )


def _check_normalization(values: npt.NDArray[np.float32], normalization: object) -> None:
    require_choice(normalization, "normalization", get_args(Normalization))
    if normalization == "signed" and values[-1] <= 0:
        raise InvalidArgumentError(f"levels must end above 0 for normalization='signed', got {values[-1]}.")
    if normalization == "affine" and not _are_steps(values):
        raise InvalidArgumentError(
            "levels must be the integers 0 to 2**bits - 1 for normalization='affine', or these times a power of two, below 256, got "
            f"{values.size} levels from {values[0]} to {values[-1]}. lqlora.affine(bits) returns them."
        )


def _are_steps(values: npt.NDArray[np.float32]) -> bool:
    """Return whether levels are ``2**b`` multiples of a power of two, from zero, all below 256."""
    steps = [2**power for power in range(8)]
    return values.size in (2 * step for step in steps) and any(
        np.array_equal(values, step * np.arange(values.size)) for step in steps if step * values.size <= _MAX_LEVELS
    )


def cell_boundaries(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the boundaries between the cells of sorted levels; a value above a boundary has a higher level.

    Parameters
    ----------
    levels : ndarray of float32, shape (n,)
        Levels in ascending order.

    Returns
    -------
    ndarray of float32, shape (n - 1,)
        Midpoints, rounded to float32. The boundary between two zeros is negative, so that zero gets the upper one.

    Examples
    --------
    >>> cell_boundaries(np.array([-1, 0, 3], dtype=np.float32)).tolist()
    [-0.5, 1.5]
    """
    wide = levels.astype(np.float64)
    middles = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
    # A normal number: devices that flush subnormal numbers to zero would otherwise send 0.0 to the code of -0.0.
    middles[(levels[1:] == 0) & (levels[:-1] == 0)] = -np.finfo(np.float32).tiny
    # The replaced boundary may lie below its predecessor if the level before -0.0 is subnormal.
    boundaries: npt.NDArray[np.float32] = np.maximum.accumulate(middles)
    return boundaries
