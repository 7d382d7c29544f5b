"""Rows of a cost table: the costs of one matrix in all configurations, as a task for a thread or a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora._dispatch import FLOATS, plain_array
from lqlora.costs._digests import array_digest, weighting_digest
from lqlora.costs._fast import Task, fast_costs
from lqlora.costs.store import StoredRow
from lqlora.decomposition import decompose
from lqlora.decomposition._arguments import checked_matrix, checked_norm, checked_rank
from lqlora.weighting import Uniform
from lqlora.weighting.base import in_float64, loaded_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lqlora._typing import Array
    from lqlora.costs.table import Configuration
    from lqlora.weighting import AbstractWeighting, LowRankStep

__all__ = ["RowTask", "cost_row"]


class RowTask(NamedTuple):
    """Task of one row: a matrix, its weighting, and the costs that are known already.

    Parameters
    ----------
    name : str
        Name of the matrix.
    source : array or callable
        The matrix, or a callable that returns it.
    weighting : AbstractWeighting, or callable that returns one, optional
        Norm of the matrix.
    known : StoredRow, optional
        Costs that a store has already.
    """

    name: str
    source: Array | Callable[[], Array]
    weighting: AbstractWeighting | Callable[[], AbstractWeighting] | None
    known: StoredRow | None = None


def cost_row(
    task: RowTask, *, configurations: Mapping[str, Configuration], options: dict[str, Any], fast: bool, stored: str
) -> StoredRow:
    """Compute the missing costs of a matrix. Raise if its known costs belong to another matrix or weighting.

    Parameters
    ----------
    task : RowTask
        The matrix.
    configurations : mapping of str to Configuration
        Columns of the table, by their keys in a store.
    options : dict
        Options of :func:`lqlora.decompose`.
    fast : bool
        Whether few formats are decomposed, and the costs of the others estimated.
    stored : str
        Path of the store, for errors. If it is empty, there is no store, and no digests are computed.

    Returns
    -------
    StoredRow
        The row to append to the store; without costs if all are known.
    """
    matrix = plain_array(task.source() if callable(task.source) else task.source, task.name, FLOATS)
    # Without a store nothing is compared, and a digest reads every entry once more.
    weighting = loaded_norm(task.weighting, task.name)
    digests = (array_digest(matrix), weighting_digest(weighting)) if stored else ("", "")
    row = StoredRow(task.name, tuple(matrix.shape), *digests, {})
    if task.known is not None:
        task.known.joined(row, stored)  # raises if the matrix or its weighting is another one
    known = task.known.costs if task.known is not None else {}
    missing = {key: own for key, own in configurations.items() if key not in known}
    if not missing:
        return row
    costs = _costs(matrix, task.name, weighting or Uniform(), list(missing.values()), options, fast=fast)
    return StoredRow(task.name, row.shape, *digests, dict(zip(missing, costs, strict=True)))


def _costs(
    matrix: Array,
    name: str,
    norm: AbstractWeighting,
    missing: Sequence[Configuration],
    options: dict[str, Any],
    *,
    fast: bool,
) -> list[float]:
    """Return the cost of each configuration."""
    # Matrix, weighting and ranks are checked first, so that bad input fails before the first decomposition, and a
    # matrix without importance is checked like any other. Ranks above the smaller side become equal if they are
    # clipped, and the fast mode computes each rank once.
    wide = checked_matrix(matrix, name)
    norm.check(tuple(wide.shape))
    clip = options.get("clip_rank", False)
    ranks = dict.fromkeys(own.rank for own in missing)
    used = {rank: checked_rank(wide, rank, None, name, clip_rank=clip)[0] for rank in ranks}
    if norm.all_zero:
        return [0.0] * len(missing)
    measured = checked_norm(norm, wide, name)
    if fast:
        formats = list(dict.fromkeys(own.format for own in missing))
        work = Task(wide, measured.weighting, options["seed"], name)
        costs = fast_costs(work, formats, sorted(set(used.values())))
        return [in_float64(costs[own.format, used[own.rank]], measured.exponent) for own in missing]
    starts: dict[int, LowRankStep] = {}
    if options["init"] == "svd" and options.get("init_rank") is None:
        # The SVD of the matrix does not depend on the format, so all formats of a rank start from one.
        starts = {
            rank: measured.weighting.low_rank(wide, low, seed=options["seed"]) for rank, low in used.items() if low
        }
    options = {"weighting": norm, "name": name, **options}
    return [
        decompose(wide, own.format, own.rank, start=starts.get(own.rank), **options).squared_error for own in missing
    ]
