"""Reports on plans: Markdown tables, matrices grouped by kind and layer, pictures, and points of a Pareto frontier."""

from __future__ import annotations

from lqlora.reports.frontier import ParetoPoint, pareto_points
from lqlora.reports.grouping import Grid, Kind, bits_by_layer, by_kind, error_by_layer, ranks_by_layer
from lqlora.reports.pictures import plot, plot_pareto
from lqlora.reports.tables import table

__all__ = [
    "Grid",
    "Kind",
    "ParetoPoint",
    "bits_by_layer",
    "by_kind",
    "error_by_layer",
    "pareto_points",
    "plot",
    "plot_pareto",
    "ranks_by_layer",
    "table",
]
