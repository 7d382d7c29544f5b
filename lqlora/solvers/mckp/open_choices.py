"""Core of a knapsack problem: the items that an optimal choice may contain, and lower bounds for partial choices.

Items with large reduced costs are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lqlora.solvers.mckp.knapsack import Knapsack
    from lqlora.solvers.mckp.relaxation import Relaxation

__all__ = ["OpenChoices", "find_open_choices"]


class _Steps(NamedTuple):
    """Steps from item to item along the hulls of all open groups, in one direction, by increasing excess per size."""

    size: npt.NDArray[np.float64]
    excess: npt.NDArray[np.float64]
    turn: npt.NDArray[np.int64]

    def after(self, turn: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return cumulative sizes and cumulative excesses of the steps, for groups at or after a turn only."""
        left = self.turn >= turn
        size, excess = np.zeros(left.sum() + 1), np.zeros(left.sum() + 1)
        np.cumsum(self.size[left], out=size[1:])
        np.cumsum(self.excess[left], out=excess[1:])
        return size, excess


@dataclass(frozen=True, eq=False)
class OpenChoices:
    """Core of a knapsack: its open items, their changes of size against the relaxation, and bounds.

    Parameters
    ----------
    lp : Relaxation
        The relaxation.
    bound : float
        Lower bound on the cost of every choice of open items. It is above ``lp.bound`` if all changes of size have a
        common divisor, because some capacity then cannot be used.
    beyond : float
        Lower bound on the excess over ``bound`` of choices with an item that was left out although it is within the gap;
        infinite if there is none.
    slack : int
        Usable capacity that the choice of the relaxation leaves.
    change : ndarray of int64, shape (k,)
        Size of each item minus the size of its group's item in the choice of the relaxation.
    items : list of ndarray of int64
        Open items of each open group; the first one is the item that the relaxation chooses. Groups are sorted by
        their smallest change of size, in decreasing order.
    up, down : _Steps
        Steps that use more capacity than the relaxation, and steps that use less.
    """

    lp: Relaxation
    bound: float
    beyond: float
    slack: int
    change: npt.NDArray[np.int64]
    items: list[npt.NDArray[np.int64]]
    up: _Steps
    down: _Steps

    # By identity (1) of relaxation.py, the groups from a turn on add to the cost of a partial choice that leaves room r
    #
    #     sum of their e_j  +  p * (r - sum of their changes),   subject to   sum of changes <= r.
    #
    # This is a knapsack again, and its relaxation is a piecewise linear convex function of r. For r >= 0 it fills the
    # room by the up steps that cost less than p per unit, cheapest first, and pays p for each unit that stays empty.
    # For r < 0 it frees -r units by the down steps, cheapest first, and is infinite if all of them free too little.
    # The steps of one hull get more expensive with their distance from the base, so the sort takes them in a valid order.
    def completion_bound(self, turn: int, room: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return lower bounds on the excess that the groups from a turn on add to partial choices.

        Parameters
        ----------
        turn : int
            Position of the first undecided group.
        room : ndarray of int64, shape (states,)
            Capacity that each partial choice leaves; negative if it uses too much.

        Returns
        -------
        ndarray of float64, shape (states,)
            Infinite where no completion is feasible.
        """
        left = room.astype(np.float64)
        size, excess = self.up.after(turn)
        rise = np.interp(left, size, excess) + self.lp.price * np.maximum(left - size[-1], 0)
        size, excess = self.down.after(turn)
        fall = np.where(-left > size[-1], np.inf, np.interp(-left, size, excess))
        return np.where(left < 0, fall, rise)


def find_open_choices(knapsack: Knapsack, lp: Relaxation, gap: float, most: int) -> OpenChoices:
    """Return the items that a choice within a gap of the lower bound may contain.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.
    lp : Relaxation
        Its relaxation.
    gap : float
        Cost of the incumbent minus ``lp.bound``.
    most : int
        Largest number of items to keep; those of least reduced cost are kept.

    Returns
    -------
    OpenChoices
        The open items, and bounds.
    """
    base = lp.chosen[knapsack.group]
    change = knapsack.size - knapsack.size[base]
    items = np.flatnonzero((lp.excess <= gap) & (change != 0))
    beyond = math.inf
    if len(items) > most:
        beyond = float(np.partition(lp.excess[items], most)[most])
        items = items[lp.excess[items] < beyond]
    # If d divides every change, the capacity that is used differs from that of the base by a multiple of d.
    # So slack mod d units stay empty whatever is chosen, and (1) charges the price for each of them.
    slack = knapsack.slack(lp.chosen)
    unusable = slack % max(1, int(np.gcd.reduce(change[items])))
    lost = lp.price * unusable
    begin = np.flatnonzero(np.diff(knapsack.group[items], prepend=-1))
    finest = np.minimum.reduceat(np.abs(change[items]), begin) if len(begin) else begin
    order = np.argsort(-finest, kind="stable")
    turn = np.full(len(knapsack.first), -1)
    turn[knapsack.group[items[begin[order]]]] = np.arange(len(order))
    choices = np.split(items, begin[1:])
    lists = [np.append(base[choices[g][0]], choices[g]) for g in order]
    hull = lp.hull[turn[knapsack.group[lp.hull]] >= 0]
    inner = np.diff(knapsack.group[hull]) == 0
    one, other = hull[:-1][inner], hull[1:][inner]
    steps, rises, turns = change[other] - change[one], lp.excess[other] - lp.excess[one], turn[knapsack.group[one]]
    grows = one >= base[one]
    worth = grows & (rises < lp.price * steps)  # a step that costs more than the price is worse than empty capacity
    up = _sorted_steps(steps[worth], rises[worth], turns[worth])
    down = _sorted_steps(steps[~grows], -rises[~grows], turns[~grows])
    return OpenChoices(lp, lp.bound + lost, beyond - lost, slack - unusable, change, lists, up, down)


def _sorted_steps(size: npt.NDArray[np.int64], excess: npt.NDArray[np.float64], turn: npt.NDArray[np.int64]) -> _Steps:
    steps, rises = size.astype(np.float64), np.maximum(excess, 0)  # below zero by rounding only
    order = np.argsort(rises / steps, kind="stable")
    return _Steps(steps[order], rises[order], turn[order])
