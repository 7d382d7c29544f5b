"""Adapter of HiGHS, through highspy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._optional import require
from lqlora.errors import SolverError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "highspy"

#: Number of threads that the last solve of this process asked for; empty before the first.
_THREADS: list[int] = []

#: Reasons by the name of the model status. No reduced problem is unbounded, so kUnboundedOrInfeasible means infeasible.
_STOPPED = {
    "kOptimal": StopReason.GAP,
    "kInfeasible": StopReason.INFEASIBLE,
    "kUnboundedOrInfeasible": StopReason.INFEASIBLE,
    "kTimeLimit": StopReason.TIME_LIMIT,
    "kIterationLimit": StopReason.LIMIT,
    "kSolutionLimit": StopReason.LIMIT,
    "kMemoryLimit": StopReason.LIMIT,
    "kInterrupt": StopReason.INTERRUPTED,
}


def version() -> str:
    """Return the version of the installed solver.

    Returns
    -------
    str
        Version of HiGHS, such as ``"1.11.0"``.
    """
    highspy = require(REQUIRES, "pip install highspy", "solver='highs'")
    return str(highspy.Highs().version())


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem by HiGHS.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        Time limit, gap, seed and threads.

    Returns
    -------
    RawResult
        The unchecked result of the solver.

    Raises
    ------
    SolverError
        If the solver fails.
    """
    highspy = require(REQUIRES, "pip install highspy", "solver='highs'")
    _set_threads(highspy, options.threads)
    solver = highspy.Highs()
    settings = {"output_flag": False, "mip_rel_gap": options.rel_gap, "mip_abs_gap": 0.0, "random_seed": options.seed}
    settings |= {"threads": options.threads}
    if options.time_limit is not None:
        settings["time_limit"] = float(options.time_limit)
    for name, value in settings.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise SolverError(f"solver 'highs' did not accept the option {name}={value!r}.")
    if solver.passModel(_model(highspy, reduced)) == highspy.HighsStatus.kError:
        raise SolverError("solver 'highs' did not accept the model. Use another solver.")
    if reduced.start is not None:
        _set_start(highspy, solver, reduced.start)
    ran = solver.run()
    status = solver.getModelStatus()
    word = solver.modelStatusToString(status)
    if ran == highspy.HighsStatus.kError or status.name not in _STOPPED:
        raise SolverError(f"solver 'highs' failed: {word}.")
    stopped = _STOPPED[status.name]
    if stopped is StopReason.INFEASIBLE:
        return RawResult(None, np.inf, word, stopped)
    info = solver.getInfo()
    holds = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    x = np.array(solver.getSolution().col_value) if holds else None
    return RawResult(x, float(info.mip_dual_bound), word, stopped)


def _set_start(highspy: Any, solver: Any, start: npt.NDArray[np.float64]) -> None:
    solution = highspy.HighsSolution()
    solution.col_value = start.tolist()
    if solver.setSolution(solution) != highspy.HighsStatus.kOk:
        raise SolverError("solver 'highs' did not accept the start. Pass another start, or none.")


def _set_threads(highspy: object, count: int) -> None:
    """End the threads that HiGHS keeps in this process, if their number differs: HiGHS refuses to change it."""
    if _THREADS not in ([], [count]):
        highspy.Highs.resetGlobalScheduler(True)  # type: ignore[attr-defined]  # noqa: FBT003 - wait for their end
    _THREADS[:] = [count]


def _model(highspy: Any, reduced: Reduced) -> Any:
    matrix, lower, upper = reduced.rows()
    columns, variables = matrix.tocsc(), len(reduced.cost)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = variables, len(lower)
    lp.col_cost_ = reduced.cost
    lp.col_lower_, lp.col_upper_ = np.zeros(variables), np.ones(variables)
    lp.row_lower_, lp.row_upper_ = lower, upper
    lp.offset_ = reduced.offset  # the relative gap is that of the whole objective
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = columns.indptr, columns.indices, columns.data
    lp.integrality_ = [highspy.HighsVarType.kInteger] * variables
    return lp
