"""Adapter of CBC, through cylp."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._optional import require
from lqlora.errors import SolverError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "cylp"

#: Reasons by ``CyCbcModel.status``.
_STOPPED = {
    "solution": StopReason.GAP,
    "stopped on gap": StopReason.GAP,
    "relaxation infeasible": StopReason.INFEASIBLE,
    "problem proven infeasible": StopReason.INFEASIBLE,
    "stopped on time": StopReason.TIME_LIMIT,
    "stopped on nodes": StopReason.LIMIT,
    "stopped on solutions": StopReason.LIMIT,
    "stopped on user event": StopReason.INTERRUPTED,
}

#: CBC reports an objective of at least this if it has no solution.
_NO_OBJECTIVE = 1e49


def version() -> str:
    """Return the version of the interface, since CBC does not report its own.

    Returns
    -------
    str
        Version of cylp, which has CBC built in.
    """
    return str(require(REQUIRES, "solvers", "solver='cbc'").__version__)


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem by CBC.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        Time limit in CPU seconds, gap and threads. cylp passes on neither a seed nor a start.

    Returns
    -------
    RawResult
        The unchecked result of the solver.

    Raises
    ------
    SolverError
        If the solver fails.
    """
    cy = require("cylp.cy", "solvers", "solver='cbc'")
    simplex = _model(cy, reduced)
    solver = simplex.getCbcModel()
    solver.logLevel = 0
    solver.allowableGap, solver.allowableFractionGap = 0.0, options.rel_gap
    solver.numberThreads = 0 if options.threads == 1 else options.threads  # 0 selects the search without threads
    if options.time_limit is not None:
        solver.maximumSeconds = float(options.time_limit)
    start = process_time()
    solver.solve()
    elapsed = process_time() - start
    word = str(solver.status)
    if word not in _STOPPED:
        raise SolverError(f"solver 'cbc' failed: {word}.")
    if _STOPPED[word] is StopReason.INFEASIBLE:
        if options.time_limit is not None and elapsed >= options.time_limit:
            # Trap: a limit that falls into CBC's preprocessing also ends with "problem proven infeasible".
            return RawResult(None, -np.inf, word, StopReason.TIME_LIMIT)
        return RawResult(None, np.inf, word, StopReason.INFEASIBLE)
    holds = solver.objectiveValue < _NO_OBJECTIVE
    x = np.array(solver.primalVariableSolution, dtype=np.float64) if holds else None
    return RawResult(x, float(solver.bestPossibleObjValue), word, _STOPPED[word])


def _model(cy: Any, reduced: Reduced) -> Any:
    matrix, lower, upper = reduced.rows()
    rows, variables = matrix.tocoo(), len(reduced.cost)
    # Trap: CBC takes the number of rows from the entries. An explicit zero keeps a last row that has no entry.
    row, column = np.append(rows.row, rows.shape[0] - 1), np.append(rows.col, 0)
    packed = cy.CyCoinPackedMatrix(
        colOrdered=True,
        rowIndices=row.astype(np.int32),
        colIndices=column.astype(np.int32),
        elements=np.append(rows.data, 0.0),
    )
    simplex = cy.CyClpSimplex()
    simplex.logLevel = 0
    simplex.loadProblem(packed, np.zeros(variables), np.ones(variables), reduced.cost.copy(), lower, upper)
    simplex.objectiveOffset = -reduced.offset  # CBC subtracts it
    simplex.copyInIntegerInformation(np.ones(variables, dtype=np.uint8))
    return simplex
