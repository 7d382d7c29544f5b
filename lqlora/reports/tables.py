"""A plan as Markdown tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lqlora.allocation.plan import Plan

__all__ = ["kind_table", "matrix_table"]


def matrix_table(plan: Plan) -> str:
    """Return a table of one matrix a row."""
    bits = plan.bits_by_matrix()
    rows = (
        (name, str(fmt), f"{bits[name]:.3f}", str(plan.ranks[name]), f"{plan.costs[name]:.3g}")
        for name, fmt in plan.formats.items()
    )
    return _table(("matrix", "format", "bits per weight", "rank", "cost"), rows)


def kind_table(plan: Plan) -> str:
    """Return a table of one kind a row."""
    rows = (
        (
            kind.name,
            str(kind.matrices),
            f"{float(kind.bits_per_weight):.3f}",
            f"{float(kind.lowest):.3f} to {float(kind.highest):.3f}",
            str(kind.ranks[0]) if kind.ranks[0] == kind.ranks[1] else f"{kind.ranks[0]} to {kind.ranks[1]}",
            f"{kind.error_share:.1%}",
        )
        for kind in plan.by_kind()
    )
    return _table(("kind", "matrices", "bits per weight", "from least to most", "rank", "share of the error"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows])


def _escape(cell: str) -> str:
    """Keep a name from ending its cell or its row, and from hiding what it holds."""
    return "".join(c if c.isprintable() else "\ufffd" for c in cell).replace("|", "\\|")
