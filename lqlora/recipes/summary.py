"""The table and the picture of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lqlora.reports import bits_by_layer
from lqlora.reports.pictures import draw_errors, draw_grid, figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lqlora.allocation import Plan

__all__ = ["Row", "draw", "markdown"]


@dataclass
class Row:
    """One model.

    Parameters
    ----------
    name : str
        What it is.
    bits : float
        Bits per weight of the linear layers, all scales included.
    megabytes : float
        Whole model: quantized parts, factors, everything unquantized; 10**6 bytes.
    error : float
        Relative Frobenius error over all quantized matrices together.
    before, after : float or None
        Perplexity before and after fine-tuning.
    seconds : float
        To make the model, without Fisher information and cost table.
    """

    name: str
    bits: float
    megabytes: float
    error: float
    before: float
    after: float | None = None
    seconds: float = 0.0

    def cells(self) -> list[str]:
        """Return the cells as text."""
        after = "" if self.after is None else f"{self.after:.2f}"
        return [
            self.name,
            f"{self.bits:.3f}",
            f"{self.megabytes:.1f}",
            f"{self.error:.4f}",
            f"{self.before:.2f}",
            after,
            f"{self.seconds:.0f}",
        ]


_HEAD = ("model", "bits per weight", "MB in all", "relative error", "perplexity before", "after fine-tuning", "seconds")


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    return "\n".join(lines + ["| " + " | ".join(row.cells()) + " |" for row in rows]) + "\n"


def draw(path: Path, plans: Mapping[str, Plan], curves: Mapping[str, Sequence[float]]) -> None:
    """Write the picture: bits per layer of each plan, and the mean error by iteration."""
    picture = figure(figsize=(10, 3 * (len(plans) + 1)))
    axes = picture.subplots(len(plans) + 1, 1)
    for axis, (name, plan) in zip(axes, plans.items(), strict=False):
        draw_grid(axis, bits_by_layer(plan), name, "bits per weight")
    draw_errors(axes[-1], curves, "mean error over all matrices, each in its own norm")
    picture.savefig(path, dpi=120, metadata={"Software": None})
