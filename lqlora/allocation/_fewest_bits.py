"""The fewest bits within an error: bits are the costs, and errors, as integers, the sizes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora.allocation._infeasible import check_each
from lqlora.allocation._least_error import least_error
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.solvers import Budget, Problem, Status, relative_gap, solve

if TYPE_CHECKING:
    from lqlora.allocation._choices import Choices
    from lqlora.solvers import Solution, SolveOptions

__all__ = ["fewest_bits"]

#: The limit of the error is so many units, as a power of two, where the integers of solvers have room for it.
_UNIT_BITS = 40


def fewest_bits(choices: Choices, max_error: float, solver: str, options: SolveOptions) -> Solution:
    """Minimize the counted bits such that the sum of costs, rounded once, is at most a limit.

    Solvers count errors in integers. Rounded down they admit every valid assignment, so that what is proven of the bits
    holds for the limit itself; an assignment that this lets through by mistake is looked for again with errors rounded
    up, which admits valid ones only.
    """
    limit = _checked_error(max_error)
    check_each(choices, choices.bounds)
    loose, strict = (
        functools.partial(_solve_in_integers, choices, limit, solver, options, up=up) for up in (False, True)
    )
    found = loose()
    bound = found.bound
    if found.assignment is not None and _error_of(choices, found) > limit:
        found = strict()
    if _error_of(choices, found) > limit:
        found = _least_error_in_bits(choices, limit, solver, options)
    return _with_bound(found, bound, options.rel_gap)


def _least_error_in_bits(choices: Choices, limit: float, solver: str, options: SolveOptions) -> Solution:
    """Return the assignment of least error, if that is within the limit."""
    found = least_error(choices, choices.bounds, solver, replace(options, rel_gap=0.0))
    least = _error_of(choices, found)
    if least > limit:
        raise _too_small(choices, limit, least)
    bits = choices.size[np.arange(len(choices.size)), found.assignment].sum()
    return replace(found, objective=float(bits))


def _checked_error(max_error: float) -> float:
    try:
        limit = float(max_error)
    except (OverflowError, TypeError, ValueError):
        limit = math.nan
    if not (math.isfinite(limit) and limit >= 0):
        raise InvalidArgumentError(f"A limit of the error is a finite number of at least 0, not {max_error!r}.")
    return limit


def _solve_in_integers(choices: Choices, limit: float, solver: str, options: SolveOptions, *, up: bool) -> Solution:
    found = solve(_swapped(choices, limit, up=up), solver, options)
    if found.status is Status.NO_SOLUTION:
        raise SolverError(f"{found.solver}: {found.status.value} ({found.message})")
    if found.assignment is None:
        return found
    return replace(found, assignment=found.assignment[: len(choices.size)])


def _swapped(choices: Choices, limit: float, *, up: bool) -> Problem:
    """Let bits be costs and errors be sizes.

    Budgets of a problem share one table of sizes, so every matrix is there twice, tied to itself: the first half of
    the rows has the bits, the second the errors.
    """
    errors, most, allowed = _integer_errors(choices, limit, up=up)
    n = len(errors)
    zeros = np.zeros(n, dtype=np.bool_)
    halves = [Budget(most, members=np.concatenate([zeros, ~zeros]))]
    for bound in choices.bounds:
        own = bound.budget()
        halves.append(Budget(own.upper, own.lower, np.concatenate([bound.members, zeros])))
    return Problem(
        np.concatenate([choices.size.astype(np.float64), np.zeros(errors.shape)]),
        np.concatenate([choices.size, errors]),
        np.concatenate([allowed, allowed]),
        np.concatenate([choices.ties, choices.ties]),
        halves,
    )


def _integer_errors(
    choices: Choices, limit: float, *, up: bool
) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[np.bool_]]:
    """Return errors above each row's least as integers, their limit, and the choices that alone are within it."""
    n, size = len(choices.size), choices.size.size
    least = np.where(choices.allowed, choices.table.costs, np.inf).min(axis=1)
    above = choices.table.costs - least[:, None]
    room = max(limit - math.fsum(least.tolist()), 0.0)
    slack = (n + 4) * 2.0**-52 * limit  # what the differences and the limit may be wrong by
    units = 2.0 ** min(_UNIT_BITS, 52 - n.bit_length(), 61 - size.bit_length())
    unit = max((room + slack) / units, 2.0**-1022)
    allowed = choices.allowed & (above <= room + slack)
    share = np.where(allowed, above, 0.0) / unit
    if up:
        return np.ceil(share * (1 + 2.0**-50)).astype(np.int64), int(max(room - slack, 0.0) / unit), allowed
    return np.floor(share * (1 - 2.0**-50)).astype(np.int64), int(units), allowed


def _error_of(choices: Choices, found: Solution) -> float:
    if found.assignment is None:
        return math.inf
    return math.fsum(choices.table.costs[np.arange(len(found.assignment)), found.assignment].tolist())


def _with_bound(found: Solution, bound: float, rel_gap: float) -> Solution:
    bound = min(bound, found.objective)
    status = Status.OPTIMAL if relative_gap(found.objective, bound) <= rel_gap + 1e-12 else Status.FEASIBLE
    return replace(found, bound=bound, status=status)


def _too_small(choices: Choices, limit: float, least: float) -> InfeasibleBudgetError:
    most = math.fsum(np.where(choices.allowed, choices.table.costs, 0.0).max(axis=1).tolist())
    message = f"A total error of at most {limit:.6g} is infeasible: the least is {least:.6g}. Raise it, or allow larger formats."
    return InfeasibleBudgetError(message, asked=Fraction(limit), minimum=Fraction(least), maximum=Fraction(most))
