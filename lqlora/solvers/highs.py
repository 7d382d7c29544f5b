"""Adapter for HiGHS through its own interface, highspy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lqlora._optional import require
from lqlora.errors import SolverError
from lqlora.solvers.adapter import RawResult

if TYPE_CHECKING:
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "highspy"


def version() -> str:
    """Return the version of the installed solver.

    Returns
    -------
    str
        The vendor's own spelling.
    """
    highspy = require(REQUIRES, "pip install highspy", "Solver 'highs'")
    return str(highspy.Highs().version())


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        The limits.

    Returns
    -------
    RawResult
        What the solver says.

    Raises
    ------
    SolverError
        If it fails.
    """
    highspy = require(REQUIRES, "pip install highspy", "Solver 'highs'")
    solver = highspy.Highs()
    settings = {"output_flag": False, "mip_rel_gap": options.rel_gap, "mip_abs_gap": 0.0, "random_seed": options.seed}
    settings |= {"threads": 1}  # the answer of a parallel search may depend on timing
    if options.time_limit is not None:
        settings["time_limit"] = float(options.time_limit)
    for name, value in settings.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise SolverError(f"HiGHS refused the option {name}={value!r}.")
    statuses = highspy.HighsModelStatus
    if solver.passModel(_model(highspy, reduced)) == highspy.HighsStatus.kError:
        raise SolverError("HiGHS refused the model.")
    ran = solver.run()
    status = solver.getModelStatus()
    info = solver.getInfo()
    word = solver.modelStatusToString(status)
    if ran == highspy.HighsStatus.kError or status not in (
        statuses.kOptimal,
        statuses.kInfeasible,
        statuses.kUnboundedOrInfeasible,
        statuses.kTimeLimit,
    ):
        raise SolverError(f"HiGHS failed: {word}.")
    if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
        return RawResult(None, np.inf, word, infeasible=True)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return RawResult(None, float(info.mip_dual_bound), word, infeasible=False)
    return RawResult(np.array(solver.getSolution().col_value), float(info.mip_dual_bound), word, infeasible=False)


def _model(highspy: object, reduced: Reduced) -> object:
    from scipy import sparse  # noqa: PLC0415 - beside the vendor's import, in the one place that needs it

    rows = sparse.vstack([reduced.choose, reduced.use], format="csc")
    ones = np.ones(reduced.choose.shape[0])
    variables = len(reduced.cost)
    lp = highspy.HighsLp()  # type: ignore[attr-defined]
    lp.num_col_, lp.num_row_ = variables, rows.shape[0]
    lp.col_cost_ = reduced.cost
    lp.col_lower_, lp.col_upper_ = np.zeros(variables), np.ones(variables)
    lp.row_lower_ = np.concatenate([ones, reduced.lower])
    lp.row_upper_ = np.concatenate([ones, reduced.upper])
    lp.offset_ = reduced.constant / reduced.unit  # so that the relative gap is that of the whole objective
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise  # type: ignore[attr-defined]
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = rows.indptr, rows.indices, rows.data
    lp.integrality_ = [highspy.HighsVarType.kInteger] * variables  # type: ignore[attr-defined]
    return lp
