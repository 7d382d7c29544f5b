"""What a relaxation leaves to decide: the items that a better choice may contain, and bounds on what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lqlora.solvers.mckp.knapsack import Knapsack
    from lqlora.solvers.mckp.relaxation import Relaxation

__all__ = ["Residual", "residual"]


class _Slopes(NamedTuple):
    """Steps along the hulls of groups, the steepest last: what a change of size costs at least."""

    size: npt.NDArray[np.float64]
    excess: npt.NDArray[np.float64]
    turn: npt.NDArray[np.int64]

    def after(self, turn: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return total size and least total excess, step by step, of the groups decided from a turn on."""
        left = self.turn >= turn
        size, excess = np.zeros(left.sum() + 1), np.zeros(left.sum() + 1)
        np.cumsum(self.size[left], out=size[1:])
        np.cumsum(self.excess[left], out=excess[1:])
        return size, excess


@dataclass(frozen=True, eq=False)
class Residual:
    """A knapsack seen from the choice of its relaxation: changes of size, and what they cost above a bound.

    Parameters
    ----------
    lp : Relaxation
        The relaxation.
    bound : float
        Lower bound on the cost of choices of the items below. Where all changes of size have a common divisor, some
        capacity cannot be used; this bound counts it.
    beyond : float
        Choices of other items cost at least this much above the bound; infinite if the items below are all that matter.
    slack : int
        Capacity that the choice of the relaxation leaves to be used.
    change : ndarray of int64, shape (k,)
        How much larger an item is than that of its group in the choice of the relaxation.
    items : list of ndarray of int64
        What may be chosen in each group that is not decided, the choice of the relaxation first. Groups whose smallest
        change is largest come first.
    up, down : _Slopes
        The least that it costs to use more and less capacity.
    """

    lp: Relaxation
    bound: float
    beyond: float
    slack: int
    change: npt.NDArray[np.int64]
    items: list[npt.NDArray[np.int64]]
    up: _Slopes
    down: _Slopes

    def least(self, turn: int, room: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Bound what the groups from one turn on add to the excess of those before.

        Parameters
        ----------
        turn : int
            Position of the first open group.
        room : ndarray of int64, shape (states,)
            Capacity that the groups before leave; negative if they use too much.

        Returns
        -------
        ndarray of float64, shape (states,)
            Infinite where nothing can fit.
        """
        left = room.astype(np.float64)
        size, excess = self.up.after(turn)
        rise = np.interp(left, size, excess) + self.lp.price * np.maximum(left - size[-1], 0)
        size, excess = self.down.after(turn)
        fall = np.where(-left > size[-1], np.inf, np.interp(-left, size, excess))
        return np.where(left < 0, fall, rise)


def residual(knapsack: Knapsack, lp: Relaxation, gap: float, most: int) -> Residual:
    """Keep the items that a choice within some gap of the bound may contain.

    Parameters
    ----------
    knapsack : Knapsack
        The problem.
    lp : Relaxation
        Its relaxation.
    gap : float
        Cost above ``lp.bound`` of the best choice that is known.
    most : int
        Items to keep, those of least excess.

    Returns
    -------
    Residual
        What is left to decide.
    """
    base = lp.chosen[knapsack.group]
    change = knapsack.size - knapsack.size[base]
    items = np.flatnonzero((lp.excess <= gap) & (change != 0))
    beyond = math.inf
    if len(items) > most:
        beyond = float(np.partition(lp.excess[items], most)[most])
        items = items[lp.excess[items] < beyond]
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
    worth = grows & (rises < lp.price * steps)  # beyond, to leave room is cheaper
    up, down = _slopes(steps[worth], rises[worth], turns[worth]), _slopes(steps[~grows], -rises[~grows], turns[~grows])
    return Residual(lp, lp.bound + lost, beyond - lost, slack - unusable, change, lists, up, down)


def _slopes(size: npt.NDArray[np.int64], excess: npt.NDArray[np.float64], turn: npt.NDArray[np.int64]) -> _Slopes:
    steps, rises = size.astype(np.float64), np.maximum(excess, 0)
    order = np.argsort(rises / steps, kind="stable")
    return _Slopes(steps[order], rises[order], turn[order])
