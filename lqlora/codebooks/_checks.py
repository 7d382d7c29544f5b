"""Range check of the integer parameters of all codebook families."""

from __future__ import annotations

from lqlora.errors import InvalidArgumentError


def require_integer(parameter: str, value: object, low: int, high: int, family: str) -> None:
    """Raise unless a parameter is an integer in its range; True and False are not integers here."""
    # isinstance comes first: the constructors are cached with typed=True, so 4.0 and True reach this check.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgumentError(f"{parameter} must be an integer from {low} to {high} for {family}, got {value!r}.")
