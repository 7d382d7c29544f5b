"""Cost tables: the error and size of every matrix in every format, and the store that keeps them across restarts."""

from __future__ import annotations

from lqlora.costs.building import cost_table
from lqlora.costs.store import CostStore, StoredRow
from lqlora.costs.table import Configuration, CostTable

__all__ = ["Configuration", "CostStore", "CostTable", "StoredRow", "cost_table"]
