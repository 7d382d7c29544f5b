"""From matrices to a cost table: every matrix is decomposed in every configuration."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lqlora._parallel import map_matrices
from lqlora.costs._digests import configuration_key, settings_as_json, text_digest
from lqlora.costs._rows import RowTask, cost_row
from lqlora.costs.store import CostStore
from lqlora.costs.table import Configuration, CostTable
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, float_bits

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Executor

    from lqlora._typing import Array, FloatName
    from lqlora.costs.store import StoredRow
    from lqlora.decomposition import Init
    from lqlora.weighting import AbstractWeighting

__all__ = ["Mode", "cost_table"]

Mode: TypeAlias = Literal["exact", "fast"]


def cost_table(
    weights: Mapping[str, Array | Callable[[], Array]],
    formats: Sequence[BlockFormat],
    *,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    factor_format: BlockFormat | None = None,
    factor_dtype: FloatName = "float16",
    mode: Mode = "exact",
    weighting: Mapping[str, AbstractWeighting] | None = None,
    init: Init = "quantize",
    max_iter: int = 2,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    **options: Any,
) -> CostTable:
    """Decompose every matrix in every format and rank, and note errors and sizes.

    Parameters
    ----------
    weights : mapping of str to array of shape (m, n), or to a callable that returns one
        Matrices by name. A callable is called when its row is computed, so that few matrices are in memory at a time.
    formats : sequence of BlockFormat
        Formats to choose from. With ``fit="levels+scale"`` those that share levels with nothing are taken with levels
        for each matrix, which are stored and count.
    rank : int, optional
        Rank of the low-rank part.
    ranks : sequence of int, optional
        Ranks to choose from; every format is combined with each. Exactly one of the two is given.
    factor_format : BlockFormat, optional
        Quantize the factors, too: errors and sizes are those of quantized factors.
    factor_dtype : {"float16", "bfloat16", "float32"}
        What each entry of the factors is stored as where they are not quantized: 16 bits each if not given. Only the
        sizes know of it: errors are those of factors of float32.
    mode : {"exact", "fast"}
        ``"exact"``: each cost is that of a decomposition of its own. ``"fast"``: of the formats that share codebook and
        blocks a few are decomposed, by two iterations from the quantized matrix; the others cost what the one nearest
        to them does, times the ratio of the errors of quantization alone. Meant for grids of hundreds of formats: of
        the 432 of ``paper_grid("code")`` it decomposes about a tenth. Costs are off by a few tenths of a percent, see
        ``benchmarks/README.md``. Those of scales of two bits may be off by a tenth on small matrices, and those of formats
        that another one beats by half at no larger size by more; under element-wise weights all are some percent too
        high, as factors are not refitted.
    weighting : mapping of str to AbstractWeighting, optional
        Norm of each matrix; matrices not named count uniformly. Costs are compared across matrices, so the weightings
        must be on one scale: Fisher information is. A matrix whose weights are all zero costs nothing.
    init, max_iter, seed : str, int, int
        See :func:`lqlora.decompose`. Few iterations suffice: the table ranks formats, it is not the final answer.
    store : str or path, optional
        File that each row is written to when it is finished; rows that are in it already are not computed again, see
        :class:`CostStore`. Entries and weighting of each matrix are compared with those the row was computed of.
    executor : concurrent.futures.Executor, optional
        Where to run, a matrix a task; a thread per core if not given. Processes and other machines need matrices and
        callables that can be pickled; the store is written by the calling process alone.
    progress : callable, optional
        Called with the number of matrices done, the number of all, and an estimate of the seconds left: infinite
        before the first matrix was computed, which those in the store are not.
    **options
        Further options of :func:`lqlora.decompose`, such as ``fit`` or ``quantizer``. The fast mode takes only
        ``clip_rank``.

    Returns
    -------
    CostTable
        The same for every executor.

    Raises
    ------
    InvalidArgumentError
        If there are no matrices, formats or ranks, one of them occurs twice, a weighting names no matrix, the
        fast mode was given an option it does not have, or other processes a function that cannot be pickled.
    StoreError
        If the store is in use, corrupt, or of other settings, matrices or weightings.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse("nf2/64:float16"), lq.BlockFormat.parse("nf4/64:float16")]
    >>> table = lq.cost_table({"a": np.random.default_rng(0).standard_normal((32, 32))}, formats, rank=2)
    >>> bool(table.costs[0, 0] > table.costs[0, 1]), table.sizes.tolist()
    (True, [[2304, 4352]])
    """
    configurations = _configurations(_as_stored(formats, options), rank, ranks)
    options = {**options, "factor_format": factor_format, "init": init, "max_iter": max_iter, "seed": seed}
    _check(weights, configurations, weighting or {}, mode, options)
    bits = float_bits(factor_dtype)
    tasks = [RowTask(name, source, (weighting or {}).get(name)) for name, source in weights.items()]
    with (
        contextlib.nullcontext()
        if store is None
        else CostStore(store, _settings(mode, options, configurations)) as file
    ):
        known = file.rows if file is not None else {}
        tasks = [task._replace(known=known.get(task.name)) for task in tasks]
        work = functools.partial(
            cost_row, configurations=configurations, options=options, fast=mode == "fast", stored=str(store or "")
        )
        done = _Done(len(tasks), progress, file, configurations)
        rows = map_matrices(work, tasks, executor, collect=done.take)
        found = {row.name: {**known[row.name].costs, **row.costs} if row.name in known else row.costs for row in rows}
    shapes = tuple(row.shape for row in rows)
    keys = [configuration_key(own) for own in configurations]
    sizes = [[own.format.storage_bits(shape) for own in configurations] for shape in shapes]
    factor_sizes = [[_factor_bits(shape, own.rank, factor_format, bits) for own in configurations] for shape in shapes]
    return CostTable(
        tuple(weights),
        shapes,
        configurations,
        np.array([[found[name][key] for key in keys] for name in weights], dtype=np.float64),
        np.array(sizes, dtype=np.int64),
        np.array(factor_sizes, dtype=np.int64),
    )


def _as_stored(formats: Sequence[BlockFormat], options: Mapping[str, Any]) -> list[BlockFormat]:
    """Return the formats that matrices will be in: fitted levels take bits of their own."""
    if options.get("fit") != "levels+scale":
        return list(formats)
    return [
        replace(fmt, levels="matrix") if isinstance(fmt, BlockFormat) and fmt.levels == "codebook" else fmt
        for fmt in formats
    ]


def _configurations(
    formats: Sequence[BlockFormat], rank: int | None, ranks: Sequence[int] | None
) -> tuple[Configuration, ...]:
    """Return all pairs of format and rank."""
    if (rank is None) == (ranks is None):
        raise InvalidArgumentError("Give rank or ranks, and only one of them.")
    every = [rank] if rank is not None else [*(ranks or ())]
    return tuple(Configuration(fmt, own) for fmt in formats for own in every)


def _check(
    weights: Mapping[str, Any],
    configurations: Sequence[Configuration],
    weighting: Mapping[str, AbstractWeighting],
    mode: str,
    options: Mapping[str, Any],
) -> None:
    if not weights or not configurations:
        raise InvalidArgumentError("A cost table needs at least one matrix, one format and one rank.")
    if len(set(configurations)) < len(configurations):
        raise InvalidArgumentError("A format or a rank occurs twice.")
    if unknown := set(weighting) - set(weights):
        raise InvalidArgumentError(f"Weightings for unknown matrices: {', '.join(sorted(unknown))}.")
    if mode not in ("exact", "fast"):
        raise InvalidArgumentError(f"mode is 'exact' or 'fast', not {mode!r}.")
    allowed = {"factor_format": None, "init": "quantize", "max_iter": 2, "fit": "absmax", "quantizer": "nearest"}
    others = [
        name
        for name, value in options.items()
        if name not in ("seed", "clip_rank") and (name not in allowed or value != allowed[name])
    ]
    if mode == "fast" and others:
        raise InvalidArgumentError(f"mode='fast' has no choice of {', '.join(others)}: use mode='exact'.")


def _settings(mode: str, options: Mapping[str, Any], configurations: Sequence[Configuration]) -> dict[str, Any]:
    """Return what all costs of a store have in common: costs that are shared depend on what they are shared with."""
    settings = settings_as_json({"mode": mode, **options})
    if mode == "fast":
        settings["configurations"] = text_digest("\n".join(map(configuration_key, configurations)))
    return settings


class _Done:
    """Takes what is finished: to the store, and to whoever wants to know how long it takes."""

    def __init__(
        self,
        total: int,
        progress: Callable[[int, int, float], None] | None,
        store: CostStore | None,
        configurations: Sequence[Configuration],
    ) -> None:
        keys = {configuration_key(own) for own in configurations}
        known = {} if store is None else store.rows
        self._total, self._progress, self._store = total, progress, store
        self._complete = {name for name, row in known.items() if keys <= row.costs.keys()}
        self._count = self._computed = 0
        self._start = time.monotonic()

    def take(self, row: StoredRow) -> None:
        """Take note of a row."""
        self._count += 1
        self._computed += bool(row.costs)
        self._complete.discard(row.name)
        if self._store is not None and row.costs:
            self._store.append(row)
        if self._progress is not None:
            left = self._total - self._count - len(self._complete)
            pace = (time.monotonic() - self._start) / self._computed if self._computed else math.inf
            self._progress(self._count, self._total, left * pace if left else 0.0)


def _factor_bits(shape: tuple[int, ...], rank: int, fmt: BlockFormat | None, bits: int) -> int:
    """Bits of the factors of a matrix."""
    rows, columns = shape
    if fmt is None:
        return bits * rank * (rows + columns)
    return fmt.storage_bits((rank, columns)) + fmt.storage_bits((rows, rank))
