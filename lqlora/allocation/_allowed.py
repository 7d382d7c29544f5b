"""Which configurations a matrix may take."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lqlora.costs.table import Configuration
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from lqlora._patterns import Pattern
    from lqlora.allocation._names import Names
    from lqlora.costs.table import CostTable

__all__ = ["Wanted", "allowed_columns"]

#: A format stands for itself at every rank.
Wanted: TypeAlias = "BlockFormat | Configuration | Iterable[BlockFormat | Configuration]"


def allowed_columns(
    table: CostTable,
    names: Names,
    fixed: Mapping[Pattern, Wanted],
    forbidden: Mapping[Pattern, Wanted],
    minimum_bits: Mapping[Pattern, float | Fraction],
) -> npt.NDArray[np.bool_]:
    """Mark what each matrix may take, mask of shape (n, k)."""
    allowed = np.isfinite(table.costs)
    for pattern, wanted in fixed.items():
        allowed[names.rows(pattern)] &= _columns(table, wanted)
    for pattern, wanted in forbidden.items():
        allowed[names.rows(pattern)] &= ~_columns(table, wanted)
    for pattern, bits in minimum_bits.items():
        rate = _rate(bits)
        for row in names.rows(pattern):
            allowed[row] &= table.sizes[row] >= math.ceil(rate * math.prod(table.shapes[row]))
    for name, row in zip(table.names, allowed, strict=True):
        if not row.any():
            raise InvalidArgumentError(f"No format is left for {name!r}.")
    return allowed


def _columns(table: CostTable, wanted: Wanted) -> npt.NDArray[np.bool_]:
    several = (wanted,) if isinstance(wanted, BlockFormat | Configuration) else tuple(wanted)
    for one in several:
        if one not in table.formats and one not in table.configurations:
            raise InvalidArgumentError(f"Format {one} is not in the cost table.")
    return np.array([own in several or own.format in several for own in table.configurations])


def _rate(bits: float | Fraction) -> Fraction:
    try:
        return bits if isinstance(bits, Fraction) else Fraction(float(bits))
    except (OverflowError, TypeError, ValueError):
        raise InvalidArgumentError(f"Minimum bits are a finite number of bits per weight, not {bits!r}.") from None
