"""From what a solver found to a plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from lqlora.allocation.plan import Plan
from lqlora.errors import SolverError
from lqlora.solvers import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.allocation._choices import Bound, Choices
    from lqlora.solvers import Solution

__all__ = ["make_plan"]


def make_plan(
    choices: Choices,
    found: Solution,
    budget: Sequence[Bound] = (),
    *,
    goal: Literal["error", "bits"] = "error",
    require_optimal: bool = False,
) -> Plan:
    """Write down a solution; ``budget`` is empty or the one that a note may be about."""
    if require_optimal and found.status is not Status.OPTIMAL:
        raise SolverError(f"{found.solver}: the relative gap is {found.gap:.2g}. {found.status.value}")
    table, names = choices.table, choices.table.names
    columns = () if found.assignment is None else found.assignment.tolist()
    chosen = dict(zip(names, [table.configurations[j] for j in columns], strict=True))
    rows = np.arange(len(names))
    costs, factors = table.costs[rows, found.assignment], table.factor_sizes[rows, found.assignment]
    objective = found.objective if goal == "bits" else math.fsum(costs.tolist())
    return Plan(
        {name: own.format for name, own in chosen.items()},
        {name: own.rank for name, own in chosen.items()},
        dict(zip(names, table.shapes, strict=True)),
        dict(zip(names, costs.tolist(), strict=True)),
        objective,
        min(found.bound, objective),
        found.status.name,
        f"{found.solver} {found.version}",
        "; ".join(_note(choices, bound) for bound in budget),
        goal,
        dict(zip(names, factors.tolist(), strict=True)),
        choices.counts_factors,
        found.seconds,
    )


def _note(choices: Choices, bound: Bound) -> str:
    binds = bound.bits < choices.size_range(bound.members)[1]
    return "" if binds else "The budget is above the dearest choice of formats: it does not bind."
