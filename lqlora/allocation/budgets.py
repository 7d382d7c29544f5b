"""From a cost table and a budget to a plan, by integer linear programming."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora.allocation._choices import constrain
from lqlora.allocation._fewest_bits import fewest_bits
from lqlora.allocation._least_error import least_error
from lqlora.allocation._planning import make_plan
from lqlora.allocation.limits import Limit
from lqlora.errors import InvalidArgumentError
from lqlora.solvers import SolveOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from fractions import Fraction

    from lqlora._patterns import Pattern
    from lqlora.allocation._allowed import Wanted
    from lqlora.allocation._choices import Bound, Choices
    from lqlora.allocation.plan import Plan
    from lqlora.allocation.ties import Tie
    from lqlora.costs.table import CostTable

__all__ = ["allocate"]


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

    A *pattern* is a shell pattern (``"*.q_proj"``), a compiled regular expression that matches the whole name, or a
    function of the name. A pattern that matches no matrix of the table is refused.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    bits_per_weight : float or Fraction, optional
        Budget as an average over all weights. Codes, zero points, scales and second-level scales count; low-rank
        factors as ``count_factors`` says.
    total_bytes : int, optional
        Budget in bytes, of the same parts: see :func:`memory_budget`.
    max_error : float, optional
        Instead of a budget, a limit of the sum of the costs: the plan is the smallest one within it. At most one of
        the three is given, and one at least where there are no limits.
    limits : iterable of Limit
        Further limits on the sizes of some matrices, from above or from below. All hold at once.
    ties : iterable of patterns, or of sequences of patterns
        Matrices that get one configuration, such as those that a serving engine fuses. What a sequence matches is one
        group; so is what a single pattern matches, but an expression with groups, such as
        ``re.compile(r"(.*)\.(?:gate|up)_proj")``, makes one of all names that agree in these. Overlapping ties merge.
        :func:`lqlora.allocation.ties.fused_projections` and :func:`lqlora.allocation.ties.experts` know the usual ones.
    fixed : mapping of pattern to BlockFormat, Configuration, or several of them, optional
        What is decided already. A format leaves the rank open, of several one is taken, and of several patterns that
        match a matrix all hold.
    forbidden : mapping of pattern to BlockFormat, Configuration, or several of them, optional
        What a matrix must not take.
    minimum_bits : mapping of pattern to float or Fraction, optional
        Least bits per weight of the quantized part of each matrix that matches, scales included.
    count_factors : bool, optional
        Whether low-rank factors count in the budget and in all limits. If not given they do where the table has several
        ranks, since the largest rank would be free otherwise.
    solver : str, default "auto"
        See :func:`lqlora.solvers.solve`.
    time_limit : float, optional
        Seconds of a search; ``max_error`` may take two.
    rel_gap : float, default 1e-6
        Relative gap at which an assignment counts as optimal.
    require_optimal : bool, default False
        Raise instead of returning a plan whose gap is larger, because time ran out.

    Returns
    -------
    Plan
        Within the budget and all limits, in exact integers; within ``max_error``, as :attr:`Plan.error` is computed. A
        budget above the dearest choice gives the plan of least cost, and a note. ``Plan.status`` and ``Plan.gap`` tell
        what is proven: no plan within the budget has a sum of costs below ``Plan.bound``; with ``max_error``, no plan
        within it takes fewer bits than ``Plan.bound``.

    Raises
    ------
    InfeasibleBudgetError
        If no choice fits; names the limit, and the range that is feasible.
    InvalidArgumentError
        If a budget is negative or not a number, a pattern matches nothing, a format is not in the table, or nothing is
        left for a matrix.
    SolverError
        If the solver failed, found nothing in time, or proved too little with ``require_optimal``.

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

    As few bits as this error allows:

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
    bounds = _bounds(choices, bits_per_weight, total_bytes, max_error)
    options = SolveOptions(time_limit=time_limit, rel_gap=rel_gap)
    if max_error is not None:
        found = fewest_bits(choices, max_error, solver, options)
        return make_plan(choices, found, max_error=max_error, require_optimal=require_optimal)
    found = least_error(choices, bounds, solver, options)
    return make_plan(choices, found, bounds[len(choices.bounds) :], require_optimal=require_optimal)


def _bounds(
    choices: Choices, bits_per_weight: float | Fraction | None, total_bytes: int | None, max_error: float | None
) -> tuple[Bound, ...]:
    """Return all limits, the budget last."""
    given = sum(value is not None for value in (bits_per_weight, total_bytes, max_error))
    if given > 1 or (given == 0 and not choices.bounds):
        raise InvalidArgumentError("Give a budget as bits_per_weight, total_bytes or max_error, and only one of them.")
    if bits_per_weight is None and total_bytes is None:
        return choices.bounds
    return *choices.bounds, choices.bound(Limit(bits_per_weight=bits_per_weight, total_bytes=total_bytes))
