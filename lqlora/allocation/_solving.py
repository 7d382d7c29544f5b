"""Plans of least error within limits; for limits that no plan meets, the one that fails and its feasible range."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from lqlora.errors import InfeasibleBudgetError, SolverError
from lqlora.solvers import Problem, Status, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lqlora.allocation._constraints import AppliedLimit, Choices
    from lqlora.solvers import Solution, SolveOptions

__all__ = ["check_each", "least_error"]

#: Seconds of each of the solver's runs that explain why limits are infeasible.
_SECONDS = 10.0

#: Relative gap of an assignment that only shows that there is one.
_COARSE = 0.5

#: An error lists at most this many limits beside the one that fails.
_NAMED = 5


def least_error(choices: Choices, limits: Sequence[AppliedLimit], solver: str, options: SolveOptions) -> Solution:
    """Return the assignment that minimizes the sum of costs within limits."""
    check_each(limits)
    found = _solve(choices, choices.table.costs, limits, solver, options)
    if found.status is Status.INFEASIBLE:
        raise _explain(choices, limits, solver, options)
    if found.assignment is None:
        raise SolverError(f"{found.solver}: {found.status.value} ({found.message})")
    return found


def check_each(limits: Sequence[AppliedLimit]) -> None:
    """Raise if a limit is out of reach even without the other limits."""
    for own in limits:
        if own.is_out_of_reach:
            raise _infeasible(own, own.smallest, own.largest, "")


def _solve(
    choices: Choices,
    cost: npt.NDArray[np.float64],
    limits: Sequence[AppliedLimit],
    solver: str,
    options: SolveOptions,
) -> Solution:
    budgets = [own.budget() for own in limits]
    return solve(Problem(cost, choices.size, choices.allowed, choices.ties, budgets), solver, options)


def _explain(
    choices: Choices, limits: Sequence[AppliedLimit], solver: str, options: SolveOptions
) -> InfeasibleBudgetError:
    """Return the error for limits that cannot hold together. It names the first one that contradicts earlier ones."""
    # A limit can only remove assignments. So there is one number i such that the first i limits are feasible together
    # and the first i + 1 are not, and bisection finds it in about log2(number of limits) runs. Limit i, counted from 0,
    # is the one that fails. The loop keeps "the first `feasible` are feasible, the first `infeasible` are not".
    options = replace(options, start=None, time_limit=min(options.time_limit or _SECONDS, _SECONDS))
    feasible, infeasible = 0, len(limits)
    while infeasible - feasible > 1:
        middle = (feasible + infeasible) // 2
        found = _solve(choices, choices.table.costs, limits[:middle], solver, replace(options, rel_gap=_COARSE))
        feasible, infeasible = (feasible, middle) if found.status is Status.INFEASIBLE else (middle, infeasible)
    failing, others = limits[feasible], limits[:feasible]
    # Two more runs minimize and maximize the size of its matrices within the limits before it: the range that is left.
    # The proven bound stands in for a run that finds nothing in its time.
    counted = np.where(failing.members[:, None], choices.size, 0).astype(np.float64)
    smallest, largest = (_solve(choices, cost, others, solver, options) for cost in (counted, -counted))
    low, high = max(failing.smallest, _bits(smallest)), min(failing.largest, -_bits(largest))
    listed = "; ".join(str(other.limit) for other in others[:_NAMED])
    more = f"; and {len(others) - _NAMED} more" * (len(others) > _NAMED)
    return _infeasible(failing, low, high, f" together with {listed}{more}")


def _bits(found: Solution) -> int:
    """Return the bits of the assignment that was found, or the proven bound if none was."""
    bits = found.bound if found.assignment is None else found.objective
    return round(bits) if math.isfinite(bits) else -(2**62)


def _infeasible(own: AppliedLimit, low: int, high: int, others: str) -> InfeasibleBudgetError:
    limit, count = own.limit, max(1, own.weight_count)
    kind = "at least" if limit.at_least else "at most"
    if limit.total_bytes is not None:
        wanted, allowed = f"total_bytes of {kind} {limit.total_bytes}", f"{-(-low // 8)} to {high // 8} bytes"
    else:
        wanted = f"bits_per_weight of {kind} {float(limit.in_bits(1)):.6g}"
        allowed = f"{low / count:.4f} to {high / count:.4f} bits per weight"
    remedy = "Lower it, or allow larger formats." if limit.at_least else "Raise it, or allow smaller formats."
    message = f"{wanted} for {limit.matrices} is infeasible{others}: the formats allow {allowed}. {remedy}"
    asked = limit.in_bits(own.weight_count) / count
    return InfeasibleBudgetError(message, asked=asked, minimum=Fraction(low, count), maximum=Fraction(high, count))
