"""The native solver, in NumPy: knapsacks with a choice per group, to a proven gap.

It takes problems whose budgets have no lower limits and do not overlap. It never fails, but it may stop before the gap
is reached: how much it searches is limited, so that the same problem gets the same answer whatever the time of day.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from lqlora.errors import InvalidArgumentError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.mckp.beam import search
from lqlora.solvers.mckp.knapsack import Knapsack, split
from lqlora.solvers.mckp.relaxation import fill, relax
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.mckp.relaxation import Relaxation
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "numpy"

#: States kept by one search after another, until the gap is reached.
_WIDTHS = (100, 1_000, 10_000, 100_000)


def version() -> str:
    """Return the version of the algorithm.

    Returns
    -------
    str
        It changes when answers may.
    """
    return "1"


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        The limits.

    Returns
    -------
    RawResult
        Always with a feasible point.

    Raises
    ------
    InvalidArgumentError
        If budgets overlap or have lower limits.
    """
    parts = split(reduced)
    if parts is None:
        raise InvalidArgumentError("Solver 'mckp' takes budgets without lower limits that do not overlap.")
    deadline = math.inf if options.time_limit is None else time.perf_counter() + options.time_limit
    x, bound = np.zeros(len(reduced.cost)), reduced.constant / reduced.unit
    # Every knapsack gets the same share of the gap that the whole may have.
    relaxations = [relax(knapsack) for _, knapsack in parts]
    tolerance = options.rel_gap * abs(bound + math.fsum(lp.bound for lp in relaxations)) / len(parts)
    closed = True
    for (items, knapsack), lp in zip(parts, relaxations, strict=True):
        start = None if reduced.start is None else np.flatnonzero(reduced.start[items])
        chosen, least = _close(knapsack, lp, start, tolerance, deadline)
        closed &= _is_closed(knapsack.value(chosen) - least, knapsack.value(chosen), tolerance)
        x[items[chosen]] = 1.0
        bound += least
    if closed:
        return RawResult(x, bound, "gap reached", StopReason.GAP)
    if time.perf_counter() > deadline:
        return RawResult(x, bound, "time limit", StopReason.TIME_LIMIT)
    return RawResult(x, bound, "limit of work", StopReason.LIMIT)


def _is_closed(gap: float, value: float, tolerance: float) -> bool:
    return gap <= max(tolerance, 1e-13 * value)


def _close(
    knapsack: Knapsack, lp: Relaxation, start: npt.NDArray[np.int64] | None, tolerance: float, deadline: float
) -> tuple[npt.NDArray[np.int64], float]:
    """Search wider and wider. Half of the tolerance is for what is not looked for."""
    chosen, bound = fill(knapsack, lp), lp.bound
    if start is not None and len(start) == len(chosen) and knapsack.value(start) < knapsack.value(chosen):
        chosen = start
    for width in _WIDTHS:
        value = knapsack.value(chosen)
        if _is_closed(value - bound, value, tolerance) or time.perf_counter() > deadline:
            break
        chosen, least = search(knapsack, lp, chosen, 0.5 * tolerance, width, deadline)
        bound = max(bound, least)
    return chosen, bound
