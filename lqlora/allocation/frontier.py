"""The least error as a function of the budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lqlora.allocation._choices import constrain
from lqlora.allocation._least_error import least_error
from lqlora.allocation._planning import make_plan
from lqlora.allocation.limits import Limit
from lqlora.solvers import SolveOptions, Status, relative_gap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from fractions import Fraction

    from lqlora._patterns import Pattern
    from lqlora.allocation._allowed import Wanted
    from lqlora.allocation.plan import Plan
    from lqlora.allocation.ties import Tie
    from lqlora.costs.table import CostTable
    from lqlora.solvers import Solution

__all__ = ["pareto"]


def pareto(
    table: CostTable,
    budgets: Iterable[float | Fraction],
    *,
    limits: Iterable[Limit] = (),
    ties: Iterable[Tie] = (),
    fixed: Mapping[Pattern, Wanted] | None = None,
    forbidden: Mapping[Pattern, Wanted] | None = None,
    minimum_bits: Mapping[Pattern, float | Fraction] | None = None,
    count_factors: bool | None = None,
    solver: str = "auto",
    time_limit: float | None = None,
    rel_gap: float = 1e-6,
    require_optimal: bool = False,
) -> list[Plan]:
    """Allocate for several budgets: the frontier of error against size.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    budgets : iterable of float or Fraction
        Bits per weight, in any order. Bytes are ``Fraction(8 * total_bytes, table.weight_count)``.
    limits, ties, fixed, forbidden, minimum_bits, count_factors : as in :func:`allocate`
        The same for every budget.
    solver, time_limit, rel_gap, require_optimal : as in :func:`allocate`
        The time is for each budget.

    Returns
    -------
    list of Plan
        One for each budget, in their order. Of two plans the one of the larger budget never has the larger error: where
        a search ended with more, within its gap or its time, the plan of the smaller budget takes its place.

    Raises
    ------
    InfeasibleBudgetError
        If one of the budgets or limits cannot be met.
    InvalidArgumentError, SolverError
        As in :func:`allocate`.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse(f"nf{bits}/64:float16") for bits in (2, 3, 4)]
    >>> rng = np.random.default_rng(0)
    >>> table = lq.cost_table({n: s * rng.standard_normal((32, 32)) for n, s in [("a", 1), ("b", 9)]}, formats, rank=2)
    >>> [float(plan.bits_per_weight) for plan in lq.pareto(table, [2.5, 3, 3.5, 4])]
    [2.25, 2.75, 3.25, 3.75]
    """
    choices = constrain(
        table,
        limits=limits,
        ties=ties,
        fixed=fixed,
        forbidden=forbidden,
        minimum_bits=minimum_bits,
        count_factors=count_factors,
    )
    bounds = [choices.bound(Limit(bits_per_weight=budget)) for budget in budgets]
    options = SolveOptions(time_limit=time_limit, rel_gap=rel_gap)
    plans: dict[int, Plan] = {}
    best: Solution | None = None
    for bound in sorted(bounds, key=lambda bound: bound.bits):
        if bound.bits in plans:
            continue
        if best is not None:
            options = replace(options, start=best.assignment)
        found = least_error(choices, (*choices.bounds, bound), solver, options)
        best = found if best is None else _better(found, best, rel_gap)
        plans[bound.bits] = make_plan(choices, best, (bound,), require_optimal=require_optimal)
    return [plans[bound.bits] for bound in bounds]


def _better(found: Solution, before: Solution, rel_gap: float) -> Solution:
    """Take the assignment of the smaller budget if it costs less; what was proven for the larger one holds for it."""
    if found.objective <= before.objective:
        return found
    status = Status.OPTIMAL if relative_gap(before.objective, found.bound) <= rel_gap else found.status
    return replace(found, assignment=before.assignment, objective=before.objective, status=status)
