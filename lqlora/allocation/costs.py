"""From matrices to a cost table: every matrix is decomposed in every configuration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._parallel import map_matrices
from lqlora.allocation.table import Configuration, CostTable
from lqlora.decomposition import Init, decompose
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, float_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from lqlora._typing import Array, FloatName
    from lqlora.weighting import AbstractWeighting

__all__ = ["cost_table"]


def cost_table(
    weights: Mapping[str, Array | Callable[[], Array]],
    formats: Sequence[BlockFormat],
    *,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    factor_format: BlockFormat | None = None,
    factor_dtype: FloatName = "float16",
    weighting: Mapping[str, AbstractWeighting] | None = None,
    init: Init = "quantize",
    max_iter: int = 2,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> CostTable:
    """Decompose every matrix in every format and rank, and note errors and sizes.

    Parameters
    ----------
    weights : mapping of str to array of shape (m, n), or to a callable that returns one
        Matrices by name. A callable is called when its row is computed, so that few matrices are in memory at a time.
    formats : sequence of BlockFormat
        Formats to choose from.
    rank : int, optional
        Rank of the low-rank part.
    ranks : sequence of int, optional
        Ranks to choose from; every format is combined with each. Exactly one of the two is given.
    factor_format : BlockFormat, optional
        Quantize the factors, too: errors and sizes are those of quantized factors.
    factor_dtype : {"float16", "bfloat16", "float32"}
        What each entry of the factors is stored as where they are not quantized: 16 bits each if not given. Only the
        sizes know of it: errors are those of factors of float32.
    weighting : mapping of str to AbstractWeighting, optional
        Norm of each matrix; matrices not named count uniformly. Costs are compared across matrices, so the weightings
        must be on one scale: Fisher information is. A matrix whose weights are all zero costs nothing.
    init, max_iter, seed : str, int, int
        See :func:`lqlora.decompose`. Few iterations suffice: the table ranks formats, it is not the final answer.
    executor : concurrent.futures.Executor, optional
        Where to run, a matrix a task; a thread per core if not given.
    progress : callable, optional
        Called with the number of matrices done and the number of all.
    **options
        Further options of :func:`lqlora.decompose`, such as ``fit`` or ``quantizer``.

    Returns
    -------
    CostTable
        The same for every executor.

    Raises
    ------
    InvalidArgumentError
        If there are no matrices, formats or ranks, one of them occurs twice, or a weighting names no matrix.

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
    weighting = weighting or {}
    configurations = _configurations(formats, rank, ranks)
    if not weights or not configurations:
        raise InvalidArgumentError("A cost table needs at least one matrix, one format and one rank.")
    if len(set(configurations)) < len(configurations):
        raise InvalidArgumentError("A format or a rank occurs twice.")
    if unknown := set(weighting) - set(weights):
        raise InvalidArgumentError(f"Weightings for unknown matrices: {', '.join(sorted(unknown))}.")
    bits = float_bits(factor_dtype)
    options = {**options, "factor_format": factor_format, "init": init, "max_iter": max_iter, "seed": seed}
    row = functools.partial(_cost_row, configurations=configurations, options=options)
    items = [(name, source, weighting.get(name)) for name, source in weights.items()]
    rows = map_matrices(row, items, executor, progress)
    shapes = tuple(shape for shape, _ in rows)
    sizes = [[own.format.storage_bits(shape) for own in configurations] for shape in shapes]
    factor_sizes = [[_factor_bits(shape, own.rank, factor_format, bits) for own in configurations] for shape in shapes]
    return CostTable(
        tuple(weights),
        shapes,
        configurations,
        np.array([costs for _, costs in rows], dtype=np.float64),
        np.array(sizes, dtype=np.int64),
        np.array(factor_sizes, dtype=np.int64),
    )


def _configurations(
    formats: Sequence[BlockFormat], rank: int | None, ranks: Sequence[int] | None
) -> tuple[Configuration, ...]:
    """Return all pairs of format and rank."""
    if (rank is None) == (ranks is None):
        raise InvalidArgumentError("Give rank or ranks, and only one of them.")
    every = [rank] if rank is not None else [*(ranks or ())]
    return tuple(Configuration(fmt, own) for fmt in formats for own in every)


def _factor_bits(shape: tuple[int, ...], rank: int, fmt: BlockFormat | None, bits: int) -> int:
    """Bits of the factors of a matrix."""
    rows, columns = shape
    if fmt is None:
        return bits * rank * (rows + columns)
    return fmt.storage_bits((rank, columns)) + fmt.storage_bits((rows, rank))


def _cost_row(
    item: tuple[str, Array | Callable[[], Array], AbstractWeighting | None],
    *,
    configurations: Iterable[Configuration],
    options: dict[str, Any],
) -> tuple[tuple[int, ...], list[float]]:
    name, source, weighting = item
    matrix = source() if callable(source) else source
    found = [
        decompose(matrix, own.format, own.rank, weighting=weighting, name=name, **options) for own in configurations
    ]
    matters = weighting is None or not weighting.all_zero
    return tuple(matrix.shape), [d.squared_error if matters else 0.0 for d in found]
