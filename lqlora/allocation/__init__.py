"""Which format for which matrix: a table of costs, an integer linear program, and the plan it gives."""

from __future__ import annotations

from lqlora.allocation import ties
from lqlora.allocation.budgets import allocate
from lqlora.allocation.costs import cost_table
from lqlora.allocation.frontier import pareto
from lqlora.allocation.limits import Limit
from lqlora.allocation.memory import cache_bytes, memory_budget
from lqlora.allocation.plan import Plan
from lqlora.allocation.table import Configuration, CostTable

__all__ = [
    "Configuration",
    "CostTable",
    "Limit",
    "Plan",
    "allocate",
    "cache_bytes",
    "cost_table",
    "memory_budget",
    "pareto",
    "ties",
]
