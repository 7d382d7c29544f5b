"""What the words of a command line stand for."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from lqlora.allocation.ties import experts, fused_projections
from lqlora.costs.grids import paper_grid
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.recipes.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lqlora._patterns import Pattern
    from lqlora.allocation.ties import Tie

__all__ = ["read_bytes", "read_formats", "read_number", "read_numbers", "read_pairs", "read_pattern", "read_ties"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def read_formats(text: str) -> list[BlockFormat]:
    """Read formats, separated by commas; ``few``, ``paper`` and ``code`` are lists of them."""
    found: list[BlockFormat] = []
    for word in _words(text):
        if word == "few":
            found += Settings.formats
        elif word in ("paper", "code"):
            found += paper_grid(word)  # type: ignore[arg-type] # as the line above says
        else:
            found.append(BlockFormat.parse(word))
    return list(dict.fromkeys(found))


def read_numbers(text: str) -> list[int]:
    """Read whole numbers, separated by commas."""
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise InvalidArgumentError(f"{text!r} are not whole numbers, separated by commas.") from None


def read_number(text: str) -> Fraction:
    """Read a number exactly: 2.7 is 27/10."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InvalidArgumentError(f"{text!r} is no number.") from None


def read_bytes(text: str) -> int:
    """Read a number of bytes: ``400000000``, ``400MB`` or ``1.5GiB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmg]i?)?b)?", text.strip().lower())
    if found is None:
        raise InvalidArgumentError(f"{text!r} is no number of bytes, such as 400MB or 1.5GiB.")
    return int(Fraction(found[1]) * _UNITS[found[2] or ""])


def read_pattern(text: str) -> Pattern:
    """Read a shell pattern, or a regular expression after ``re:``."""
    if not text.startswith("re:"):
        return text
    try:
        return re.compile(text.removeprefix("re:"))
    except re.error as error:
        raise InvalidArgumentError(f"{text!r} is no regular expression: {error}.") from None


def read_pairs(texts: Iterable[str]) -> dict[Pattern, str]:
    """Read ``PATTERN=VALUE`` each."""
    found = {}
    for text in texts:
        pattern, sign, value = text.rpartition("=")
        if not sign or not pattern or not value:
            raise InvalidArgumentError(f"{text!r} is not a pattern, '=' and a value.")
        if read_pattern(pattern) in found:
            raise InvalidArgumentError(f"The pattern {pattern!r} has two values.")
        found[read_pattern(pattern)] = value
    return found


def read_ties(texts: Sequence[str], names: Sequence[str]) -> list[Tie]:
    """Read patterns of matrices that are tied; ``fused`` and ``experts`` stand for the usual ones."""
    usual = {"fused": fused_projections, "experts": experts}
    found: list[Tie] = []
    for text in texts:
        if text in usual:
            found += usual[text](names)
        else:
            found.append(read_pattern(text))
    return found


def _words(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise InvalidArgumentError("A list is empty.")
    return found
