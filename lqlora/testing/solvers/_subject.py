"""Solver under test: the adapter, the options of the caller, checked answers, and optima by enumeration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lqlora.solvers import RawResult, SolveOptions, evaluate, reduce_problem
from lqlora.testing._verdicts import RefusedError, ViolationError, named

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers import Adapter, Problem, Reduced

__all__ = ["Answer", "SolverSubject", "optimum"]

#: Largest distance of an entry of a vector from zero or one.
_INTEGRALITY = 1e-4


class Answer(NamedTuple):
    """Answer of an adapter to a problem. The objective is None if the adapter returned no vector."""

    reduced: Reduced
    raw: RawResult
    objective: float | None

    @property
    def bound(self) -> float:
        """Bound in the units of the original problem."""
        return float(self.raw.bound * self.reduced.unit)

    def rounding(self, scale: float) -> float:
        """Return the allowed error of an objective or bound."""
        # Solvers have absolute tolerances of about 1e-6 on reduced costs, whose unit is `unit` in the original problem.
        return 1e-6 * self.reduced.unit + 1e-9 * abs(scale)


@dataclass(frozen=True)
class SolverSubject:
    """An adapter with the options of :func:`lqlora.testing.check_solver`, under the same names."""

    adapter: Adapter
    exact: bool
    several_budgets: bool
    lower_limits: bool
    time_limit: float
    overrun: float

    def version(self) -> object:
        """Return the result of the adapter's ``version()``."""
        try:
            return self.adapter.version()
        except Exception as error:
            raise RefusedError(f"version() raised {named(error)}") from error

    def run(self, reduced: Reduced, options: SolveOptions) -> RawResult:
        """Return the adapter's raw result of a reduced problem."""
        try:
            return self.adapter.solve(reduced, options)
        except Exception as error:
            raise RefusedError(f"solve() raised {named(error)}") from error

    def answer(
        self, problem: Problem, options: SolveOptions | None = None, start: npt.NDArray[np.float64] | None = None
    ) -> Answer:
        """Return the adapter's answer to a problem, and raise if it breaks a constraint."""
        reduced = replace(reduce_problem(problem), start=start)
        raw = self.run(reduced, options or SolveOptions())
        if raw.x is None:
            return Answer(reduced, raw, None)
        require_vector(raw.x, reduced)
        objective, _, faults = evaluate(problem, reduced.assignment(raw.x))
        if faults:
            raise ViolationError(f"the answer breaks a constraint: {faults[0]}")
        return Answer(reduced, raw, objective)


def require_vector(x: object, reduced: Reduced) -> None:
    """Raise unless a vector has one entry near one in each group, and zeros elsewhere."""
    if not isinstance(x, np.ndarray) or x.shape != reduced.cost.shape or x.dtype.kind != "f":
        raise ViolationError(f"x is not an array of {len(reduced.cost)} floats, one for each variable")
    off = np.abs(x - np.rint(x)) > _INTEGRALITY
    if not np.isfinite(x).all() or off.any():
        raise ViolationError(f"x holds {x[off | ~np.isfinite(x)][0]}, which is neither zero nor one")
    ones = np.bincount(reduced.group, weights=np.rint(x), minlength=reduced.choose.shape[0])
    if (ones != 1).any():
        raise ViolationError(f"x has {ones[ones != 1][0]:g} choices in one group")


def optimum(problem: Problem) -> float:
    """Return the least cost of all assignments by enumeration; infinite if none is feasible."""
    # The inputs have at most four rows and four columns, so at most 4**4 = 256 assignments, one in each row of `choices`.
    rows, columns = problem.cost.shape
    choices = np.stack(np.unravel_index(np.arange(columns**rows), (columns,) * rows), axis=1)
    row = np.arange(rows)
    feasible = problem.allowed[row, choices].all(axis=1)
    _, first, group = np.unique(problem.ties, return_index=True, return_inverse=True)
    feasible &= (choices == choices[:, first[group]]).all(axis=1)
    for budget in problem.budgets:
        counted = slice(None) if budget.members is None else np.asarray(budget.members, dtype=bool)
        used = problem.size[row, choices][:, counted].sum(axis=1)
        if budget.upper is not None:
            feasible &= used <= budget.upper
        if budget.lower is not None:
            feasible &= used >= budget.lower
    costs = np.where(feasible[:, None], problem.cost[row, choices], np.inf).sum(axis=1)
    return float(costs.min())
