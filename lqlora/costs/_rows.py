"""One row of a cost table: the work of one task, wherever it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora.costs._digests import array_digest, configuration_key, weighting_digest
from lqlora.costs._fast import Task, fast_costs
from lqlora.costs.store import StoredRow
from lqlora.decomposition import decompose
from lqlora.decomposition._arguments import checked_matrix, checked_rank
from lqlora.weighting import Uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lqlora._typing import Array
    from lqlora.costs.table import Configuration
    from lqlora.weighting import AbstractWeighting, LowRankStep

__all__ = ["RowTask", "cost_row"]


class RowTask(NamedTuple):
    """A matrix, or a callable that returns it; and what a store knows of its costs, if there is a store."""

    name: str
    source: Array | Callable[[], Array]
    weighting: AbstractWeighting | None
    known: StoredRow | None = None


def cost_row(
    task: RowTask, *, configurations: Sequence[Configuration], options: dict[str, Any], fast: bool, stored: str
) -> StoredRow:
    """Return the costs of a matrix that are not known yet; of what is known, entries and weighting are compared.

    Parameters
    ----------
    task : RowTask
        The matrix.
    configurations : sequence of Configuration
        Columns of the table.
    options : dict
        Of :func:`lqlora.decompose`.
    fast : bool
        Whether costs are shared.
    stored : str
        Where what is known is from, for errors; empty without a store: then there are no digests either.

    Returns
    -------
    StoredRow
        What is to be added to the store.
    """
    matrix = task.source() if callable(task.source) else task.source
    digests = (array_digest(matrix), weighting_digest(task.weighting)) if stored else ("", "")
    row = StoredRow(task.name, tuple(matrix.shape), *digests, {})
    if task.known is not None:
        task.known.joined(row, stored)
    known = task.known.costs if task.known is not None else {}
    missing = [own for own in configurations if configuration_key(own) not in known]
    if not missing:
        return row
    costs = _costs(matrix, task, missing, options, fast=fast)
    return StoredRow(task.name, row.shape, *digests, dict(zip(map(configuration_key, missing), costs, strict=True)))


def _costs(
    matrix: Array, task: RowTask, missing: Sequence[Configuration], options: dict[str, Any], *, fast: bool
) -> list[float]:
    """Return the cost of each configuration."""
    wide, norm = checked_matrix(matrix, task.name), task.weighting or Uniform()
    norm.check(tuple(wide.shape))
    clip = options.get("clip_rank", False)
    used = {own.rank: checked_rank(wide, own.rank, None, task.name, clip_rank=clip)[0] for own in missing}
    if norm.all_zero:
        return [0.0] * len(missing)
    if fast:
        formats = list(dict.fromkeys(own.format for own in missing))
        costs = fast_costs(Task(wide, norm, options["seed"], task.name), formats, sorted(set(used.values())))
        return [costs[own.format, used[own.rank]] for own in missing]
    starts: dict[int, LowRankStep] = {}
    if options["init"] == "svd" and options.get("init_rank") is None:  # what every format starts from
        starts = {rank: norm.low_rank(wide, low, seed=options["seed"]) for rank, low in used.items() if low}
    options = {"weighting": norm, "name": task.name, **options}
    return [
        decompose(wide, own.format, own.rank, start=starts.get(own.rank), **options).squared_error for own in missing
    ]
