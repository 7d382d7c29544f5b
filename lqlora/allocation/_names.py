"""From patterns to rows of a cost table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._patterns import as_patterns, matches
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora._patterns import Pattern, Patterns

__all__ = ["Names"]


class Names:
    """The names of a table's matrices, to be looked up by pattern."""

    def __init__(self, names: Sequence[str]) -> None:
        self._row = {name: row for row, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._row)

    def rows(self, include: Patterns, exclude: Patterns = ()) -> list[int]:
        """List the rows that one of some patterns matches; a pattern that matches no name is refused."""
        wanted, unwanted = (
            {row for pattern in as_patterns(patterns) for row in self._matching(pattern)}
            for patterns in (include, exclude)
        )
        return sorted(wanted - unwanted)

    def _matching(self, pattern: Pattern) -> list[int]:
        if isinstance(pattern, str) and pattern in self._row:
            return [self._row[pattern]]
        found = [row for name, row in self._row.items() if matches(name, pattern)]
        if not found:
            some = ", ".join(list(self._row)[:5])
            raise InvalidArgumentError(
                f"No matrix of the {len(self)} in the cost table matches {pattern!r} ({some}, …)."
            )
        return found
