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

    from lqlora.allocation._choices import Bound, Choices
    from lqlora.solvers import SolveOptions

__all__ = ["blame", "check_each"]


def check_each(choices: Choices, bounds: Sequence[Bound]) -> None:
    """Raise if a limit is out of reach whatever the other limits are."""
    for bound in bounds:
        low, high = choices.size_range(bound.members)
        if bound.breaks(high if bound.limit.at_least else low):
            raise _error(bound, low, high, "")


def blame(choices: Choices, bounds: Sequence[Bound], solver: str, options: SolveOptions) -> InfeasibleBudgetError:
    """Find the first limit that those before it put out of reach, and what they leave."""
    options = replace(options, rel_gap=0.0, start=None)
    for k, bound in enumerate(bounds):
        low, high = _range(choices, bounds[:k], bound, solver, options)
        if bound.breaks(high if bound.limit.at_least else low):
            return _error(bound, low, high, f" together with {'; '.join(str(other.limit) for other in bounds[:k])}")
    low, high = choices.size_range(bounds[-1].members)
    return _error(bounds[-1], low, high, " together with the other limits")


def _range(
    choices: Choices, others: Sequence[Bound], bound: Bound, solver: str, options: SolveOptions
) -> tuple[int, int]:
    """Return proven limits of the size of a limit's matrices, given other limits."""
    counted = np.where(bound.members[:, None], choices.size, 0).astype(np.float64)
    ends = []
    for cost in (counted, -counted):
        problem = Problem(cost, choices.size, choices.allowed, choices.ties, [other.budget() for other in others])
        found = solve(problem, solver, options)
        ends.append(found.objective if found.status is Status.OPTIMAL else found.bound)
    low, high = choices.size_range(bound.members)
    return max(low, round(ends[0])) if math.isfinite(ends[0]) else low, (
        min(high, round(-ends[1])) if math.isfinite(ends[1]) else high
    )


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
