"""Beam search over the groups of a knapsack, with a lower bound for each partial choice.

A state is a choice for the groups decided so far, held as two numbers: its change of size and its excess. So a whole
generation of states is extended, bounded and thinned by a few array operations. Groups with coarse changes of size come
first: the relaxation of the fine ones that are left is nearly tight, so states are bounded closely.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lqlora.solvers.mckp.open_choices import OpenChoices, find_open_choices

if TYPE_CHECKING:
    from lqlora.solvers.mckp.knapsack import Knapsack
    from lqlora.solvers.mckp.relaxation import Relaxation

__all__ = ["Effort", "search"]


@dataclass(frozen=True)
class Effort:
    """Limits of the search. None depends on the clock, so the same problem gets the same answer.

    Parameters
    ----------
    widths : tuple of int, default (100, 1000, 10000, 100000)
        Largest number of states in a generation, of one search after another until the gap is closed.
    work : int, default 2**30
        Numbers that one search may read.
    states : int, default 2**24
        States that one search may keep to trace its answer back, 8 bytes each.
    items : int, default 80
        Items that a search considers, as a multiple of its width.
    generation : int, default 2**22
        States that one generation may hold before it is thinned.
    """

    widths: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    work: int = 1 << 30
    states: int = 1 << 24
    items: int = 80
    generation: int = 1 << 22


class _Link(NamedTuple):
    """Parent and item of each state of a generation."""

    parent: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]


# Let B be the bound of the open choices, and count costs from B. A state with excess e and room r >= 0 is a feasible
# choice of cost e + p r, if the groups that are left stay at the base: that is how incumbents are found. Completions of
# a state cost at least e + completion_bound(r). The invariant of the loop is that every feasible choice
#
#     costs at least min(dropped, best),  or costs no less than a completion of a state of this generation.
#
# `dropped` is the least bound of all states that were thinned out, and of the items that were left out. So the search
# may drop any state, for any reason, and B + min(dropped, best) stays a lower bound: the limits of width, work and time
# make it weaker, never wrong.
def search(
    knapsack: Knapsack,
    lp: Relaxation,
    held: npt.NDArray[np.int64],
    tolerance: float,
    width: int,
    effort: Effort,
    deadline: float = math.inf,
) -> tuple[npt.NDArray[np.int64], float]:
    """Search for a cheaper choice than the incumbent, and raise the lower bound.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.
    lp : Relaxation
        Its relaxation.
    held : ndarray of int64, shape (groups,)
        The incumbent, a feasible choice.
    tolerance : float
        The search ignores choices that are cheaper than the incumbent by less than this.
    width : int
        Largest number of states that stay in a generation.
    effort : Effort
        The other limits.
    deadline : float, optional
        Value of ``time.perf_counter()`` at which the search stops.

    Returns
    -------
    chosen : ndarray of int64, shape (groups,)
        The cheapest choice found, or the incumbent.
    bound : float
        Lower bound on the cost of every feasible choice.

    References
    ----------
    Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", European Journal of Operational Research
    83 (1995): dynamic programming over the groups with bounds on each state. The order of the groups and the thinning
    are this library's.
    """
    core = find_open_choices(knapsack, lp, knapsack.value(held) - lp.bound, effort.items * width)
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
        spent = work > effort.work or kept > effort.states or time.perf_counter() > deadline
        least = excess + core.completion_bound(turn, room)
        alive, lost = _thin(least, best - tolerance, 0 if spent else min(width, effort.generation // most))
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
    """Return the states of least bound below a limit, in order, and the least bound of the states removed."""
    alive = np.flatnonzero(least < limit)
    if len(alive) > width:
        alive = np.sort(alive[np.argsort(least[alive], kind="stable")[:width]])
    return alive, float(np.delete(least, alive).min(initial=math.inf))


def _extend(
    core: OpenChoices, change: npt.NDArray[np.int64], excess: npt.NDArray[np.float64], items: npt.NDArray[np.int64]
) -> tuple[_Link, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Combine states with the items of a group, and keep those that no smaller state beats in cost."""
    states = len(change)
    change = np.add.outer(core.change[items], change).ravel()
    excess = np.add.outer(core.lp.excess[items], excess).ravel()
    # Dominance needs the true cost of a partial choice. By the definition of e_j that is excess - p * change, up to a
    # constant: of two states with one excess the larger one is cheaper, because the excess charges for its size.
    order = np.argsort(change, kind="stable")
    cost = (excess - core.lp.price * change)[order]
    keep = np.ones(len(order), dtype=np.bool_)
    keep[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
    order = order[keep]
    which, parent = np.divmod(order, states)
    return _Link(parent.astype(np.int32), items[which].astype(np.int32)), change[order], excess[order]


def _trace(knapsack: Knapsack, lp: Relaxation, links: list[_Link], turn: int, place: int) -> npt.NDArray[np.int64]:
    """Follow the links of a state back to the first group, and return its choice."""
    chosen = lp.chosen.copy()
    for link in reversed(links[:turn]):
        item = link.item[place]
        chosen[knapsack.group[item]] = item
        place = int(link.parent[place])
    return chosen
