"""Which format for which matrix: a table of costs, an integer linear program, and the plan it gives."""

from __future__ import annotations

from lqlora._plots import Grid
from lqlora.allocation import ties
from lqlora.allocation.budgets import allocate
from lqlora.allocation.costs import cost_table
from lqlora.allocation.demand import Demand
from lqlora.allocation.frontier import pareto
from lqlora.allocation.kinds import Kind
from lqlora.allocation.limits import Limit
from lqlora.allocation.memory import cache_bytes, memory_budget
from lqlora.allocation.pareto_picture import ParetoPoint, pareto_points, plot_pareto
from lqlora.allocation.plan import Plan
from lqlora.allocation.store import CostStore, StoredRow
from lqlora.allocation.table import Configuration, CostTable

__all__ = [
    "Configuration",
    "CostStore",
    "CostTable",
    "Demand",
    "Grid",
    "Kind",
    "Limit",
    "ParetoPoint",
    "Plan",
    "StoredRow",
    "allocate",
    "cache_bytes",
    "cost_table",
    "memory_budget",
    "pareto",
    "pareto_points",
    "plot_pareto",
    "ties",
]
