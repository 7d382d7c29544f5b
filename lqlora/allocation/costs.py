"""Error and size of every matrix in every format."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lqlora._parallel import map_matrices
from lqlora.decomposition import Init, decompose
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.weighting import AbstractWeighting

__all__ = ["CostTable", "cost_table"]


@dataclass(frozen=True, eq=False)
class CostTable:
    """Error and size of every matrix in every format.

    Parameters
    ----------
    names : tuple of str
        Matrices, one a row.
    shapes : tuple of tuple of int
        Their shapes.
    formats : tuple of BlockFormat
        Formats, one a column.
    costs : ndarray of float64, shape (n, m)
        Weighted squared error of each decomposition.
    sizes : ndarray of int64, shape (n, m)
        Exact storage in bits, without the low-rank factors.
    rank : int
        Rank of the decompositions.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    formats: tuple[BlockFormat, ...]
    costs: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    rank: int

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(math.prod(shape) for shape in self.shapes)


def cost_table(
    weights: Mapping[str, Array | Callable[[], Array]],
    formats: Sequence[BlockFormat],
    *,
    rank: int,
    weighting: Mapping[str, AbstractWeighting] | None = None,
    init: Init = "quantize",
    max_iter: int = 2,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> CostTable:
    """Decompose every matrix in every format, and note the error and the size.

    Parameters
    ----------
    weights : mapping of str to array of shape (m, n), or to a callable that returns one
        Matrices by name. A callable is called when its row is computed, so that few matrices are in memory at a time.
    formats : sequence of BlockFormat
        Formats to choose from.
    rank : int
        Rank of the low-rank part.
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
        If there are no matrices or no formats, a format occurs twice, or a weighting names no matrix.

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
    if not weights or not formats:
        raise InvalidArgumentError("A cost table needs at least one matrix and one format.")
    if len(set(formats)) < len(formats):
        raise InvalidArgumentError("A format occurs twice.")
    if unknown := set(weighting) - set(weights):
        raise InvalidArgumentError(f"Weightings for unknown matrices: {', '.join(sorted(unknown))}.")
    options = {**options, "init": init, "max_iter": max_iter, "seed": seed}
    row = functools.partial(_cost_row, formats=tuple(formats), rank=rank, options=options)
    items = [(name, source, weighting.get(name)) for name, source in weights.items()]
    rows = map_matrices(row, items, executor, progress)
    shapes = tuple(shape for shape, _ in rows)
    sizes = np.array([[fmt.storage_bits(shape) for fmt in formats] for shape in shapes], dtype=np.int64)
    return CostTable(tuple(weights), shapes, tuple(formats), np.array([costs for _, costs in rows]), sizes, rank)


def _cost_row(
    item: tuple[str, Array | Callable[[], Array], AbstractWeighting | None],
    *,
    formats: Iterable[BlockFormat],
    rank: int,
    options: dict[str, Any],
) -> tuple[tuple[int, ...], list[float]]:
    name, source, weighting = item
    matrix = source() if callable(source) else source
    found = [decompose(matrix, fmt, rank, weighting=weighting, name=name, **options) for fmt in formats]
    matters = weighting is None or not weighting.all_zero
    return tuple(matrix.shape), [d.squared_error if matters else 0.0 for d in found]
