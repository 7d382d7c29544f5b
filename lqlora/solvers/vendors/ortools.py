"""Adapter of CP-SAT (OR-tools), in a separate process, because OR-tools and highspy cannot share one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._optional import is_installed
from lqlora.errors import MissingDependencyError, SolverError
from lqlora.solvers.adapter import RawResult
from lqlora.solvers.problem import StopReason

if TYPE_CHECKING:
    from lqlora.solvers.presolve import Reduced
    from lqlora.solvers.problem import SolveOptions

__all__ = ["REQUIRES", "solve", "version"]

REQUIRES = "ortools"

#: Largest sum of all costs as integers. CP-SAT computes in 64 bits.
_LARGEST_OBJECTIVE = 2.0**58


def version() -> str:
    """Return the version of the installed package, without loading it.

    Returns
    -------
    str
        Version of OR-tools, such as ``"9.15.6755"``.
    """
    _require_installed()
    return version_of(REQUIRES)


def solve(
    reduced: Reduced,
    options: SolveOptions,
    *,
    module: str = "lqlora.solvers.vendors._ortools_process",
    grace: float = 2.0,
) -> RawResult:
    """Solve a reduced problem by CP-SAT.

    Parameters
    ----------
    reduced : Reduced
        The problem.
    options : SolveOptions
        Time limit, gap, seed and threads. The time limit includes the start of the process, about a second.
    module : str, optional
        Module that the process runs.
    grace : float, default 2.0
        Seconds after the time limit until a process that still runs is ended.

    Returns
    -------
    RawResult
        The unchecked result of the solver.

    Raises
    ------
    SolverError
        If the solver fails.
    """
    _require_installed()
    # CP-SAT takes integers. Costs times a power of two are rounded down, so the integer objective is at most the true
    # one and its lower bound is a lower bound. The power of two is the largest for which all costs together fit.
    offset = reduced.offset
    total = float(reduced.cost.sum()) + abs(offset)
    scale = 2.0 ** np.floor(np.log2(_LARGEST_OBJECTIVE / max(total, 1.0)))
    limits = np.stack([reduced.lower, reduced.upper])
    use = reduced.use.tocoo()
    arrays = {
        "cost": np.floor(reduced.cost * scale).astype(np.int64), "offset": np.array(int(np.floor(offset * scale))),
        "group": reduced.group, "row": use.row, "column": use.col, "size": use.data.astype(np.int64),
        "limits": np.clip(limits, 0, 2.0**62).astype(np.int64),
        "start": np.zeros(0) if reduced.start is None else reduced.start,
    }  # fmt: skip
    answer, x = _run_in_process(arrays, options, module, grace)
    stopped = StopReason[answer["stopped"]]
    none = np.inf if stopped is StopReason.INFEASIBLE else -np.inf
    return RawResult(x, none if answer["bound"] is None else answer["bound"] / scale, answer["message"], stopped)


def _require_installed() -> None:
    if not is_installed(REQUIRES):
        raise MissingDependencyError("solver='ortools' needs ortools: pip install 'lqlora[solvers]'.")


def _run_in_process(
    arrays: dict[str, Any], options: SolveOptions, module: str, grace: float
) -> tuple[dict[str, Any], Any]:
    limit = options.time_limit
    settings = {
        "rel_gap": options.rel_gap,
        "seed": options.seed,
        "threads": options.threads,
        "deadline": None if limit is None else time.time() + limit,
    }
    with tempfile.TemporaryDirectory(prefix="lqlora-") as name:
        folder = Path(name)
        np.savez(folder / "problem.npz", **arrays)
        (folder / "settings.json").write_text(json.dumps(settings))
        fault = _wait(module, folder, None if limit is None else limit + grace)
        if (folder / "answer.json").exists():
            answer = json.loads((folder / "answer.json").read_text())
            return answer, np.load(folder / "x.npy") if answer["holds"] else None
    if fault is None:
        return {"bound": None, "message": "ended at the time limit", "stopped": "TIME_LIMIT"}, None
    raise SolverError(f"solver 'ortools' failed: {fault}.")


def _wait(module: str, folder: Path, seconds: float | None) -> str | None:
    """Run a module in a process until it ends. Return its last line of output, or None if it was ended at the limit."""
    command = [sys.executable, "-P", "-m", module, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "errors.txt").open("w") as errors:
        # Nothing is written to the pipe. It closes when this process dies, and that ends the other one.
        process = subprocess.Popen(  # noqa: S603 - by default a module of this library
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.communicate()
    lines = (folder / "errors.txt").read_text().split("\n")
    return next((line for line in reversed(lines) if line), f"exit status {process.returncode}")
