"""Allocation: an integer program that chooses a format and a rank for each matrix within a budget, and the plan it gives."""

from __future__ import annotations

from lqlora.allocation import ties
from lqlora.allocation.budgets import allocate
from lqlora.allocation.demand import Demand
from lqlora.allocation.frontier import pareto
from lqlora.allocation.limits import Limit
from lqlora.allocation.memory import cache_bytes, memory_budget
from lqlora.allocation.plan import Plan

__all__ = ["Demand", "Limit", "Plan", "allocate", "cache_bytes", "memory_budget", "pareto", "ties"]
