"""From a cost table and a budget to a plan, by integer linear programming."""

from __future__ import annotations

import math
import operator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora.allocation.plan import Plan
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.solvers import Budget, Problem, SolveOptions, solve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lqlora.allocation.table import CostTable
    from lqlora.formats import BlockFormat
    from lqlora.solvers import Solution

__all__ = ["allocate"]


def allocate(
    table: CostTable,
    *,
    bits_per_weight: float | Fraction | None = None,
    total_bytes: int | None = None,
    ties: Sequence[Sequence[str]] = (),
    fixed: Mapping[str, BlockFormat] | None = None,
    forbidden: Mapping[str, Sequence[BlockFormat]] | None = None,
    solver: str = "auto",
    time_limit: float | None = None,
    rel_gap: float = 1e-6,
) -> Plan:
    """Choose a configuration for each matrix, at least total cost within a budget.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    bits_per_weight : float or Fraction, optional
        Budget as an average over all weights; codes, scales and second-level scales count, low-rank factors do not.
    total_bytes : int, optional
        Budget in bytes, of the same parts. Exactly one of the two is given.
    ties : sequence of sequences of str, optional
        Matrices of one group get one configuration, such as those that a serving engine fuses.
    fixed : mapping of str to BlockFormat, optional
        Formats that are decided already; any rank of the table goes with them.
    forbidden : mapping of str to sequence of BlockFormat, optional
        Formats a matrix must not take.
    solver : str, default "auto"
        See :func:`lqlora.solvers.solve`.
    time_limit : float, optional
        Seconds.
    rel_gap : float, default 1e-6
        Relative gap at which an assignment counts as optimal.

    Returns
    -------
    Plan
        Within the budget, in exact integers. A budget above the dearest choice gives the plan of least cost, and a note.

    Raises
    ------
    InfeasibleBudgetError
        If no choice fits; says what range of budgets is feasible.
    InvalidArgumentError
        If the budget is negative or not a number, or a name or format is not in the table.
    SolverError
        If the solver failed, or found nothing in time.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse("nf2/64:float16"), lq.BlockFormat.parse("nf4/64:float16")]
    >>> rng = np.random.default_rng(0)
    >>> table = lq.cost_table({n: s * rng.standard_normal((32, 32)) for n, s in [("a", 1), ("b", 9)]}, formats, rank=2)
    >>> {name: str(fmt) for name, fmt in lq.allocate(table, bits_per_weight=3.25).formats.items()}
    {'a': 'nf2/64:float16', 'b': 'nf4/64:float16'}
    """
    budget, asked = _budget_bits(table, bits_per_weight, total_bytes)
    allowed = _allowed(table, fixed or {}, forbidden or {})
    problem = Problem(table.costs, table.sizes, allowed, _tie_groups(table, ties), (Budget(upper=budget),))
    smallest, largest = _size_range(problem)
    if budget < smallest:
        raise _infeasible(table, asked, smallest, largest)
    solution = solve(problem, solver, SolveOptions(time_limit=time_limit, rel_gap=rel_gap))
    if solution.assignment is None:
        raise SolverError(f"{solution.solver}: {solution.status.value} ({solution.message})")
    note = "The budget is above the dearest choice of formats: it does not bind." if budget >= largest else ""
    return _plan(table, solution, solution.assignment, note)


def _plan(table: CostTable, solution: Solution, assignment: npt.NDArray[np.int64], note: str) -> Plan:
    chosen = dict(zip(table.names, assignment.tolist(), strict=True))
    rows = np.arange(len(table.names))
    costs, factors = table.costs[rows, assignment], table.factor_sizes[rows, assignment]
    return Plan(
        {name: table.configurations[j].format for name, j in chosen.items()},
        {name: table.configurations[j].rank for name, j in chosen.items()},
        dict(zip(table.names, table.shapes, strict=True)),
        dict(zip(table.names, costs.tolist(), strict=True)),
        solution.objective,
        solution.bound,
        solution.status.name,
        f"{solution.solver} {solution.version}",
        note,
        factor_bits=dict(zip(table.names, factors.tolist(), strict=True)),
        seconds=solution.seconds,
    )


def _budget_bits(
    table: CostTable, bits_per_weight: float | Fraction | None, total_bytes: int | None
) -> tuple[int, Fraction]:
    """Return the budget in whole bits and in bits per weight."""
    if (bits_per_weight is None) == (total_bytes is None):
        raise InvalidArgumentError("Give a budget as bits_per_weight or as total_bytes, and only one of them.")
    try:
        if bits_per_weight is None:
            asked = Fraction(8 * operator.index(total_bytes), max(table.weight_count, 1))  # type: ignore[arg-type]
        else:
            exact = bits_per_weight if isinstance(bits_per_weight, Fraction) else float(bits_per_weight)
            asked = Fraction(exact)
    except (OverflowError, TypeError, ValueError):
        raise InvalidArgumentError(f"A budget is a finite number, not {bits_per_weight or total_bytes!r}.") from None
    if asked < 0:
        raise InvalidArgumentError(f"A budget is not negative: {float(asked):g} bits per weight were asked for.")
    return 8 * total_bytes if total_bytes is not None else math.floor(asked * table.weight_count), asked


def _columns(table: CostTable, formats: Sequence[BlockFormat]) -> npt.NDArray[np.bool_]:
    """Mark the configurations that have one of some formats, at any rank."""
    for fmt in formats:
        if fmt not in table.formats:
            raise InvalidArgumentError(f"Format {fmt} is not in the cost table.")
    return np.array([configuration.format in formats for configuration in table.configurations])


def _row(table: CostTable, name: str) -> int:
    if name not in table.names:
        raise InvalidArgumentError(f"Matrix {name!r} is not in the cost table.")
    return table.names.index(name)


def _allowed(
    table: CostTable, fixed: Mapping[str, BlockFormat], forbidden: Mapping[str, Sequence[BlockFormat]]
) -> npt.NDArray[np.bool_]:
    allowed = np.isfinite(table.costs)
    for name, formats in forbidden.items():
        allowed[_row(table, name)] &= ~_columns(table, formats)
    for name, fmt in fixed.items():
        allowed[_row(table, name)] &= _columns(table, [fmt])
    for name, row in zip(table.names, allowed, strict=True):
        if not row.any():
            raise InvalidArgumentError(f"No format is left for {name!r}.")
    return allowed


def _tie_groups(table: CostTable, ties: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Return a group number for each row; overlapping ties merge."""
    groups = np.arange(len(table.names))
    for tie in ties:
        members = {int(groups[_row(table, name)]) for name in tie}
        groups[np.isin(groups, list(members))] = min(members, default=0)
    return groups


def _size_range(problem: Problem) -> tuple[int, int]:
    """Bits of the smallest and the largest assignment, ties respected."""
    smallest = largest = 0
    for tie in np.unique(problem.ties):
        rows = problem.ties == tie
        sizes = problem.size[rows].sum(axis=0)[problem.allowed[rows].all(axis=0)]
        if not sizes.size:
            raise InvalidArgumentError("Tied matrices have no format in common.")
        smallest, largest = smallest + int(sizes.min()), largest + int(sizes.max())
    return smallest, largest


def _infeasible(table: CostTable, asked: Fraction, smallest: int, largest: int) -> InfeasibleBudgetError:
    count = max(table.weight_count, 1)
    low, high = Fraction(smallest, count), Fraction(largest, count)
    message = (
        f"A budget of {float(asked):.4f} bits per weight is infeasible: the formats allow {float(low):.4f} to "
        f"{float(high):.4f}. Raise the budget or add smaller formats."
    )
    return InfeasibleBudgetError(message, asked=asked, minimum=low, maximum=high)
