"""Adapter for HiGHS through its own interface, highspy."""

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

#: How many threads the last solve of this process asked for.
_THREADS: list[int] = []

#: Nothing here is unbounded, so what may be either is infeasible.
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
    _let_threads_be(highspy, options.threads)
    solver = highspy.Highs()
    settings = {"output_flag": False, "mip_rel_gap": options.rel_gap, "mip_abs_gap": 0.0, "random_seed": options.seed}
    settings |= {"threads": options.threads}
    if options.time_limit is not None:
        settings["time_limit"] = float(options.time_limit)
    for name, value in settings.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise SolverError(f"HiGHS refused the option {name}={value!r}.")
    if solver.passModel(_model(highspy, reduced)) == highspy.HighsStatus.kError:
        raise SolverError("HiGHS refused the model.")
    if reduced.start is not None:
        _set_start(highspy, solver, reduced.start)
    ran = solver.run()
    status = solver.getModelStatus()
    word = solver.modelStatusToString(status)
    if ran == highspy.HighsStatus.kError or status.name not in _STOPPED:
        raise SolverError(f"HiGHS failed: {word}.")
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
        raise SolverError("HiGHS refused the start.")


def _let_threads_be(highspy: object, count: int) -> None:
    """End the threads that HiGHS keeps in a process if they are not as many: another number of them is an error."""
    if _THREADS not in ([], [count]):
        highspy.Highs.resetGlobalScheduler(True)  # type: ignore[attr-defined]  # noqa: FBT003 - wait for their end
    _THREADS[:] = [count]


def _model(highspy: Any, reduced: Reduced) -> Any:
    from scipy import sparse  # noqa: PLC0415 - beside the vendor's import, in the one place that needs it

    rows = sparse.vstack([reduced.choose, reduced.use], format="csc")
    ones = np.ones(reduced.choose.shape[0])
    variables = len(reduced.cost)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = variables, rows.shape[0]
    lp.col_cost_ = reduced.cost
    lp.col_lower_, lp.col_upper_ = np.zeros(variables), np.ones(variables)
    lp.row_lower_ = np.concatenate([ones, reduced.lower])
    lp.row_upper_ = np.concatenate([ones, reduced.upper])
    lp.offset_ = reduced.constant / reduced.unit  # so that the relative gap is that of the whole objective
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = rows.indptr, rows.indices, rows.data
    lp.integrality_ = [highspy.HighsVarType.kInteger] * variables
    return lp
