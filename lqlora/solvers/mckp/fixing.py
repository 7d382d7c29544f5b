"""Variable fixing by reduced costs: remove the choices that no better assignment can contain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lqlora.solvers.mckp.relaxation import first_incumbent, relax

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.mckp.knapsack import Knapsack
    from lqlora.solvers.presolve import Reduced

__all__ = ["fix_variables"]


def fix_variables(reduced: Reduced, parts: list[tuple[npt.NDArray[np.int64], Knapsack]]) -> tuple[Reduced, float]:
    """Find an assignment by the linear relaxation, and remove the choices that no better assignment can contain.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    parts : list of (ndarray of int64, Knapsack)
        The knapsacks it splits into.

    Returns
    -------
    core : Reduced
        The same problem with fewer choices. Its ``start`` is the assignment that was found.
    bound : float
        Lower bound on ``cost @ x + offset``.

    References
    ----------
    Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11.
    """
    kept = np.zeros(len(reduced.cost), dtype=np.bool_)
    x = np.zeros(len(reduced.cost))
    bound = reduced.offset
    for items, knapsack in parts:
        lp = relax(knapsack)
        chosen = first_incumbent(knapsack, lp, None if reduced.start is None else reduced.start[items])
        # An assignment with item j costs at least bound + excess_j. If that is above the incumbent, j is fixed to zero.
        # Items that the incumbent contains stay in any case, since rounding may lift their excess above the gap.
        kept[items] = lp.excess <= knapsack.value(chosen) - lp.bound
        kept[items[chosen]] = True
        x[items[chosen]] = 1.0
        bound += lp.bound
    return _restrict(replace(reduced, start=x), kept), bound


def _restrict(reduced: Reduced, kept: npt.NDArray[np.bool_]) -> Reduced:
    """Return the problem with the marked variables only: at least one of each group, and those of the start."""
    return replace(
        reduced,
        cost=reduced.cost[kept],
        use=reduced.use[:, np.flatnonzero(kept)],
        group=reduced.group[kept],
        column=reduced.column[kept],
        start=None if reduced.start is None else reduced.start[kept],
    )
