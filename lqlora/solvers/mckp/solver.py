"""Adapter of the built-in knapsack solver ``mckp``.

It takes problems whose budgets have no lower limits and share no group. It always returns an assignment, but may stop
before the gap is closed: its search is limited by a count of work, so the same problem gets the same answer.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from lqlora.errors import InvalidArgumentError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.mckp.beam import Effort, search
from lqlora.solvers.mckp.knapsack import Knapsack, split
from lqlora.solvers.mckp.relaxation import first_incumbent, relax
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.mckp.relaxation import Relaxation
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "numpy"


def version() -> str:
    """Return the version of the algorithm.

    Returns
    -------
    str
        Changes when answers may change.
    """
    return "1"


def solve(reduced: Reduced, options: SolveOptions, effort: Effort | None = None) -> RawResult:
    """Solve a reduced problem by relaxation and beam search.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        Time limit and gap.
    effort : Effort, optional
        Limits of the search; the defaults of :class:`Effort` if not given.

    Returns
    -------
    RawResult
        The best assignment found, always feasible, and a lower bound.

    Raises
    ------
    InvalidArgumentError
        If a budget has a lower limit or two budgets share a group.
    """
    effort = effort or Effort()
    parts = split(reduced)
    if parts is None:
        raise InvalidArgumentError(
            "budgets of solver 'mckp' must not overlap and must not have lower limits. Use solver='auto' or 'highs'."
        )
    deadline = math.inf if options.time_limit is None else time.perf_counter() + options.time_limit
    x, bound = np.zeros(len(reduced.cost)), reduced.offset
    # The gap is relative to the whole objective. Each of the m knapsacks may leave a gap of 1/m of it.
    relaxations = [relax(knapsack) for _, knapsack in parts]
    tolerance = options.rel_gap * abs(bound + math.fsum(lp.bound for lp in relaxations)) / len(parts)
    closed = True
    for (items, knapsack), lp in zip(parts, relaxations, strict=True):
        start = first_incumbent(knapsack, lp, None if reduced.start is None else reduced.start[items])
        chosen, least = _close(knapsack, lp, start, tolerance, effort, deadline)
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
    knapsack: Knapsack,
    lp: Relaxation,
    chosen: npt.NDArray[np.int64],
    tolerance: float,
    effort: Effort,
    deadline: float,
) -> tuple[npt.NDArray[np.int64], float]:
    """Search with growing width until the gap is closed; return the best choice and the best lower bound."""
    bound = lp.bound
    for width in effort.widths:
        value = knapsack.value(chosen)
        if _is_closed(value - bound, value, tolerance) or time.perf_counter() > deadline:
            break
        # A search ignores gains below half of the tolerance. So if nothing else is dropped, the gap it leaves is at
        # most that half, and rounding cannot push it above the whole.
        chosen, least = search(knapsack, lp, chosen, 0.5 * tolerance, width, effort, deadline)
        bound = max(bound, least)
    return chosen, bound
