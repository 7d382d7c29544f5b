"""Range check of the integer parameters of all codebook families, and the cache of their constructors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lqlora._messages import given
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def cached(maxsize: int | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that keeps results by arguments; arguments that cannot be hashed reach the function."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        """Return the function with a cache."""
        # Arguments of another type are another entry, so 4.0 and True do not find the result for 4 and 1.
        kept: Callable[..., R] = functools.lru_cache(maxsize, typed=True)(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            """Return the result that is kept, or compute it."""
            try:
                hash((args, *kwargs.values()))
            except TypeError:
                return function(*args, **kwargs)
            return kept(*args, **kwargs)

        call.cache_info, call.cache_clear = kept.cache_info, kept.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate


def require_integer(parameter: str, value: object, low: int, high: int, family: str) -> None:
    """Raise unless a parameter is an integer in its range; True and False are not integers here."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgumentError(
            f"{parameter} must be an integer from {low} to {high} for {family}, got {given(value)}."
        )
