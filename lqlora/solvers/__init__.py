"""Integer linear programming behind one function, with solvers that can be swapped.

Every adapter gets the same reduced problem and hands back a raw vector; objective, use and feasibility are computed
from the assignment the vector rounds to, in exact integers.
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
