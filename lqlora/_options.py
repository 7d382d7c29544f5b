"""Checks of options: integers, numbers, words and objects that a function takes beside its arrays."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING

from lqlora._messages import given
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any

__all__ = ["is_integer", "require_choice", "require_integer", "require_kind", "require_number"]

#: Bits of the largest integers below the largest number of float64.
_FLOAT_BITS = 1024


def is_integer(value: object) -> bool:
    """Return whether a value is an integer of Python or NumPy; True and False are not.

    Parameters
    ----------
    value : object
        Any value.

    Returns
    -------
    bool
        True if it is.
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_integer(value: object, name: str, least: int = 0, most: int | None = None) -> None:
    """Raise unless an option is an integer in its range.

    Parameters
    ----------
    value : object
        The option.
    name : str
        Its name, which the error begins with.
    least : int, default 0
        Least allowed value.
    most : int, optional
        Largest allowed value. By default there is none.

    Raises
    ------
    InvalidArgumentError
        If it is not.

    Examples
    --------
    >>> require_integer(True, "rank", 1)
    Traceback (most recent call last):
        ...
    lqlora.errors.InvalidArgumentError: rank must be an integer of at least 1, got True.
    """
    if not is_integer(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidArgumentError(f"{name} must be an integer {allowed}, got {given(value)}.")


def require_number(value: object, name: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
    """Raise unless an option is a number in its range.

    Parameters
    ----------
    value : object
        The option.
    name : str
        Its name, which the error begins with.
    allowed : str
        The range in words, such as ``"between 0 and 1"``.
    is_allowed : callable
        Function of a number: True if it is in the range. Comparisons with NaN are false, so NaN is refused.

    Raises
    ------
    InvalidArgumentError
        If it is not. True and False, arrays and tensors are not numbers.

    Examples
    --------
    >>> require_number("1", "rtol", "at least 0", lambda rtol: rtol >= 0)
    Traceback (most recent call last):
        ...
    lqlora.errors.InvalidArgumentError: rtol must be a number, at least 0, got '1'.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    is_huge = isinstance(value, int) and value.bit_length() > _FLOAT_BITS  # float64 cannot hold it
    if not is_number or is_huge or not is_allowed(value):
        what = allowed if is_number else f"a number, {allowed}"
        raise InvalidArgumentError(f"{name} must be {what}, got {given(value)}.")


def require_choice(value: object, name: str, choices: Collection[str]) -> None:
    """Raise unless an option is one of some words.

    Parameters
    ----------
    value : object
        The option.
    name : str
        Its name, which the error begins with.
    choices : collection of str
        The words.

    Raises
    ------
    InvalidArgumentError
        If it is not.

    Examples
    --------
    >>> require_choice("max", "fit", ("absmax", "scale"))
    Traceback (most recent call last):
        ...
    lqlora.errors.InvalidArgumentError: fit must be 'absmax' or 'scale', got 'max'.
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise InvalidArgumentError(
            f"{name} must be {', '.join(others)}{' or ' * bool(others)}{last}, got {given(value)}."
        )


def require_kind(value: object, name: str, kind: type | tuple[type, ...], described: str) -> None:
    """Raise unless an option is an object of some class.

    Parameters
    ----------
    value : object
        The option.
    name : str
        Its name, which the error begins with.
    kind : type or tuple of type
        Allowed classes.
    described : str
        What it must be, with an article.

    Raises
    ------
    InvalidArgumentError
        If it is not.

    Examples
    --------
    >>> require_kind([], "fixed", dict, "a mapping of patterns to formats")
    Traceback (most recent call last):
        ...
    lqlora.errors.InvalidArgumentError: fixed must be a mapping of patterns to formats, got [].
    """
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{name} must be {described}, got {given(value)}.")
