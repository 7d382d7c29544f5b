"""Building a cost table: every matrix is decomposed in every format and rank, with a store, threads or an executor."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lqlora._annotations import annotated
from lqlora._options import require_choice
from lqlora._parallel import map_matrices
from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora._progress import bars_hidden, reported
from lqlora.costs._digests import configuration_key, settings_as_json, text_digest
from lqlora.costs._rows import RowTask, cost_row
from lqlora.costs.store import CostStore
from lqlora.costs.table import Configuration, CostTable
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, float_bits
from lqlora.quantized.quantization import with_fitted_levels

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    import numpy.typing as npt

    from lqlora._typing import Array, FloatName
    from lqlora.costs.store import StoredRow
    from lqlora.decomposition import Init
    from lqlora.weighting import AbstractWeighting

__all__ = ["Mode", "cost_table"]

_log = logging.getLogger("lqlora")

Mode: TypeAlias = Literal["exact", "fast"]


@annotated
def cost_table(
    weights: Mapping[str, Array | Callable[[], Array]],
    formats: Sequence[BlockFormat],
    *,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    factor_format: BlockFormat | None = None,
    factor_dtype: FloatName = "float16",
    mode: Mode = "exact",
    weighting: Mapping[str, AbstractWeighting | Callable[[], AbstractWeighting]] | None = None,
    init: Init = "quantize",
    max_iter: int = 2,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> CostTable:
    """Decompose every matrix in every format and rank, and return the table of errors and sizes.

    Parameters
    ----------
    weights : mapping of str to array of shape (m, n), or to a callable that returns one
        Matrices by name. A callable is called when its row is computed, so that few matrices are in memory at a time.
    formats : sequence of BlockFormat
        Formats to choose from. With ``fit="levels+scale"`` each matrix has fitted levels, which are stored and count:
        formats with the levels of their codebook become formats with levels for each matrix.
    rank : int, optional
        Rank of the low-rank part.
    ranks : sequence of int, optional
        Ranks to choose from; every format is combined with each. Give exactly one of ``rank`` and ``ranks``.
    factor_format : BlockFormat, optional
        Format of the low-rank factors. Errors and sizes are then those of quantized factors.
    factor_dtype : {"float16", "bfloat16", "float32"}
        Dtype of stored factors that are not quantized. It decides their size only: errors are those of float32 factors.
    mode : {"exact", "fast"}
        ``"exact"``: each cost is computed by a separate decomposition. ``"fast"``: a few formats of each codebook and
        block size are decomposed, by two iterations from the quantized matrix. The cost of another format is estimated
        from the nearest of these: its cost, times the ratio of their errors of quantization alone. This mode is meant
        for grids of hundreds of formats: of the 432 of ``paper_grid("code")`` it decomposes about a tenth. Its costs
        are off by a few tenths of a percent (see ``benchmarks/README.md``). On small matrices, costs of formats with
        scales of two bits may be off by a tenth. Costs may be off by more for formats with at least 1.5 times the error
        of another format of at most their size. With element-wise importance all costs are a few percent too high,
        because factors are not refitted.
    weighting : mapping of str to AbstractWeighting, or to a callable that returns one, optional
        Norm of each matrix; it is uniform for matrices that are not named. Costs are compared across matrices, so the
        weightings must be on one scale, as Fisher information is. A matrix whose importance is all zero costs nothing. A callable is
        called when its row is computed, so that few norms are in memory at a time.
    init, max_iter, seed : str, int, int
        See :func:`lqlora.decompose`. Few iterations suffice, since the table only ranks formats.
    store : str or path, optional
        File that each row is appended to when it is finished: see :class:`CostStore`. Rows that it holds already are not
        computed again. Their matrices and weightings are compared with those that the rows were computed from.
    executor : concurrent.futures.Executor, optional
        Executor with a task for each matrix; by default a thread for each core. Processes and other machines need
        matrices and callables that can be pickled. Only the calling process writes the store.
    progress : bool or callable, default True
        With True there is a bar with the time left, if standard error is a terminal and tqdm is installed. False is silence. A
        function is called after each finished matrix with the number of finished matrices and the number of all. Matrices
        whose costs are all in the store count as finished from the beginning. The logger ``lqlora`` gets a line for each
        computed matrix at level INFO.
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
        If there are no matrices, formats or ranks, a format or rank is given twice, a weighting names no matrix, the
        fast mode gets an option that it does not have, or an argument for another process cannot be pickled.
    StoreError
        If the store is in use, corrupt, or belongs to other settings, matrices or weightings.

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
    dtype_bits = float_bits(factor_dtype)
    # Rows are known by the keys of their configurations, not by columns: a store may hold more configurations than this
    # table, or fewer, or the same in another order. The columns are put in order at the end.
    by_key = {configuration_key(own): own for own in configurations}
    tasks = [RowTask(name, source, (weighting or {}).get(name)) for name, source in weights.items()]
    with contextlib.nullcontext() if store is None else CostStore(store, _settings(mode, options, by_key)) as file:
        known = file.rows if file is not None else {}
        tasks = [task._replace(known=known.get(task.name)) for task in tasks]
        work = functools.partial(
            cost_row, configurations=by_key, options=options, fast=mode == "fast", stored=str(store or "")
        )
        complete = sum(by_key.keys() <= row.costs.keys() for row in known.values() if row.name in weights)
        with reported(progress, "Cost table", len(tasks), "matrix", complete) as report:
            rows = map_matrices(work, tasks, executor, collect=_Collector(report, complete, len(tasks), file).take)
        found = {row.name: {**known[row.name].costs, **row.costs} if row.name in known else row.costs for row in rows}
    shapes = tuple(row.shape for row in rows)
    sizes = _by_shape(shapes, lambda shape: [own.format.storage_bits(shape) for own in configurations])
    factor_sizes = _by_shape(
        shapes, lambda shape: [_factor_bits(shape, own.rank, factor_format, dtype_bits) for own in configurations]
    )
    costs = np.array([[found[name][key] for key in by_key] for name in weights], dtype=np.float64)
    return CostTable(tuple(weights), shapes, configurations, costs, sizes, factor_sizes)


def _by_shape(
    shapes: Sequence[tuple[int, ...]], sizes_of: Callable[[tuple[int, ...]], list[int]]
) -> npt.NDArray[np.int64]:
    """Return a row of sizes for each matrix, computed once for each shape."""
    # A model has few shapes and thousands of matrices, and a grid hundreds of formats.
    rows = {shape: sizes_of(shape) for shape in dict.fromkeys(shapes)}
    return np.array([rows[shape] for shape in shapes], dtype=np.int64)


def _as_stored(formats: Sequence[BlockFormat], options: Mapping[str, Any]) -> list[BlockFormat]:
    """Return the formats of the results. Formats with fitted levels also store the levels, which takes bits."""
    # Otherwise sizes would leave out the levels that are stored.
    if options.get("fit") != "levels+scale":
        return list(formats)
    return [with_fitted_levels(fmt) if isinstance(fmt, BlockFormat) else fmt for fmt in formats]


def _configurations(
    formats: Sequence[BlockFormat], rank: int | None, ranks: Sequence[int] | None
) -> tuple[Configuration, ...]:
    """Return all pairs of format and rank."""
    if (rank is None) == (ranks is None):
        raise InvalidArgumentError(f"rank or ranks must be given, and not both; got {rank!r} and {ranks!r}.")
    every = [rank] if rank is not None else [*(ranks or ())]
    return tuple(Configuration(fmt, own) for fmt in formats for own in every)


def _check(
    weights: Mapping[str, Any],
    configurations: Sequence[Configuration],
    weighting: Mapping[str, AbstractWeighting | Callable[[], AbstractWeighting]],
    mode: str,
    options: Mapping[str, Any],
) -> None:
    if not weights:
        raise InvalidArgumentError("weights must hold at least one matrix, got none.")
    if not configurations:
        raise InvalidArgumentError("formats and ranks must hold at least one format and one rank, got none.")
    if len(set(configurations)) < len(configurations):
        twice = next(own for place, own in enumerate(configurations) if own in configurations[:place])
        raise InvalidArgumentError(f"formats and ranks must not contain duplicates, got {twice} twice.")
    if unknown := sorted(set(weighting) - set(weights)):
        raise InvalidArgumentError(f"weighting must name matrices of weights, got {list_names(unknown)}.")
    require_choice(mode, "mode", ("exact", "fast"))
    # The fast mode always does what these options do. An option with this value changes nothing and may be given.
    allowed = {"factor_format": None, "init": "quantize", "max_iter": 2, "fit": "absmax", "quantizer": "nearest"}
    others = [
        name
        for name, value in options.items()
        if name not in ("seed", "clip_rank") and (name not in allowed or value != allowed[name])
    ]
    if mode == "fast" and others:
        raise InvalidArgumentError(f"{', '.join(others)} cannot be set with mode='fast': use mode='exact'.")


def _settings(mode: str, options: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return the settings that all costs of a store share. In fast mode they include the list of configurations."""
    settings = settings_as_json({"mode": mode, **options})
    if mode == "fast":  # a cost depends on the other formats, since it is estimated from theirs
        settings["configurations"] = text_digest("\n".join(keys))
    return settings


class _Collector:
    """Receiver of finished rows, which appends new costs to the store and reports how many rows are complete."""

    def __init__(self, report: Callable[[int], None], complete: int, total: int, store: CostStore | None) -> None:
        self._report, self._complete, self._total, self._store = report, complete, total, store

    def take(self, row: StoredRow) -> None:
        """Append a row to the store and report it, unless the store holds all of its costs."""
        if row.costs:
            if self._store is not None:
                self._store.append(row)
            self._complete += 1
            if _log.isEnabledFor(logging.INFO):
                values = printable(row.name), len(row.costs), self._complete, self._total
                with bars_hidden():
                    _log.info("%s: %d costs, %d of %d matrices", *values)
            self._report(self._complete)


def _factor_bits(shape: tuple[int, ...], rank: int, fmt: BlockFormat | None, bits: int) -> int:
    """Return the bits of the factors of a matrix, quantized if there is a format, else of ``bits`` an entry."""
    # The rank is the one that was asked for, even above what the matrix allows: clip_rank pads factors with zeros up to
    # it, and the zeros are stored. Factors are quantized one by one, so each is rounded up to whole bytes separately.
    rows, columns = shape
    if fmt is None:
        return bits * rank * (rows + columns)
    return fmt.storage_bits((rank, columns)) + fmt.storage_bits((rows, rank))
