"""Which format for which matrix: a table of costs, an integer linear program, and the plan it gives."""

from __future__ import annotations

from lqlora.allocation.budgets import allocate
from lqlora.allocation.costs import cost_table
from lqlora.allocation.plan import Plan
from lqlora.allocation.store import CostStore, StoredRow
from lqlora.allocation.table import Configuration, CostTable

__all__ = ["Configuration", "CostStore", "CostTable", "Plan", "StoredRow", "allocate", "cost_table"]
