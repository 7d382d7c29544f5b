"""Which limit cannot be met, and what could be."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from lqlora.errors import InfeasibleBudgetError
from lqlora.solvers import Problem, Status, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lqlora.allocation._choices import Bound, Choices
    from lqlora.solvers import Solution, SolveOptions

__all__ = ["blame", "check_each"]

#: An explanation may ask several questions, and take so long for each.
_SECONDS = 10.0

#: Relative gap of an assignment that only shows that there is one.
_COARSE = 0.5

#: So many limits are named beside the one that cannot be met.
_NAMED = 5


def check_each(choices: Choices, bounds: Sequence[Bound]) -> None:
    """Raise if a limit is out of reach whatever the other limits are."""
    for bound in bounds:
        low, high = choices.size_range(bound.members)
        if bound.breaks(high if bound.limit.at_least else low):
            raise _error(bound, low, high, "")


def blame(choices: Choices, bounds: Sequence[Bound], solver: str, options: SolveOptions) -> InfeasibleBudgetError:
    """Find the first limit that those before it put out of reach, and what they leave; together they are infeasible."""
    options = replace(options, start=None, time_limit=min(options.time_limit or _SECONDS, _SECONDS))
    feasible, infeasible = 0, len(bounds)
    while infeasible - feasible > 1:
        some = (feasible + infeasible) // 2
        found = _solve(choices, choices.table.costs, bounds[:some], solver, replace(options, rel_gap=_COARSE))
        feasible, infeasible = (feasible, some) if found.status is Status.INFEASIBLE else (some, infeasible)
    bound, others = bounds[feasible], bounds[:feasible]
    counted = np.where(bound.members[:, None], choices.size, 0).astype(np.float64)
    smallest, largest = (_solve(choices, cost, others, solver, options) for cost in (counted, -counted))
    low, high = choices.size_range(bound.members)
    low, high = max(low, _bits(smallest)), min(high, -_bits(largest))
    named = "; ".join(str(other.limit) for other in others[:_NAMED])
    return _error(
        bound, low, high, f" together with {named}" + f"; and {len(others) - _NAMED} more" * (len(others) > _NAMED)
    )


def _solve(
    choices: Choices, cost: npt.NDArray[np.float64], bounds: Sequence[Bound], solver: str, options: SolveOptions
) -> Solution:
    budgets = [bound.budget() for bound in bounds]
    return solve(Problem(cost, choices.size, choices.allowed, choices.ties, budgets), solver, options)


def _bits(found: Solution) -> int:
    """Return the bits that were found, or else those that cannot be passed."""
    bits = found.bound if found.assignment is None else found.objective
    return round(bits) if math.isfinite(bits) else -(2**62)


def _error(bound: Bound, low: int, high: int, others: str) -> InfeasibleBudgetError:
    if bound.limit.total_bytes is not None:
        amounts = f"{-(-low // 8)} to {high // 8} bytes"
    else:
        amounts = f"{low / max(1, bound.weight_count):.4f} to {high / max(1, bound.weight_count):.4f} bits per weight"
    cure = "Lower it, or allow larger formats." if bound.limit.at_least else "Raise it, or allow smaller formats."
    message = f"A budget of {bound.limit} is infeasible{others}: the formats allow {amounts}. {cure}"
    count = max(1, bound.weight_count)
    asked = bound.limit.in_bits(bound.weight_count) / count
    return InfeasibleBudgetError(message, asked=asked, minimum=Fraction(low, count), maximum=Fraction(high, count))
