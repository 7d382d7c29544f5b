"""Process of the OR-tools adapter: read a problem from a folder, solve it by CP-SAT, write the answer beside it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    """Solve the problem in a folder and write ``answer.json``, and ``x.npy`` if there is a solution."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from ortools.sat.python import cp_model  # noqa: PLC0415 - the vendor's package, in the one process that may load it

    with np.load(folder / "problem.npz") as arrays:
        problem = dict(arrays)
    settings = json.loads((folder / "settings.json").read_text())
    model, variables = _model(cp_model, problem)
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.relative_gap_limit, parameters.absolute_gap_limit = settings["rel_gap"], 0.0
    parameters.random_seed, parameters.num_workers = settings["seed"], settings["threads"]
    if settings["deadline"] is not None:
        parameters.max_time_in_seconds = max(settings["deadline"] - time.time(), 0.0)
    status = solver.solve(model)
    word = solver.status_name(status)
    holds = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    if holds:
        np.save(folder / "x.npy", np.array([solver.value(x) for x in variables], dtype=np.float64))
    if status == cp_model.MODEL_INVALID:
        sys.exit(model.validate())
    stopped = {cp_model.OPTIMAL: "GAP", cp_model.INFEASIBLE: "INFEASIBLE"}.get(status, "TIME_LIMIT")
    # The bound may be an integer above 2**53, which float64 rounds: one step down keeps it a lower bound. Without a
    # solution CP-SAT may leave it unset.
    bound = float(np.nextafter(solver.best_objective_bound, -np.inf)) if holds else None
    answer = {"bound": bound, "message": word, "stopped": stopped, "holds": holds}
    (folder / "answer.part").write_text(json.dumps(answer))
    (folder / "answer.part").rename(folder / "answer.json")


def _exit_with_parent() -> None:
    sys.stdin.read()  # returns when the other end of the pipe is closed
    os._exit(1)


def _model(cp_model: Any, problem: dict[str, Any]) -> tuple[Any, list[Any]]:
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in problem["cost"]]
    total = cp_model.LinearExpr.weighted_sum
    for group in range(int(problem["group"].max()) + 1):
        model.add_exactly_one([variables[j] for j in np.flatnonzero(problem["group"] == group)])
    for row, (lower, upper) in enumerate(problem["limits"].T.tolist()):
        of_row = problem["row"] == row
        members = [variables[j] for j in problem["column"][of_row]]
        model.add_linear_constraint(total(members, problem["size"][of_row].tolist()), lower, upper)
    model.minimize(total(variables, problem["cost"].tolist()) + int(problem["offset"]))
    for variable, value in zip(variables, problem["start"], strict=False):
        model.add_hint(variable, bool(value))
    return model, variables


if __name__ == "__main__":
    main(Path(sys.argv[1]))
