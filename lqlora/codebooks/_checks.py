"""The one check that all families share."""

from __future__ import annotations

from lqlora.errors import InvalidArgumentError


def require_whole(subject: str, value: object, low: int, high: int, unit: str = "bits") -> None:
    """Raise unless a value is an integer in a range; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgumentError(f"{subject} {low} to {high} {unit}, not {value!r}.")
