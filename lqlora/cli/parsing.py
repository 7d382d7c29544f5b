"""Parsers of option values: formats, numbers, bytes with units, name patterns, pairs and ties."""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from typing import TYPE_CHECKING

from lqlora._messages import given
from lqlora.allocation.ties import experts, fused_projections
from lqlora.costs.grids import paper_grid
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.recipes.demo.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lqlora._patterns import Pattern
    from lqlora.allocation.ties import Tie

__all__ = [
    "parse_bytes",
    "parse_formats",
    "parse_integers",
    "parse_number",
    "parse_pairs",
    "parse_pattern",
    "parse_ties",
]

#: Characters of the longest text that is read as a number.
_LONGEST_NUMBER = 100

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_formats(text: str) -> list[BlockFormat]:
    """Return the formats of a comma-separated list, each once; ``few``, ``paper`` and ``code`` stand for lists."""
    found: list[BlockFormat] = []
    for item in _items(text, "--formats"):
        if item == "few":
            found += Settings.formats
        elif item in ("paper", "code"):
            found += paper_grid(item)  # type: ignore[arg-type] # the line above narrows it to the two names
        else:
            found.append(BlockFormat.parse(item))
    return list(dict.fromkeys(found))


def parse_integers(text: str, option: str) -> list[int]:
    """Return the integers of a comma-separated list."""
    try:
        return [int(item) for item in _items(text, option)]
    except ValueError:
        raise InvalidArgumentError(f"{option} must be integers separated by commas, got {given(text)}.") from None


def parse_number(text: str, option: str) -> Fraction:
    """Return a decimal number exactly: 2.7 is 27/10."""
    # The text is bounded first, because 1e99999999 would be computed for minutes.
    try:
        if len(text) <= _LONGEST_NUMBER and not re.search(r"e[-+]?[\d_]{4}", text.lower()):
            number = Fraction(text)
            if abs(number) <= sys.float_info.max:
                return number
    except (ValueError, ZeroDivisionError):
        pass
    raise InvalidArgumentError(f"{option} must be a number such as 2.75, at most 1.8e308, got {given(text)}.")


def parse_bytes(text: str, option: str = "--bytes") -> int:
    """Return a number of bytes from ``400000000``, ``400MB`` or ``1.5GiB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmg]i?)?b)?", text.strip().lower())
    if found is None or len(found[1]) > _LONGEST_NUMBER:
        raise InvalidArgumentError(f"{option} must be a number of bytes such as 400MB or 1.5GiB, got {given(text)}.")
    return int(Fraction(found[1]) * _UNITS[found[2] or ""])


def parse_pattern(text: str) -> Pattern:
    """Return a shell pattern, or a compiled regular expression if the text starts with ``re:``."""
    if not text.startswith("re:"):
        return text
    try:
        return re.compile(text.removeprefix("re:"))
    except re.error as error:
        raise InvalidArgumentError(
            f"pattern must be a regular expression after 're:', got {given(text)}: {error}."
        ) from None


def parse_pairs(texts: Iterable[str], option: str) -> dict[Pattern, str]:
    """Return values by pattern from texts of the form ``PATTERN=VALUE``, split at the last ``=``."""
    found = {}
    for text in texts:
        pattern, sign, value = text.rpartition("=")
        if not sign or not pattern or not value:
            raise InvalidArgumentError(f"{option} must be PATTERN=VALUE, got {given(text)}.")
        if parse_pattern(pattern) in found:
            raise InvalidArgumentError(f"{option} must give one value to each pattern, got two for {given(pattern)}.")
        found[parse_pattern(pattern)] = value
    return found


def parse_ties(texts: Sequence[str], names: Sequence[str]) -> list[Tie]:
    """Return ties from patterns; ``fused`` and ``experts`` stand for the usual ties among the names."""
    usual = {"fused": fused_projections, "experts": experts}
    found: list[Tie] = []
    for text in texts:
        if text in usual:
            found += usual[text](names)
        else:
            found.append(parse_pattern(text))
    return found


def _items(text: str, option: str) -> list[str]:
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise InvalidArgumentError(f"{option} must be a comma-separated list of at least one item, got {given(text)}.")
    return found
