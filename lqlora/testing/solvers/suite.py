"""Conformance suite for solvers: ``check_solver`` and ``assert_solver_conforms``."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lqlora._optional import is_installed
from lqlora._options import require_number
from lqlora.errors import ConformanceError, MissingDependencyError
from lqlora.solvers.registry import find
from lqlora.testing._running import try_properties
from lqlora.testing.solvers._properties import REGISTRY
from lqlora.testing.solvers._subject import SolverSubject

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lqlora.solvers import Adapter
    from lqlora.testing.report import Report

__all__ = ["SOLVER_PROPERTIES", "assert_solver_conforms", "check_solver"]

#: Statement of each property by its name.
SOLVER_PROPERTIES: Mapping[str, str] = MappingProxyType({name: prop.statement for name, prop in REGISTRY.items()})


def check_solver(
    solver: str | Adapter,
    *,
    exact: bool = True,
    several_budgets: bool = True,
    lower_limits: bool = True,
    time_limit: float = 1.0,
    overrun: float = 10.0,
    only: Collection[str] | None = None,
    exclude: Collection[str] = (),
    max_examples: int = 50,
    derandomize: bool = True,
    shrink: bool = True,
) -> Report:
    """Check every property that applies to a solver, each on many small problems that Hypothesis draws.

    The answers are compared with those of enumeration. Only the property "time_limit" uses larger problems.

    Parameters
    ----------
    solver : str or Adapter
        Name of a registered solver, or an adapter, registered or not.
    exact : bool, default True
        False if the solver may stop before the gap is reached, like a heuristic. Its answers must then meet every
        constraint and its bounds must hold, but its answers need not be the cheapest.
    several_budgets, lower_limits : bool, default True
        False if the solver does not take several budgets, or lower limits.
    time_limit : float, default 1.0
        Time limit in seconds of the property of this name.
    overrun : float, default 10.0
        Seconds after the time limit until that property fails. A solver needs some to build its model, and machines
        stall.
    only : collection of str, optional
        Names of the properties to check; all by default.
    exclude : collection of str, optional
        Names of properties to skip.
    max_examples : int, default 50
        Number of problems for each property.
    derandomize : bool, default True
        True draws the same problems in every run, False draws new ones.
    shrink : bool, default True
        True searches for a small counterexample after a failure, False reports the first one, which is faster.

    Returns
    -------
    Report
        One finding for each property. Exceptions of the solver are findings too.

    Raises
    ------
    InvalidArgumentError
        If the solver or a property is unknown, or a number is out of range.
    MissingDependencyError
        If the solver is not installed.

    Notes
    -----
    The adapter is called with reduced problems, as :func:`lqlora.solvers.solve` calls it. But its results are checked
    as they are: :func:`~lqlora.solvers.solve` would repair an answer over budget and lower a bound above the objective.

    Examples
    --------
    >>> import numpy as np
    >>> from lqlora.solvers import RawResult, StopReason
    >>> class Smallest:  # returns the smallest choice of each group as the optimum
    ...     REQUIRES = "numpy"
    ...     def version(self):
    ...         return "1"
    ...     def solve(self, reduced, options):
    ...         use = reduced.use.toarray()[0]
    ...         x = np.zeros(len(use))
    ...         for members in reduced.choose.toarray().astype(bool):
    ...             x[np.flatnonzero(members)[use[members].argmin()]] = 1.0
    ...         bound = reduced.cost @ x + reduced.offset
    ...         return RawResult(x, bound, "done", StopReason.GAP)
    >>> report = check_solver(Smallest(), only=["feasible", "cheapest"])
    >>> report["feasible"].result, report["cheapest"].result
    ('passed', 'failed')
    """
    adapter = find(solver) if isinstance(solver, str) else solver
    require_number(time_limit, "time_limit", "positive", lambda own: own > 0)
    if not is_installed(adapter.REQUIRES):
        raise MissingDependencyError(f"solver must be installed to be checked, but {adapter.REQUIRES} is missing.")
    subject = SolverSubject(adapter, exact, several_budgets, lower_limits, time_limit, overrun)
    return try_properties(REGISTRY, subject, only, exclude, max_examples, derandomize=derandomize, shrink=shrink)


def assert_solver_conforms(solver: str | Adapter, **options: Any) -> Report:
    """Check a solver as :func:`check_solver` does, and raise if a property fails. Use it in a test.

    Parameters
    ----------
    solver : str or Adapter
        The solver, as in :func:`check_solver`.
    **options
        Options of :func:`check_solver`.

    Returns
    -------
    Report
        The report, if nothing failed.

    Raises
    ------
    ConformanceError
        If a property failed or could not be checked. It is an AssertionError, and its message is the report.

    Examples
    --------
    >>> report = assert_solver_conforms("scipy", only=["cheapest", "proof"], max_examples=5)
    >>> report["proof"].result
    'passed'
    """
    report = check_solver(solver, **options)
    if not report.passed:
        raise ConformanceError(f"solver fails {', '.join(report.failed)}.\n{report}")
    return report
