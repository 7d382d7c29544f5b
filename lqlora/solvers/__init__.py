"""Integer programming: choose one format for each matrix at least cost within budgets, with interchangeable solvers.

``solving`` picks the solver for ``solver="auto"``, and ``registry`` finds one by name. :func:`solve` reduces the problem,
calls the adapter of a solver and checks the answer. Objective, use and feasibility are always computed from the assignment,
in exact integers, never taken from the solver.
"""

from __future__ import annotations

from lqlora.solvers.adapter import Adapter, License, RawResult
from lqlora.solvers.presolve import Reduced, reduce_problem
from lqlora.solvers.problem import (
    Budget,
    Problem,
    Solution,
    SolveOptions,
    Status,
    StopReason,
    evaluate,
    relative_gap,
)
from lqlora.solvers.registry import available, check_license, register
from lqlora.solvers.solving import select, solve

__all__ = [
    "Adapter",
    "Budget",
    "License",
    "Problem",
    "RawResult",
    "Reduced",
    "Solution",
    "SolveOptions",
    "Status",
    "StopReason",
    "available",
    "check_license",
    "evaluate",
    "reduce_problem",
    "register",
    "relative_gap",
    "select",
    "solve",
]
