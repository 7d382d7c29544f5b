"""The least error within limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora.allocation._infeasible import blame, check_each
from lqlora.errors import SolverError
from lqlora.solvers import Problem, Status, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.allocation._choices import Bound, Choices
    from lqlora.solvers import Solution, SolveOptions

__all__ = ["least_error"]


def least_error(choices: Choices, bounds: Sequence[Bound], solver: str, options: SolveOptions) -> Solution:
    """Minimize the sum of costs within limits."""
    check_each(choices, bounds)
    budgets = [bound.budget() for bound in bounds]
    problem = Problem(choices.table.costs, choices.size, choices.allowed, choices.ties, budgets)
    found = solve(problem, solver, options)
    if found.status is Status.INFEASIBLE:
        raise blame(choices, bounds, solver, options)
    if found.assignment is None:
        raise SolverError(f"{found.solver}: {found.status.value} ({found.message})")
    return found
