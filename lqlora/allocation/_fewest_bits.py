"""Plans of fewest bits within an error: bits become the costs of the integer program, and errors its sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora.allocation._solving import check_each, least_error
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.solvers import Budget, Problem, Status, relative_gap, solve

if TYPE_CHECKING:
    from lqlora.allocation._constraints import Choices
    from lqlora.solvers import Solution, SolveOptions

__all__ = ["fewest_bits"]

#: The limit of the error is 2 to this power units, unless that many would overflow the integers of solvers.
_UNIT_BITS = 40


def fewest_bits(choices: Choices, max_error: float, solver: str, options: SolveOptions) -> Solution:
    """Return the assignment of fewest counted bits whose sum of costs, rounded once, is at most ``max_error``."""
    # Solvers count errors in integers (see _integer_errors), which float errors do not fit exactly. Errors that are
    # rounded down admit every valid assignment, so the bound proven for them holds for the true problem. They may also
    # admit an assignment whose error is slightly too large. In that case the problem is solved again with errors that
    # are rounded up, which admit valid assignments only. If these admit none, the assignment of least error is the last
    # candidate: if even that is too large, there is no plan.
    limit = _checked_error(max_error)
    check_each(choices.limits)
    found = _solve_in_integers(choices, limit, solver, options, up=False)
    bound = found.bound
    if found.assignment is not None and _error_of(choices, found) > limit:
        found = _solve_in_integers(choices, limit, solver, options, up=True)
    if _error_of(choices, found) > limit:
        found = _least_error_in_bits(choices, limit, solver, options)
    return _with_bound(found, bound, options.rel_gap)


def _least_error_in_bits(choices: Choices, limit: float, solver: str, options: SolveOptions) -> Solution:
    """Return the assignment of least error, with its bits as objective, or raise if its error is above the limit."""
    found = least_error(choices, choices.limits, solver, replace(options, rel_gap=0.0))
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
        raise InvalidArgumentError(f"max_error must be a finite number of at least 0, got {max_error!r}.")
    return limit


def _solve_in_integers(choices: Choices, limit: float, solver: str, options: SolveOptions, *, up: bool) -> Solution:
    found = solve(_swapped(choices, limit, up=up), solver, options)
    if found.status is Status.NO_SOLUTION:
        raise SolverError(f"{found.solver}: {found.status.value} ({found.message})")
    if found.assignment is None:
        return found
    return replace(found, assignment=found.assignment[: len(choices.size)])


def _swapped(choices: Choices, limit: float, *, up: bool) -> Problem:
    """Return the problem with bits as costs and integer errors as sizes."""
    # All budgets of a problem count one table of sizes, but here the error budget counts errors and the other limits
    # count bits. Every matrix therefore has two rows, tied to each other. The first n rows have the bits, as costs and
    # as sizes, and the limits count them. The last n rows have the errors as sizes and no cost, and only the error
    # budget counts them.
    errors, most, allowed = _integer_errors(choices, limit, up=up)
    zeros = np.zeros(len(errors), dtype=np.bool_)
    budgets = [Budget(most, members=np.concatenate([zeros, ~zeros]))]
    for own in choices.limits:
        budget = own.budget()
        budgets.append(Budget(budget.upper, budget.lower, np.concatenate([own.members, zeros])))
    return Problem(
        np.concatenate([choices.size.astype(np.float64), np.zeros(errors.shape)]),
        np.concatenate([choices.size, errors]),
        np.concatenate([allowed, allowed]),
        np.concatenate([choices.ties, choices.ties]),
        budgets,
    )


def _integer_errors(
    choices: Choices, limit: float, *, up: bool
) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[np.bool_]]:
    """Return errors minus the least one of their row, as integers, with the limit on their sum and allowed choices."""
    # Let e_ij be the error of row i in column j, l_i the least allowed one of the row, a_ij = e_ij - l_i >= 0, and
    # R = limit - sum_i l_i the room above the least errors. An assignment j(i) is valid if sum_i a_ij(i) <= R.
    # In float64 each a_ij, R, and the sum that is rounded once are off by at most 2^-53 of numbers that are not above
    # the limit. Together that is less than s = (n + 4) 2^-52 limit. With the unit u = (R + s) / 2^U:
    #   rounded down: valid => sum a <= R + s => sum floor(a / u) <= 2^U           (no valid assignment is lost)
    #   rounded up:   sum ceil(a / u) <= floor((R - s) / u) => sum a <= R - s => valid   (nothing invalid is let in)
    # The factors 1 -+ 2^-50 cover the rounding of the quotient a / u itself.
    n, cells = len(choices.size), choices.size.size
    least = np.where(choices.allowed, choices.table.costs, np.inf).min(axis=1)
    above = choices.table.costs - least[:, None]
    room = max(limit - math.fsum(least.tolist()), 0.0)
    slack = (n + 4) * 2.0**-52 * limit
    # U is at most 40. A sum over n rows stays below 2^52, so that float64 holds it exactly, and a sum over all n * k
    # cells stays below 2^61, so that int64 does. The unit is a normal number even if the limit is 0 or subnormal.
    units = 2.0 ** min(_UNIT_BITS, 52 - n.bit_length(), 61 - cells.bit_length())
    unit = max((room + slack) / units, 2.0**-1022)
    allowed = choices.allowed & (above <= room + slack)
    share = np.where(allowed, above, 0.0) / unit
    if up:
        return np.ceil(share * (1 + 2.0**-50)).astype(np.int64), int(max(room - slack, 0.0) / unit), allowed
    return np.floor(share * (1 - 2.0**-50)).astype(np.int64), int(units), allowed


def _error_of(choices: Choices, found: Solution) -> float:
    """Return the sum of costs, rounded once, or infinity without an assignment."""
    if found.assignment is None:
        return math.inf
    return math.fsum(choices.table.costs[np.arange(len(found.assignment)), found.assignment].tolist())


def _with_bound(found: Solution, bound: float, rel_gap: float) -> Solution:
    # The bound is that of the relaxed problem. Solvers compute it in floats, so it may exceed the objective by
    # rounding.
    bound = min(bound, found.objective)
    status = Status.OPTIMAL if relative_gap(found.objective, bound) <= rel_gap + 1e-12 else Status.FEASIBLE
    return replace(found, bound=bound, status=status)


def _too_small(choices: Choices, limit: float, least: float) -> InfeasibleBudgetError:
    most = math.fsum(np.where(choices.allowed, choices.table.costs, 0.0).max(axis=1).tolist())
    message = (
        f"max_error of {limit:.6g} is infeasible: the least error is {least:.6g}. Raise it, or allow larger formats."
    )
    return InfeasibleBudgetError(message, asked=Fraction(limit), minimum=Fraction(least), maximum=Fraction(most))
