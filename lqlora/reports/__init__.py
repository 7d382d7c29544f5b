"""Reports on plans: Markdown tables, pictures, an HTML page, and the points of a Pareto frontier."""

from __future__ import annotations

from lqlora.reports.frontier import ParetoPoint, pareto_points, plot_pareto
from lqlora.reports.pictures import Grid
from lqlora.reports.projections import Kind

__all__ = ["Grid", "Kind", "ParetoPoint", "pareto_points", "plot_pareto"]
