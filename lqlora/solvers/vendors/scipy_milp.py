"""Adapter of scipy.optimize.milp, which contains a copy of HiGHS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lqlora._optional import require
from lqlora.errors import SolverError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "scipy"

#: Value of ``OptimizeResult.status`` for an infeasible problem.
_INFEASIBLE = 2


def version() -> str:
    """Return the version of the installed solver.

    Returns
    -------
    str
        Version of SciPy, such as ``"1.17.1"``.
    """
    return str(require(REQUIRES, "pip install scipy", "solver='scipy'").__version__)


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem by scipy.optimize.milp.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        Time limit and gap.

    Returns
    -------
    RawResult
        The unchecked result of the solver.

    Raises
    ------
    SolverError
        If the solver fails.
    """
    optimize = require("scipy.optimize", "pip install scipy", "solver='scipy'")
    constraints = [optimize.LinearConstraint(reduced.choose, 1, 1)]
    if reduced.use.shape[0]:
        constraints.append(optimize.LinearConstraint(reduced.use, reduced.lower, reduced.upper))
    limits: dict[str, float] = {"mip_rel_gap": options.rel_gap}
    if options.time_limit is not None:
        limits["time_limit"] = float(options.time_limit)
    result = optimize.milp(
        reduced.cost,
        integrality=np.ones(len(reduced.cost)),
        bounds=optimize.Bounds(0, 1),
        constraints=constraints,
        options=limits,
    )
    if result.status == _INFEASIBLE:
        return RawResult(None, np.inf, result.message, StopReason.INFEASIBLE)
    if result.status not in (0, 1):
        raise SolverError(f"solver 'scipy' failed: {result.message}")
    shifted_bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    limit = StopReason.LIMIT if options.time_limit is None else StopReason.TIME_LIMIT
    stopped = StopReason.GAP if result.status == 0 else limit
    return RawResult(result.x, shifted_bound + reduced.offset, result.message, stopped)
