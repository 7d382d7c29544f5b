"""Matrices and layers, chosen by name."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Pattern", "Patterns", "as_patterns", "matches"]

#: A shell pattern, a compiled regular expression that matches the whole name, or a function of the name.
Pattern: TypeAlias = "str | re.Pattern[str] | Callable[[str], bool]"

#: One pattern or several.
Patterns: TypeAlias = "Pattern | Iterable[Pattern]"


def as_patterns(patterns: Patterns) -> tuple[Pattern, ...]:
    """Return one pattern, or several, as a tuple.

    Parameters
    ----------
    patterns : pattern or iterable of patterns
        What a caller gave.

    Returns
    -------
    tuple of patterns
        In the same order.
    """
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        return (patterns,)
    return tuple(patterns)


def matches(name: str, pattern: Pattern) -> bool:
    """Tell whether a name matches a pattern.

    Parameters
    ----------
    name : str
        Name of a matrix or layer.
    pattern : pattern
        A name is also a pattern for itself, whatever characters it has.

    Returns
    -------
    bool
        True if the whole name matches.

    Examples
    --------
    >>> matches("layers.0.q", "layers.*.q"), matches("layers.0.q", re.compile("layers")), matches("a[0]", "a[0]")
    (True, False, True)
    """
    if isinstance(pattern, str):
        return name == pattern or fnmatch.fnmatchcase(name, pattern)
    return pattern.fullmatch(name) is not None if isinstance(pattern, re.Pattern) else bool(pattern(name))
