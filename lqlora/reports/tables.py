"""Plans as Markdown tables, with a row for each matrix or for each kind of matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lqlora.errors import InvalidArgumentError
from lqlora.reports.grouping import by_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lqlora.allocation.plan import Plan

__all__ = ["table"]


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
        Text without a newline at the end.

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


def _matrix_table(plan: Plan) -> str:
    rows = (
        (name, str(own.format), f"{float(own.bits_per_weight):.3f}", str(own.rank), f"{own.cost:.3g}")
        for name, own in plan.matrices.items()
    )
    return _markdown(("matrix", "format", "bits per weight", "rank", "cost"), rows)


def _kind_table(plan: Plan) -> str:
    rows = (
        (
            kind.name,
            str(kind.matrices),
            f"{float(kind.bits_per_weight):.3f}",
            f"{float(kind.lowest):.3f} to {float(kind.highest):.3f}",
            str(kind.ranks[0]) if kind.ranks[0] == kind.ranks[1] else f"{kind.ranks[0]} to {kind.ranks[1]}",
            f"{kind.error_share:.1%}",
        )
        for kind in by_kind(plan)
    )
    return _markdown(("kind", "matrices", "bits per weight", "smallest to largest", "rank", "share of the error"), rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows])


def _escape(cell: str) -> str:
    """Return a text as one table cell, with pipes escaped and characters that cannot be printed replaced."""
    # Names come from files of others. A pipe would end the cell, a line break the row, and a control character could
    # rewrite what a terminal shows. str.isprintable is false for line breaks and control characters.
    return "".join(c if c.isprintable() else "\ufffd" for c in cell).replace("|", "\\|")
