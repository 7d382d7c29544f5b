"""Adapter for CP-SAT of OR-tools, in a process of its own: OR-tools and highspy cannot be loaded into one."""

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

#: CP-SAT computes in integers of 64 bits: what all costs together may come to.
_LARGEST_OBJECTIVE = 2.0**58

#: What the process runs.
_MODULE = "lqlora.solvers.vendors._ortools_process"

#: Seconds after the time limit before the process is ended, if it has not ended by itself.
_GRACE = 2.0


def version() -> str:
    """Return the version of the installed package, without loading it.

    Returns
    -------
    str
        Such as ``"9.15.6755"``.
    """
    _require_installed()
    return version_of(REQUIRES)


def solve(reduced: Reduced, options: SolveOptions) -> RawResult:
    """Solve a reduced problem. The time limit includes the start of the process, about a second.

    Parameters
    ----------
    reduced : Reduced
        The problem. Costs are rounded down to integers that add up to 2**58, so the bound stays a bound.
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
    _require_installed()
    offset = reduced.constant / reduced.unit
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
    answer, x = _in_a_process(arrays, options)
    stopped = StopReason[answer["stopped"]]
    none = np.inf if stopped is StopReason.INFEASIBLE else -np.inf
    return RawResult(x, none if answer["bound"] is None else answer["bound"] / scale, answer["message"], stopped)


def _require_installed() -> None:
    if not is_installed(REQUIRES):
        raise MissingDependencyError("Solver 'ortools' needs ortools: pip install 'lqlora[solvers]'.")


def _in_a_process(arrays: dict[str, Any], options: SolveOptions) -> tuple[dict[str, Any], Any]:
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
        fault = _run(folder, None if limit is None else limit + _GRACE)
        if (folder / "answer.json").exists():
            answer = json.loads((folder / "answer.json").read_text())
            return answer, np.load(folder / "x.npy") if answer["holds"] else None
    if fault is None:
        return {"bound": None, "message": "ended at the time limit", "stopped": "TIME_LIMIT"}, None
    raise SolverError(f"CP-SAT failed: {fault}.")


def _run(folder: Path, seconds: float | None) -> str | None:
    """Run the process to its end, and return its last words; None if it was ended at the time limit."""
    command = [sys.executable, "-P", "-m", _MODULE, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "errors.txt").open("w") as errors:
        # Nothing is written to the pipe: its end tells the process that this one is gone.
        process = subprocess.Popen(  # noqa: S603 - a module of this library
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
