"""Plans within a budget: ``allocate`` for one budget or error, ``pareto`` for several budgets of one cost table."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from lqlora._annotations import annotated
from lqlora._options import require_kind
from lqlora.allocation._constraints import constrain
from lqlora.allocation._fewest_bits import fewest_bits
from lqlora.allocation._solving import least_error
from lqlora.allocation.limits import Limit, LimitUse
from lqlora.allocation.plan import Plan, PlannedMatrix
from lqlora.errors import InvalidArgumentError, SolverError
from lqlora.solvers import SolveOptions, Status, relative_gap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from fractions import Fraction

    import numpy.typing as npt

    from lqlora._patterns import Pattern
    from lqlora.allocation._constraints import AppliedLimit, Choices, Wanted
    from lqlora.allocation.ties import Tie
    from lqlora.costs.table import CostTable
    from lqlora.solvers import Solution

__all__ = ["allocate", "pareto"]


@annotated
def allocate(
    table: CostTable,
    *,
    bits_per_weight: float | Fraction | None = None,
    total_bytes: int | None = None,
    max_error: float | None = None,
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
) -> Plan:
    r"""Choose a configuration for each matrix: the least error within a budget, or the fewest bits within an error.

    A *pattern* is a name or its end (``"q_proj"``), a shell pattern (``"*.attn.*"``), a compiled regular expression that
    matches the whole name, or a function of the name. A pattern that matches no matrix of the table is an error.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    bits_per_weight : float or Fraction, optional
        Budget as an average over all weights. Codes, zero points, scales and second-level scales count. Low-rank
        factors count if ``count_factors`` is True.
    total_bytes : int, optional
        Budget in bytes. The same parts count. :func:`memory_budget` computes one from the memory of a device.
    max_error : float, optional
        Upper limit of the sum of the costs, instead of a budget. The plan is the smallest one within it. Give one of
        the three; with ``limits`` you may also give none.
    limits : iterable of Limit
        Further upper or lower limits on the sizes of some matrices. All hold at once.
    ties : iterable of patterns, or of sequences of patterns
        Matrices that take one configuration, such as those that a serving engine fuses. All matches of a sequence are
        one group. All matches of a single pattern are one group, too, unless it is a regular expression with groups:
        ``re.compile(r"(.*)\.(?:gate|up)_proj")`` ties names that agree in the groups. Overlapping ties merge.
        :func:`lqlora.allocation.ties.fused_projections` and :func:`lqlora.allocation.ties.experts` find the usual ones.
    fixed : mapping of pattern to BlockFormat, Configuration, or several of them, optional
        Configurations that a matrix may take. A format allows every rank. If several configurations are given, the plan
        takes one of them. If several patterns match a matrix, all of them hold.
    forbidden : mapping of pattern to BlockFormat, Configuration, or several of them, optional
        Configurations that a matrix must not take.
    minimum_bits : mapping of pattern to float or Fraction, optional
        Least bits per weight of the quantized part of each matrix that matches, scales included.
    count_factors : bool, optional
        Whether low-rank factors count in the budget and in all limits. By default they count if the table has several
        ranks, since the largest rank would be free otherwise.
    solver : str, default "auto"
        See :func:`lqlora.solvers.solve`.
    time_limit : float, optional
        Seconds of a search. With ``max_error`` there may be two searches.
    rel_gap : float, default 1e-6
        Relative gap at which an assignment counts as optimal.
    require_optimal : bool, default False
        Whether to raise an error instead of returning a plan with a larger gap when time ran out.

    Returns
    -------
    Plan
        Plan within the budget and all limits in exact integers, and within ``max_error`` as :attr:`Plan.error` is
        computed. No plan within the budget has a sum of costs below ``Plan.bound``. With ``max_error``, no plan within
        it takes fewer bits. If the budget is above the size of the largest choice, the plan has the least cost and a
        note.

    Raises
    ------
    InfeasibleBudgetError
        If no choice fits. The error holds the limit that fails, and its feasible range.
    InvalidArgumentError
        If a budget is negative or not a number, a pattern matches nothing, a format is not in the table, or a matrix
        has no configuration left.
    SolverError
        If the solver failed, found nothing in time, or left a larger gap than ``require_optimal`` allows.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse("nf2/64:float16"), lq.BlockFormat.parse("nf4/64:float16")]
    >>> rng = np.random.default_rng(0)
    >>> table = lq.cost_table({n: s * rng.standard_normal((32, 32)) for n, s in [("a", 1), ("b", 9)]}, formats, rank=2)
    >>> plan = lq.allocate(table, bits_per_weight=3.25)
    >>> {name: str(fmt) for name, fmt in plan.formats.items()}
    {'a': 'nf2/64:float16', 'b': 'nf4/64:float16'}

    The fewest bits with this error:

    >>> lq.allocate(table, max_error=plan.error).bits_per_weight
    Fraction(13, 4)
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
    budget = _budget(choices, bits_per_weight, total_bytes, max_error)
    options = SolveOptions(time_limit=time_limit, rel_gap=rel_gap)
    require_kind(require_optimal, "require_optimal", bool, "True or False")
    if max_error is not None:
        found = fewest_bits(choices, max_error, solver, options)
        return _make_plan(choices, found, max_error=max_error, require_optimal=require_optimal)
    found = least_error(choices, (*choices.limits, *budget), solver, options)
    return _make_plan(choices, found, budget, require_optimal=require_optimal)


@annotated
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
    """Return plans for several budgets: the Pareto frontier of error against size.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    budgets : iterable of float or Fraction
        Bits per weight, in any order. Bytes are ``Fraction(8 * total_bytes, table.weight_count)``.
    limits, ties, fixed, forbidden, minimum_bits, count_factors : as in :func:`allocate`
        The same for every budget.
    solver, time_limit, rel_gap, require_optimal : as in :func:`allocate`
        The time limit holds for each budget.

    Returns
    -------
    list of Plan
        One plan for each budget, in their order. The plan of a larger budget never has a larger error: if its search
        ended with a larger one, within its gap or its time, it takes the choices of the smaller budget.

    Raises
    ------
    InfeasibleBudgetError
        If one of the budgets or limits cannot be met.
    InvalidArgumentError, SolverError
        See :func:`allocate`.

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
    applied = [choices.apply(Limit(bits_per_weight=budget)) for budget in budgets]
    options = SolveOptions(time_limit=time_limit, rel_gap=rel_gap)
    require_kind(require_optimal, "require_optimal", bool, "True or False")
    plans: dict[int, Plan] = {}
    best: Solution | None = None
    # From small to large: the plan of a smaller budget is feasible for a larger one, so the search starts from it.
    for budget in sorted(applied, key=lambda own: own.bits):
        if budget.bits in plans:
            continue
        if best is not None:
            options = dataclasses.replace(options, start=best.assignment)
        found = least_error(choices, (*choices.limits, budget), solver, options)
        best = found if best is None else _better(found, best, rel_gap)
        plans[budget.bits] = _make_plan(choices, best, (budget,), require_optimal=require_optimal)
    return [plans[budget.bits] for budget in applied]


def _budget(
    choices: Choices, bits_per_weight: float | Fraction | None, total_bytes: int | None, max_error: float | None
) -> tuple[AppliedLimit, ...]:
    """Return the budget as a limit on all matrices; an empty tuple if only an error or other limits are given."""
    count = sum(limit is not None for limit in (bits_per_weight, total_bytes, max_error))
    if count > 1 or (count == 0 and not choices.limits):
        raise InvalidArgumentError(
            "bits_per_weight, total_bytes or max_error must be given as the budget, and only one of them; got "
            f"{bits_per_weight!r}, {total_bytes!r} and {max_error!r}."
        )
    if bits_per_weight is None and total_bytes is None:
        return ()
    return (choices.apply(Limit(bits_per_weight=bits_per_weight, total_bytes=total_bytes)),)


def _better(found: Solution, before: Solution, rel_gap: float) -> Solution:
    """Return the better of two solutions, the one of a budget and the one of a smaller budget."""
    # The assignment of the smaller budget is feasible for the larger one, so it may replace a worse one. The bound
    # stays: it was proven for all assignments within the larger budget.
    if found.objective <= before.objective:
        return found
    status = Status.OPTIMAL if relative_gap(before.objective, found.bound) <= rel_gap else found.status
    return dataclasses.replace(found, assignment=before.assignment, objective=before.objective, status=status)


def _make_plan(
    choices: Choices,
    found: Solution,
    budget: Sequence[AppliedLimit] = (),
    *,
    max_error: float | None = None,
    require_optimal: bool = False,
) -> Plan:
    """Return the plan of a solution; ``budget`` holds the budget if there is one."""
    if require_optimal and found.status is not Status.OPTIMAL:
        raise SolverError(
            f"require_optimal: {found.solver} left a relative gap of {found.gap:.2g}. {found.status.value}"
        )
    if found.assignment is None:
        raise SolverError(f"{found.solver}: {found.status.value} ({found.message})")
    table, rows = choices.table, np.arange(len(choices.table.names))
    costs = table.costs[rows, found.assignment].tolist()
    factor_bits = table.factor_sizes[rows, found.assignment].tolist()
    matrices = {}
    for row, column in enumerate(found.assignment.tolist()):
        chosen = table.configurations[column]
        matrices[table.names[row]] = PlannedMatrix(
            chosen.format, chosen.rank, table.shapes[row], costs[row], factor_bits[row]
        )
    # Solvers sum costs in any order. The plan has the sum that is rounded once, so equal choices have equal errors.
    # The bound is proven in the solver's arithmetic, so it may exceed the objective by rounding and is cut to it below.
    error = math.fsum(costs)
    uses = _limit_uses((*budget, *choices.limits), choices.size[rows, found.assignment])
    if max_error is not None:
        uses.insert(0, LimitUse("all matrices", error, float(max_error), unit="error", weight_count=table.weight_count))
    objective = error if max_error is None else found.objective
    # A budget that the largest choice of every matrix meets has no effect. The note says so: its unit may be wrong.
    binds = all(own.bits < own.largest for own in budget)
    return Plan(
        matrices=matrices,
        counts_factors=choices.counts_factors,
        limits=tuple(uses),
        objective=objective,
        bound=min(found.bound, objective),
        status=found.status.name,
        solver=f"{found.solver} {found.version}",
        goal="error" if max_error is None else "bits",
        note="" if binds else "The budget does not bind: the largest choice of formats fits into it.",
        seconds=found.seconds,
    )


def _limit_uses(limits: Sequence[AppliedLimit], bits: npt.NDArray[np.int64]) -> list[LimitUse]:
    """Return the use of each limit, given the counted bits of each matrix."""
    uses = []
    for own in limits:
        upper, lower = (None, own.bits) if own.limit.at_least else (own.bits, None)
        used = int(bits[own.members].sum())
        uses.append(LimitUse(own.limit.matrices, used, upper, lower, weight_count=own.weight_count))
    return uses
