"""Fixing by reduced costs: choices that are in no assignment better than one that is known leave the problem."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lqlora.solvers.mckp.relaxation import fill, relax

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.mckp.knapsack import Knapsack
    from lqlora.solvers.presolve import Reduced

__all__ = ["keep", "shrink"]


def shrink(reduced: Reduced, parts: list[tuple[npt.NDArray[np.int64], Knapsack]]) -> tuple[Reduced, float]:
    """Find an assignment by the linear relaxation, and drop the choices that are in no better one.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    parts : list of (ndarray of int64, Knapsack)
        The knapsacks it splits into.

    Returns
    -------
    core : Reduced
        The same problem with fewer choices, and with a start.
    bound : float
        Lower bound on ``cost @ x + constant / unit``.

    References
    ----------
    Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11.
    """
    kept = np.zeros(len(reduced.cost), dtype=np.bool_)
    x = np.zeros(len(reduced.cost))
    bound = reduced.constant / reduced.unit
    for items, knapsack in parts:
        lp = relax(knapsack)
        chosen = fill(knapsack, lp)
        if reduced.start is not None:
            start = np.flatnonzero(reduced.start[items])
            if len(start) == len(chosen) and knapsack.value(start) < knapsack.value(chosen):
                chosen = start
        kept[items] = lp.excess <= knapsack.value(chosen) - lp.bound
        kept[items[chosen]] = True
        x[items[chosen]] = 1.0
        bound += lp.bound
    return keep(replace(reduced, start=x), kept), bound


def keep(reduced: Reduced, kept: npt.NDArray[np.bool_]) -> Reduced:
    """Restrict a problem to some of its choices.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    kept : ndarray of bool, shape (k,)
        At least one choice of each group, those of the start among them.

    Returns
    -------
    Reduced
        The restricted problem.
    """
    return replace(
        reduced,
        cost=reduced.cost[kept],
        use=reduced.use[:, np.flatnonzero(kept)],
        group=reduced.group[kept],
        column=reduced.column[kept],
        start=None if reduced.start is None else reduced.start[kept],
    )
