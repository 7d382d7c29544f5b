"""Adapter of SCIP, through PySCIPOpt."""

from __future__ import annotations

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

REQUIRES = "pyscipopt"

#: Infinity of SCIP.
_INFINITY = 1e20

#: Reasons by ``Model.getStatus()``. No reduced problem is unbounded, so inforunbd means infeasible.
_STOPPED = {
    "optimal": StopReason.GAP,
    "gaplimit": StopReason.GAP,
    "infeasible": StopReason.INFEASIBLE,
    "inforunbd": StopReason.INFEASIBLE,
    "timelimit": StopReason.TIME_LIMIT,
    "memlimit": StopReason.LIMIT,
    "userinterrupt": StopReason.INTERRUPTED,
}


def version() -> str:
    """Return the version of the installed solver.

    Returns
    -------
    str
        Version of SCIP, such as ``"10.0.0"``.
    """
    model = require(REQUIRES, "solvers", "solver='scip'").Model()
    return f"{model.getMajorVersion()}.{model.getMinorVersion()}.{model.getTechVersion()}"


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem by SCIP.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        Time limit, gap and seed. SCIP searches with one thread.

    Returns
    -------
    RawResult
        The unchecked result of the solver.

    Raises
    ------
    SolverError
        If the solver fails.
    """
    scip = require(REQUIRES, "solvers", "solver='scip'")
    model = scip.Model()
    model.hideOutput()
    variables = _build(scip, model, reduced)
    settings = {"limits/gap": options.rel_gap, "limits/absgap": 0.0, "randomization/randomseedshift": options.seed}
    settings |= {"numerics/feastol": 1e-9}  # relative to the budget, which may be millions
    if options.time_limit is not None:
        settings["limits/time"] = float(options.time_limit)
    model.setParams(settings)
    model.optimize()
    word = str(model.getStatus())
    if word not in _STOPPED:
        raise SolverError(f"solver 'scip' failed: {word}.")
    if _STOPPED[word] is StopReason.INFEASIBLE:
        return RawResult(None, np.inf, word, StopReason.INFEASIBLE)
    bound = float(model.getDualbound())
    best = model.getBestSol() if model.getNSols() else None
    x = None if best is None else np.array([model.getSolVal(best, variable) for variable in variables])
    return RawResult(x, bound if bound > -_INFINITY else -np.inf, word, _STOPPED[word])


def _build(scip: Any, model: Any, reduced: Reduced) -> list[Any]:
    """Write the problem into a model, and return its variables."""
    variables = [model.addVar(vtype="B", obj=cost) for cost in reduced.cost.tolist()]
    model.addObjoffset(reduced.offset)  # the relative gap is that of the whole objective
    rows, lower, upper = reduced.rows()
    for k in np.flatnonzero(np.isfinite(lower) | np.isfinite(upper)):
        entries = slice(rows.indptr[k], rows.indptr[k + 1])
        terms = zip(rows.data[entries].tolist(), rows.indices[entries].tolist(), strict=True)
        total = 0.0 * variables[0] + scip.quicksum(size * variables[j] for size, j in terms)  # a row may be empty
        model.addCons(scip.ExprCons(total, _finite(lower[k]), _finite(upper[k])))
    if reduced.start is not None:
        start = model.createSol()
        for variable, value in zip(variables, reduced.start.tolist(), strict=True):
            model.setSolVal(start, variable, value)
        model.addSol(start)
    return variables


def _finite(limit: float) -> float | None:
    return float(limit) if np.isfinite(limit) else None
