"""Plans as tables, with a row for each matrix or for each kind of matrix: cells, and the same as Markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from lqlora._annotations import annotated
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.reports.grouping import by_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.allocation.plan import Plan

__all__ = ["Table", "plan_table", "table"]

#: Cells that Markdown shows as they are: no emphasis, link, HTML, formula or emoji can begin in them.
_PLAIN = re.compile(r"(?!.*www\.)(?:[^\W_]|[ .,%/+-]|:(?!//|[\w+-]*:))*")


class Table(NamedTuple):
    """Cells of a table.

    Parameters
    ----------
    head : tuple of str
        Titles of the columns.
    rows : sequence of tuple of str
        Cells of each row. Names are as they are in the plan: they may hold any character.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        r"""Return the table as Markdown that shows every cell as it is.

        A column is set in code spans if one of its cells has characters that Markdown reads as markup. Characters that
        cannot be printed are escaped.

        Returns
        -------
        str
            Text without a newline at the end.

        Examples
        --------
        >>> print(Table(("kind", "bits"), [("layers.*.q", "4.25")]).markdown())
        | kind | bits |
        |---|---|
        | `layers.*.q` | 4.25 |
        """
        columns = [_column([printable(row[i]) for row in self.rows]) for i in range(len(self.head))]
        lines = [self.head, *zip(*columns, strict=True)]
        head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([head, "|" + "---|" * len(self.head), *rows])


@annotated
def table(plan: Plan, by: Literal["matrix", "kind"] = "matrix") -> str:
    """Return a plan as a Markdown table.

    Parameters
    ----------
    plan : Plan
        Any plan.
    by : {"matrix", "kind"}
        Whether each matrix has a row, or all matrices of a kind share one.

    Returns
    -------
    str
        Text without a newline at the end. Names are set in code spans if Markdown would read one of them as markup, and
        characters that cannot be printed are escaped.

    Raises
    ------
    InvalidArgumentError
        If ``by`` is neither of the two.
    """
    return plan_table(plan, by).markdown()


def plan_table(plan: Plan, by: Literal["matrix", "kind"] = "matrix") -> Table:
    """Return the cells of the table of a plan.

    Parameters
    ----------
    plan : Plan
        Any plan.
    by : {"matrix", "kind"}
        Whether each matrix has a row, or all matrices of a kind share one.

    Returns
    -------
    Table
        Titles and cells.

    Raises
    ------
    InvalidArgumentError
        If ``by`` is neither of the two.
    """
    if by == "matrix":
        return _matrix_table(plan)
    if by == "kind":
        return _kind_table(plan)
    raise InvalidArgumentError(f"by must be 'matrix' or 'kind', got {by!r}.")


def _matrix_table(plan: Plan) -> Table:
    rows = [
        (name, str(own.format), f"{float(own.bits_per_weight):.3f}", str(own.rank), f"{own.cost:.3g}")
        for name, own in plan.matrices.items()
    ]
    return Table(("matrix", "format", "bits per weight", "rank", "cost"), rows)


def _kind_table(plan: Plan) -> Table:
    rows = [
        (
            kind.name,
            str(kind.matrices),
            f"{float(kind.bits_per_weight):.3f}",
            f"{float(kind.lowest):.3f} to {float(kind.highest):.3f}",
            str(kind.ranks[0]) if kind.ranks[0] == kind.ranks[1] else f"{kind.ranks[0]} to {kind.ranks[1]}",
            f"{kind.error_share:.1%}",
        )
        for kind in by_kind(plan)
    ]
    return Table(("kind", "matrices", "bits per weight", "smallest to largest", "rank", "share of the error"), rows)


def _column(cells: list[str]) -> list[str]:
    """Return the cells of a column in Markdown: all in code spans, or all as they are."""
    if all(_PLAIN.fullmatch(cell) and cell == cell.strip() and "  " not in cell for cell in cells):
        return cells
    return [_code_span(cell) for cell in cells]


def _code_span(text: str) -> str:
    """Return a code span for the cell of a table; an empty text has none."""
    # Within a code span only backticks are special, and a table cell ends at a pipe without a backslash. The fence is
    # one longer than the longest run of backticks in the text. Markdown takes one space from both
    # ends if both have one and the text has more than spaces.
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.strip(" ") and (text[0] in " `" or text[-1] in " `") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")
