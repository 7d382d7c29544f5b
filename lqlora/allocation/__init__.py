"""Allocation: an integer program chooses a format and a rank for each matrix within a budget; the result is a plan.

``memory`` turns the memory of a device into a budget in bytes, ``limits`` turns bytes into bits, and ``ties`` finds matrices
that take one format. ``_constraints`` refuses ties and fixed choices that contradict each other. ``budgets`` has
:func:`allocate`. ``_solving`` raises the error for limits that no plan meets, with the range that is feasible.
"""

from __future__ import annotations

from lqlora.allocation import ties
from lqlora.allocation.budgets import allocate, pareto
from lqlora.allocation.limits import Limit, LimitUse
from lqlora.allocation.memory import cache_bytes, memory_budget
from lqlora.allocation.plan import Plan, PlannedMatrix

__all__ = [
    "Limit",
    "LimitUse",
    "Plan",
    "PlannedMatrix",
    "allocate",
    "cache_bytes",
    "memory_budget",
    "pareto",
    "ties",
]
