"""What weights must be."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["capitalized", "is_zero", "require_weights", "warn_of_zeros"]


def capitalized(what: str) -> str:
    """Return a text that can begin a sentence."""
    return what[0].upper() + what[1:]


def is_zero(weights: Array) -> bool:
    """Tell whether there are weights, and all are zero."""
    return 0 not in weights.shape and not bool(namespace(weights).any(weights != 0))


def warn_of_zeros(what: str, stacklevel: int) -> None:
    """Say that weights of zero count as none."""
    warnings.warn(f"All {what} are zero: all count the same.", UserWarning, stacklevel=stacklevel + 1)


def require_weights(weights: Array, what: str) -> None:
    """Raise unless all weights are finite and not negative."""
    ops.require_finite(weights, what)
    if bool(namespace(weights).any(weights < 0)):
        raise InvalidArgumentError(f"{capitalized(what)} must not be negative.")
