"""Table and picture of the demo's results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lqlora.reports import bits_by_layer, pictures
from lqlora.reports.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lqlora.allocation import Plan

__all__ = ["Row", "draw", "tabulate"]


@dataclass
class Row:
    """Measurements of one model, a row of the table.

    Parameters
    ----------
    name : str
        Name of the model or of the method that made it.
    bits : float
        Bits per weight of the quantized matrices, all scales included.
    megabytes : float
        Size of the whole model in 10**6 bytes: quantized matrices, low-rank factors and unquantized tensors.
    error : float
        Relative Frobenius error over all quantized matrices together.
    before, after : float or None
        Perplexity before and after fine-tuning.
    seconds : float
        Wall time of the decompositions, without Fisher information and cost table.
    """

    name: str
    bits: float
    megabytes: float
    error: float
    before: float
    after: float | None = None
    seconds: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """Return the measurements as text, in the order of the table's columns.

        Returns
        -------
        tuple of str
            One cell a column; an empty one if the model was not fine-tuned.
        """
        after = "" if self.after is None else f"{self.after:.2f}"
        return (
            self.name,
            f"{self.bits:.3f}",
            f"{self.megabytes:.1f}",
            f"{self.error:.4f}",
            f"{self.before:.2f}",
            after,
            f"{self.seconds:.0f}",
        )


_HEAD = ("model", "bits per weight", "MB in all", "relative error", "perplexity before", "after fine-tuning", "seconds")


def tabulate(rows: Sequence[Row]) -> Table:
    """Return a table with a row for each model.

    Parameters
    ----------
    rows : sequence of Row
        Measurements, in the order of the table.

    Returns
    -------
    Table
        Titles and cells.
    """
    return Table(_HEAD, [row.cells() for row in rows])


def draw(path: Path, plans: Mapping[str, Plan], curves: Mapping[str, Sequence[float]]) -> None:
    """Write a picture of the bits per layer of each plan, and of the mean error by iteration.

    Parameters
    ----------
    path : Path
        PNG file to write.
    plans : mapping of str to Plan
        Plans by title.
    curves : mapping of str to sequence of float
        Mean errors by iteration, by the name of the model.
    """
    figure = pictures.figure(figsize=(10, 3 * (len(plans) + 1)))
    axes = figure.subplots(len(plans) + 1, 1)
    for axis, (name, plan) in zip(axes, plans.items(), strict=False):
        pictures.draw_grid(axis, bits_by_layer(plan), name, "bits per weight")
    pictures.draw_errors(axes[-1], curves, "mean error over all matrices, each in its own norm")
    figure.savefig(path, dpi=120, metadata={"Software": None})
