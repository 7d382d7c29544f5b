"""Checks of importance arrays, shared by all weightings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora._warnings import warn
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["is_zero", "require_importance", "require_matrix", "warn_of_zeros"]


def is_zero(importance: Array) -> bool:
    """Return whether an array has entries and all of them are zero."""
    return 0 not in importance.shape and not bool(namespace(importance).any(importance != 0))


def warn_of_zeros(name: str) -> None:
    """Warn that an array of zeros is replaced by equal importance."""
    warn(
        f"{name} must have entries above zero, got only zeros. Equal importance is used instead: check that statistics were collected."
    )


def require_importance(importance: Array, name: str) -> None:
    """Raise unless all values are finite and not negative."""
    ops.require_finite(importance, name)
    xp = namespace(importance)
    if bool(xp.any(importance < 0)):
        raise InvalidArgumentError(
            f"{name} must not be negative, got {float(xp.min(importance))!r}. "
            "Pass mean squares, such as the diagonal of the Fisher information."
        )


def require_matrix(importance: Array, name: str) -> None:
    """Raise unless an array has two dimensions."""
    if len(importance.shape) != 2:
        raise InvalidArgumentError(f"{name} must have two dimensions, got shape {tuple(importance.shape)}.")
