"""Adapter of Gurobi, through gurobipy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from lqlora._optional import require
from lqlora.errors import SolverError
from lqlora.solvers.adapter import License, RawResult
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "check_license", "solve", "version"]

REQUIRES = "gurobipy"

#: Gurobi's error code for a model larger than the license allows.
_TOO_LARGE = 10010

#: Reasons by the name of the attribute ``Status``. No reduced problem is unbounded, so INF_OR_UNBD means infeasible.
_STOPPED = {
    "OPTIMAL": StopReason.GAP,
    "INFEASIBLE": StopReason.INFEASIBLE,
    "INF_OR_UNBD": StopReason.INFEASIBLE,
    "TIME_LIMIT": StopReason.TIME_LIMIT,
    "MEM_LIMIT": StopReason.LIMIT,
    "INTERRUPTED": StopReason.INTERRUPTED,
}


def version() -> str:
    """Return the version of the installed solver.

    Returns
    -------
    str
        Version of Gurobi, such as ``"13.0.3"``.
    """
    return ".".join(map(str, require(REQUIRES, "solvers", "solver='gurobi'").gurobi.version()))


def check_license() -> License:
    """Check the license that Gurobi finds.

    Returns
    -------
    License
        ``ok`` is False if there is none or it expired. ``message`` says "unrestricted", or names the largest model that
        the license of the package allows.
    """
    gurobipy = require(REQUIRES, "solvers", "solver='gurobi'")
    try:
        with _environment(gurobipy) as environment:
            restricted = environment.getParam("LicenseID") == 0
    except gurobipy.GurobiError as error:
        return License(ok=False, message=str(error))
    return License(ok=True, message="at most 2000 variables and 2000 constraints" if restricted else "unrestricted")


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem by Gurobi.

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
        If Gurobi fails or finds no license.
    """
    gurobipy = require(REQUIRES, "solvers", "solver='gurobi'")
    try:
        with _environment(gurobipy) as environment, gurobipy.Model(env=environment) as model:
            return _run(gurobipy, model, reduced, options)
    except gurobipy.GurobiError as error:
        if error.errno != _TOO_LARGE:
            raise SolverError(f"solver 'gurobi' failed: {error}.") from error
        return RawResult(None, -np.inf, _too_large(reduced), StopReason.LIMIT)


def _environment(gurobipy: Any) -> Any:
    return gurobipy.Env(params={"OutputFlag": 0})


def _too_large(reduced: Reduced) -> str:
    variables, constraints = len(reduced.cost), len(reduced.first) + len(reduced.upper)
    return (
        f"Gurobi's license does not allow {variables} variables and {constraints} constraints (without a license file "
        "at most 2000 of each). Use solver='highs', which is free and has no limit."
    )


def _run(gurobipy: Any, model: Any, reduced: Reduced, options: SolveOptions) -> RawResult:
    x = _build(gurobipy, model, reduced)
    settings = {"MIPGap": options.rel_gap, "MIPGapAbs": 0.0, "Seed": options.seed, "Threads": options.threads}
    # By default a variable of 0.99999 counts as one, and that is many bits of a large budget.
    settings |= {"IntFeasTol": 1e-9, "FeasibilityTol": 1e-9}
    if options.time_limit is not None:
        settings["TimeLimit"] = float(options.time_limit)
    for name, value in settings.items():
        model.setParam(name, value)
    model.optimize()
    words = {getattr(gurobipy.GRB, word): word for word in _STOPPED}
    if model.Status not in words:
        raise SolverError(f"solver 'gurobi' failed: it stopped with status {model.Status}.")
    word = words[model.Status]
    if _STOPPED[word] is StopReason.INFEASIBLE:
        return RawResult(None, np.inf, word, StopReason.INFEASIBLE)
    return RawResult(np.array(x.X) if model.SolCount else None, float(model.ObjBound), word, _STOPPED[word])


def _build(gurobipy: Any, model: Any, reduced: Reduced) -> Any:
    """Write the problem into a model, and return its variables."""
    x = model.addMVar(len(reduced.cost), vtype=gurobipy.GRB.BINARY)
    model.setObjective(reduced.cost @ x + reduced.offset)
    model.addConstr(sparse.csr_matrix(reduced.choose) @ x == 1)
    use = sparse.csr_matrix(reduced.use)
    for limit, sense in ((reduced.lower, gurobipy.GRB.GREATER_EQUAL), (reduced.upper, gurobipy.GRB.LESS_EQUAL)):
        rows = np.flatnonzero(np.isfinite(limit))
        if rows.size:
            model.addMConstr(use[rows], x, sense, limit[rows])
    if reduced.start is not None:
        x.Start = reduced.start
    return x
