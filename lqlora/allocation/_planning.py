"""From what a solver found to a plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lqlora.allocation.demand import Demand
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
    max_error: float | None = None,
    require_optimal: bool = False,
) -> Plan:
    """Write down a solution; ``budget`` is empty or the one that a note may be about, beside ``choices.bounds``."""
    if require_optimal and found.status is not Status.OPTIMAL:
        raise SolverError(f"{found.solver}: the relative gap is {found.gap:.2g}. {found.status.value}")
    table, names = choices.table, choices.table.names
    columns = () if found.assignment is None else found.assignment.tolist()
    chosen = dict(zip(names, [table.configurations[j] for j in columns], strict=True))
    rows = np.arange(len(names))
    costs, factors = table.costs[rows, found.assignment], table.factor_sizes[rows, found.assignment]
    error = math.fsum(costs.tolist())
    objective = error if max_error is None else found.objective
    bits = choices.size[rows, found.assignment]
    demands = [_demand(bound, int(bits[bound.members].sum())) for bound in (*budget, *choices.bounds)]
    if max_error is not None:
        demands.insert(0, Demand("all matrices", error, float(max_error), unit="error", weights=table.weight_count))
    return Plan(
        formats={name: own.format for name, own in chosen.items()},
        ranks={name: own.rank for name, own in chosen.items()},
        shapes=dict(zip(names, table.shapes, strict=True)),
        costs=dict(zip(names, costs.tolist(), strict=True)),
        factor_bits=dict(zip(names, factors.tolist(), strict=True)),
        counts_factors=choices.counts_factors,
        demands=tuple(demands),
        objective=objective,
        bound=min(found.bound, objective),
        status=found.status.name,
        solver=f"{found.solver} {found.version}",
        goal="error" if max_error is None else "bits",
        note="; ".join(_note(choices, bound) for bound in budget),
        seconds=found.seconds,
    )


def _demand(bound: Bound, used: int) -> Demand:
    upper, lower = (None, bound.bits) if bound.limit.at_least else (bound.bits, None)
    return Demand(bound.limit.matrices, used, upper, lower, weights=bound.weight_count)


def _note(choices: Choices, bound: Bound) -> str:
    binds = bound.bits < choices.size_range(bound.members)[1]
    return "" if binds else "The budget is above the dearest choice of formats: it does not bind."
