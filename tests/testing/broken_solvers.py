"""A correct adapter, and adapters with one fault each."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np

from lqlora.solvers import RawResult, StopReason
from lqlora.solvers.vendors import scipy_milp


class Correct:
    REQUIRES = "scipy"

    def version(self):
        return scipy_milp.version()

    def solve(self, reduced, options):
        return scipy_milp.solve(reduced, options)


def smallest(reduced):
    """Return the vector of the smallest choice of each group."""
    x = np.zeros(len(reduced.cost))
    use = reduced.use.toarray().sum(axis=0)
    for members in reduced.choose.toarray().astype(bool):
        x[np.flatnonzero(members)[use[members].argmin()]] = 1.0
    return x


def value(reduced, x):
    return float(reduced.cost @ x + reduced.offset)


class HasNoVersion(Correct):
    def version(self):
        return None


class ReturnsATuple(Correct):
    def solve(self, reduced, options):
        return tuple(super().solve(reduced, options))


class ReturnsTheRelaxation(Correct):
    """Returns fractions, as the linear relaxation does."""

    def solve(self, reduced, options):
        found = super().solve(reduced, options)
        counts = np.bincount(reduced.group)[reduced.group]
        return found if found.x is None else found._replace(x=1.0 / counts)


class ForgetsTheBudget(Correct):
    def solve(self, reduced, options):
        return super().solve(replace(reduced, upper=np.full_like(reduced.upper, np.inf)), options)


class AllowsATolerance(Correct):
    """Has a feasibility tolerance relative to the limit."""

    def solve(self, reduced, options):
        return super().solve(replace(reduced, upper=reduced.upper * (1 + 1e-6)), options)


class GivesUpInsteadOfProving(Correct):
    def solve(self, reduced, options):
        found = super().solve(reduced, options)
        return found if found.x is not None else found._replace(bound=-np.inf, stopped=StopReason.TIME_LIMIT)


class IsContentWithAnything(Correct):
    def solve(self, reduced, *_):
        x = smallest(reduced)
        return RawResult(x, reduced.offset, "done", StopReason.GAP)


class ProvesItsOwnAnswer(IsContentWithAnything):
    def solve(self, reduced, *_):
        found = super().solve(reduced)
        return found._replace(bound=value(reduced, found.x))


class ForgetsTheConstant(Correct):
    def solve(self, reduced, options):
        found = super().solve(reduced, options)
        return found._replace(bound=found.bound - reduced.offset)


class ExpectsEqualGroups(Correct):
    def solve(self, reduced, options):
        reduced.cost.reshape(reduced.choose.shape[0], -1)
        return super().solve(reduced, options)


class NeedsABudget(Correct):
    def solve(self, reduced, options):
        if reduced.use.shape[0] == 0:
            raise IndexError("no budget")
        return super().solve(reduced, options)


class KnowsOneBudget(Correct):
    def solve(self, reduced, options):
        upper = np.where(np.arange(len(reduced.upper)) == 0, reduced.upper, np.inf)
        return super().solve(replace(reduced, upper=upper), options)


class KnowsNoLowerLimits(Correct):
    def solve(self, reduced, options):
        return super().solve(replace(reduced, lower=np.full_like(reduced.lower, -np.inf)), options)


class DividesByTheSpread(Correct):
    def solve(self, reduced, options):
        if not reduced.cost.any():
            raise ZeroDivisionError
        return super().solve(reduced, options)


class RefusesNegativeCosts(Correct):
    def solve(self, reduced, options):
        if reduced.constant < 0:
            raise ValueError("negative")
        return super().solve(reduced, options)


class UndoesTheScaling(Correct):
    """Undoes the scaling in float16, which holds neither 1e-12 nor 1e12."""

    def solve(self, reduced, options):
        with np.errstate(all="ignore"):
            cost = np.nan_to_num((reduced.cost * reduced.unit).astype(np.float16).astype(np.float64))
        return super().solve(replace(reduced, cost=cost / reduced.unit), options)._replace(bound=-np.inf)


class RoundsCosts(Correct):
    """Rounds costs to integers, so those far below the median are lost."""

    def solve(self, reduced, options):
        return super().solve(replace(reduced, cost=np.rint(reduced.cost)), options)._replace(bound=-np.inf)


class IsLate(Correct):
    def solve(self, reduced, options):
        time.sleep(0.3)
        return super().solve(reduced, options)


class Alternates(Correct):
    def __init__(self):
        self.calls = itertools.count()

    def solve(self, reduced, options):
        found = super().solve(reduced, options)
        return found._replace(bound=found.bound - next(self.calls) % 2)


class WritesToTheProblem(Correct):
    def solve(self, reduced, options):
        found = super().solve(reduced, options)
        reduced.cost[0] += 1.0
        return found


class TripsOverTheStart(Correct):
    def solve(self, reduced, options):
        found = super().solve(reduced, options)
        return found if reduced.start is None else found._replace(x=None)


class HasOneThread(Correct):
    def solve(self, reduced, options):
        if options.threads > 1:
            raise ValueError("one thread only")
        return super().solve(reduced, options)
