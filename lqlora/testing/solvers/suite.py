"""A suite of properties for any solver: what is asked of ours can be asked of others."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lqlora._optional import is_installed
from lqlora.errors import ConformanceError, InvalidArgumentError, MissingDependencyError
from lqlora.solvers.registry import find
from lqlora.testing._running import try_properties
from lqlora.testing.solvers._properties import REGISTRY
from lqlora.testing.solvers._subject import SolverSubject

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lqlora.solvers import Adapter
    from lqlora.testing.report import Report

__all__ = ["SOLVER_PROPERTIES", "assert_solver_conforms", "check_solver"]

#: The promise of each property by its name.
SOLVER_PROPERTIES: Mapping[str, str] = MappingProxyType({name: prop.statement for name, prop in REGISTRY.items()})


def check_solver(
    solver: str | Adapter,
    *,
    exact: bool = True,
    several_budgets: bool = True,
    lower_limits: bool = True,
    time_limit: float = 1.0,
    only: Collection[str] | None = None,
    exclude: Collection[str] = (),
    max_examples: int = 50,
    derandomize: bool = True,
) -> Report:
    """Try every property that applies on a solver, each by many small problems that Hypothesis draws.

    The right answers are found by trying every assignment. Only "time_limit" is tried on larger problems.

    Parameters
    ----------
    solver : str or Adapter
        A registered name, or an adapter that need not be registered.
    exact : bool, default True
        False if the solver may stop before the gap is reached: it is then asked for answers that break no constraint,
        and for bounds that hold, but not for the cheapest.
    several_budgets, lower_limits : bool, default True
        False if the solver does not take these.
    time_limit : float, default 1.0
        Seconds that the property of this name allows.
    only : collection of str, optional
        Names of the properties to try.
    exclude : collection of str, optional
        Names of properties to skip.
    max_examples : int, default 50
        Problems per property.
    derandomize : bool, default True
        The same problems at every run. False draws others each time.

    Returns
    -------
    Report
        A finding for each property; whatever the solver raises is a finding too.

    Raises
    ------
    InvalidArgumentError
        If the solver or a property is unknown, or a number is out of range.
    MissingDependencyError
        If the solver is not installed.

    Notes
    -----
    The adapter is called as :func:`lqlora.solvers.solve` calls it, with a reduced problem, but what it returns is
    judged before the library repairs anything: a bound above the answer, for example, fails here.

    Examples
    --------
    >>> import numpy as np
    >>> from lqlora.solvers import RawResult, StopReason
    >>> class Smallest:  # takes the smallest choice of each group, and says that nothing is cheaper
    ...     REQUIRES = "numpy"
    ...     def version(self):
    ...         return "1"
    ...     def solve(self, reduced, options):
    ...         use = reduced.use.toarray()[0]
    ...         x = np.zeros(len(use))
    ...         for members in reduced.choose.toarray().astype(bool):
    ...             x[np.flatnonzero(members)[use[members].argmin()]] = 1.0
    ...         bound = reduced.cost @ x + reduced.constant / reduced.unit
    ...         return RawResult(x, bound, "done", StopReason.GAP)
    >>> report = check_solver(Smallest(), only=["feasible", "cheapest"])
    >>> report["feasible"].result, report["cheapest"].result
    ('passed', 'failed')
    """
    adapter = find(solver) if isinstance(solver, str) else solver
    if not time_limit > 0:
        raise InvalidArgumentError(f"A time limit is positive, not {time_limit!r}.")
    if not is_installed(adapter.REQUIRES):
        raise MissingDependencyError(f"The solver to be checked needs {adapter.REQUIRES}, which is not installed.")
    subject = SolverSubject(adapter, exact, several_budgets, lower_limits, time_limit)
    return try_properties(REGISTRY, subject, only, exclude, max_examples, derandomize=derandomize)


def assert_solver_conforms(solver: str | Adapter, **options: Any) -> Report:
    """Raise if a property fails: one line of a test.

    Parameters
    ----------
    solver : str or Adapter
        The solver, as in :func:`check_solver`.
    **options
        The options of :func:`check_solver`.

    Returns
    -------
    Report
        If nothing failed.

    Raises
    ------
    ConformanceError
        If a property failed or could not be tried. It is an AssertionError, and its message is the report.

    Examples
    --------
    >>> report = assert_solver_conforms("scipy", only=["cheapest", "proof"], max_examples=5)
    >>> report["proof"].result
    'passed'
    """
    report = check_solver(solver, **options)
    if not report.passed:
        raise ConformanceError(f"The solver fails {', '.join(report.failed)}.\n{report}")
    return report
