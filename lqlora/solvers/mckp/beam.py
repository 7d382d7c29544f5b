"""Search among the choices that differ little from the optimum of the linear relaxation.

A state is a choice for some groups. Groups are decided in the order of the smallest change of size they offer, the
coarsest first: the finer the groups that are left, the closer the relaxation of these, which bounds each state, comes
to the truth. With plain numbers as states a whole generation is extended, bounded and thinned at once.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lqlora.solvers.mckp.open_choices import Residual, residual

if TYPE_CHECKING:
    from lqlora.solvers.mckp.knapsack import Knapsack
    from lqlora.solvers.mckp.relaxation import Relaxation

__all__ = ["search"]

#: Numbers that one search may read: a limit of work that does not depend on the clock, so that answers repeat.
_WORK = 1 << 30

#: States that one search may keep for the way back, 8 bytes each.
_KEPT = 1 << 24

#: Items that are considered for each state that is kept.
_ITEMS = 80

#: States that one generation may hold before it is thinned.
_MOST = 1 << 22


class _Link(NamedTuple):
    """Where the states of a generation come from."""

    parent: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]


def search(
    knapsack: Knapsack,
    lp: Relaxation,
    held: npt.NDArray[np.int64],
    tolerance: float,
    width: int,
    deadline: float = math.inf,
) -> tuple[npt.NDArray[np.int64], float]:
    """Look for a better choice than the one held, and raise the bound.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.
    lp : Relaxation
        Its relaxation.
    held : ndarray of int64, shape (groups,)
        A choice that fits.
    tolerance : float
        Choices that are cheaper by less than this are not looked for.
    width : int
        States that are kept from turn to turn; items in proportion. What is dropped limits the bound.
    deadline : float, optional
        Value of ``time.perf_counter()`` at which to stop.

    Returns
    -------
    chosen : ndarray of int64, shape (groups,)
        The best choice that is known now.
    bound : float
        Lower bound on the cost of every choice that fits.

    References
    ----------
    Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", European Journal of Operational Research
    83 (1995): dynamic programming over the groups with bounds on each state. The order of the groups and the thinning
    are this library's.
    """
    core = residual(knapsack, lp, knapsack.value(held) - lp.bound, _ITEMS * width)
    best, dropped = knapsack.value(held) - core.bound, core.beyond
    change, excess = np.zeros(1, dtype=np.int64), np.zeros(1)
    links: list[_Link] = []
    found: tuple[int, int] | None = None
    work = kept = 0
    most = max(map(len, core.items), default=1)
    for turn in range(len(core.items) + 1):
        room = core.slack - change
        value = np.where(room >= 0, excess + lp.price * room, np.inf)
        if value.min() < best:
            best, found = float(value.min()), (turn, int(value.argmin()))
        spent = work > _WORK or kept > _KEPT or time.perf_counter() > deadline
        least = excess + core.least(turn, room)
        alive, lost = _thin(least, best - tolerance, 0 if spent else min(width, _MOST // most))
        dropped = min(dropped, lost)
        if turn == len(core.items) or not len(alive):
            break
        items = core.items[turn]
        link, change, excess = _extend(core, change[alive], excess[alive], items)
        links.append(_Link(alive[link.parent].astype(np.int32), link.item))
        work += len(items) * len(alive) + len(core.up.turn) + len(core.down.turn)
        kept += len(change)
    chosen = held if found is None else _trace(knapsack, lp, links, *found)
    return chosen, core.bound + min(dropped, best)


def _thin(least: npt.NDArray[np.float64], limit: float, width: int) -> tuple[npt.NDArray[np.int64], float]:
    """Return the states of least bound below a limit, in order, and the least bound of the others."""
    alive = np.flatnonzero(least < limit)
    if len(alive) > width:
        alive = np.sort(alive[np.argsort(least[alive], kind="stable")[:width]])
    return alive, float(np.delete(least, alive).min(initial=math.inf))


def _extend(
    core: Residual, change: npt.NDArray[np.int64], excess: npt.NDArray[np.float64], items: npt.NDArray[np.int64]
) -> tuple[_Link, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Combine states with the items of a group. Of two the smaller and no dearer one makes the other superfluous."""
    states = len(change)
    change = np.add.outer(core.change[items], change).ravel()
    excess = np.add.outer(core.lp.excess[items], excess).ravel()
    order = np.argsort(change, kind="stable")
    cost = (excess - core.lp.price * change)[order]
    keep = np.ones(len(order), dtype=np.bool_)
    keep[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
    order = order[keep]
    which, parent = np.divmod(order, states)
    return _Link(parent.astype(np.int32), items[which].astype(np.int32)), change[order], excess[order]


def _trace(knapsack: Knapsack, lp: Relaxation, links: list[_Link], turn: int, place: int) -> npt.NDArray[np.int64]:
    chosen = lp.chosen.copy()
    for link in reversed(links[:turn]):
        item = link.item[place]
        chosen[knapsack.group[item]] = item
        place = int(link.parent[place])
    return chosen
