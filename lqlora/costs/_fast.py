"""Fast cost tables: a few formats of each matrix are decomposed, and the costs of the other formats are estimated.

Formats that share codebook and blocks form a family. A sample of the blocks is rounded to each format of a family. This
gives the error of quantization alone, and the distance between two formats. A few formats of each family, its
representatives, are decomposed; every other format is near one of them. The estimate for such a format is the cost of
its nearest representative, times the ratio of their errors of quantization alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lqlora import ops
from lqlora.decomposition.iteration import iterate, remainder, residual_of
from lqlora.ops.lowrank import OVERSAMPLING
from lqlora.quantized.rounding_sample import RoundingSample
from lqlora.weighting import LowRankStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.weighting import AbstractWeighting

__all__ = ["Task", "fast_costs"]

#: Formats are near each other if their distance is at most this: see :func:`_measure`. Two roundings with independent
#: errors of the same size are 2 apart.
_NEAR = 1.0

#: A format is bad, and not decomposed, if another format of at most its size has an error this many times smaller.
_HOPELESS = 1.5


class Task(NamedTuple):
    """A matrix, and the arguments that its decompositions share."""

    matrix: Array
    weighting: AbstractWeighting
    seed: int
    name: str


@dataclass(frozen=True, eq=False)
class _Family:
    """Formats that differ only in how their scales are stored.

    Parameters
    ----------
    formats : list of BlockFormat
        The k formats.
    sample : RoundingSample
        Blocks of the matrix.
    errors : ndarray of float64, shape (k,)
        Squared error of quantization alone, measured on the sample.
    distances : ndarray of float64, shape (k, k)
        Distances between the formats: see :func:`_measure`.
    """

    formats: list[BlockFormat]
    sample: RoundingSample
    errors: npt.NDArray[np.float64]
    distances: npt.NDArray[np.float64]


def fast_costs(
    task: Task, formats: Sequence[BlockFormat], ranks: Sequence[int]
) -> dict[tuple[BlockFormat, int], float]:
    """Return the cost of each pair of format and rank. No rank is larger than the matrix allows."""
    # Let e_f be the error of quantization alone in format f, and c_f its cost with a low-rank part of some rank. The
    # low-rank part takes away the structured part of the error, and that share is about the same for formats whose
    # errors are alike. With the nearest representative g therefore
    #     c_f = e_f (c_f / e_f) ~ e_f (c_g / e_g) = c_g (e_f / e_g).
    grouped: dict[tuple[object, ...], list[BlockFormat]] = {}
    for fmt in formats:
        grouped.setdefault((fmt.codebook, fmt.block_size, fmt.axis, fmt.levels, fmt.rotation), []).append(fmt)
    families = [_measure(task, own) for own in grouped.values()]
    found: dict[tuple[BlockFormat, int], float] = {}
    for family, members in zip(families, _contenders(task, families), strict=True):
        leaders = _cover(family.distances, members)
        costs = {leader: dict(_decomposed(task, family, leader, ranks)) for leader in leaders}
        for index, fmt in enumerate(family.formats):
            leader = min(leaders, key=family.distances[index].__getitem__)
            ratio = float(family.errors[index] / family.errors[leader]) if family.errors[leader] > 0 else 1.0
            found |= {(fmt, rank): cost * ratio for rank, cost in costs[leader].items()}
    return found


def _measure(task: Task, formats: list[BlockFormat]) -> _Family:
    """Round a sample of the blocks to each format of a family, and compare the errors."""
    # Let d_f be the vector of the (weighted) errors of all entries of the sample in format f. The distance of two
    # formats is |d_f - d_g|^2 / min(|d_f|^2, |d_g|^2). It is 0 for equal roundings, and 2 for independent ones of one
    # size. The numerator is |d_f|^2 + |d_g|^2 - 2 <d_f, d_g>, so one matrix product gives all pairs.
    rotation = formats[0].rotation
    weights = (
        task.weighting.element_weights() if rotation is None else task.weighting.rotated_element_weights(rotation.seeds)
    )
    sample = RoundingSample(task.matrix, formats[0], weights, name=task.name)
    rounded = [sample.rounded(fmt) for fmt in formats]
    lost = np.stack([np.asarray(ops.convert(own.errors, np)) for own in rounded])
    products = lost @ lost.T
    squares = np.diagonal(products)
    # Cancellation may leave a small negative number. Without any error two formats are 0 apart, not 0 / 0.
    apart = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    smaller = np.minimum(squares[:, None], squares[None, :])
    distances = np.divide(apart, smaller, out=np.where(apart > 0, np.inf, 0.0), where=smaller > 0)
    return _Family(formats, sample, np.array([own.squared_error for own in rounded]), distances)


def _contenders(task: Task, families: Sequence[_Family]) -> list[list[int]]:
    """Return candidates for the representatives of each family: without bad formats, but always with the best one."""
    # Over the formats of all families, sorted by size, the running minimum of the errors is the least error at each
    # size. The last format of the same size is at `searchsorted(..., side="right") - 1`.
    shape = tuple(task.matrix.shape)
    sizes = [np.array([fmt.storage_bits(shape) for fmt in family.formats]) for family in families]
    order = np.argsort(np.concatenate(sizes), kind="stable")
    lowest = np.minimum.accumulate(np.concatenate([family.errors for family in families])[order])
    by_size = np.concatenate(sizes)[order]
    found = []
    for family, size in zip(families, sizes, strict=True):
        best = lowest[np.searchsorted(by_size, size, side="right") - 1]
        hopeless = family.errors > _HOPELESS * best
        hopeless[np.argmin(family.errors)] = False
        found.append([int(index) for index in np.flatnonzero(~hopeless)])
    return found


def _cover(distances: npt.NDArray[np.float64], members: Sequence[int]) -> list[int]:
    """Return a small set of formats such that every format is near one of the set (greedy set cover)."""
    # The smallest set is NP-hard to find. Each step takes the uncovered member that is near most uncovered ones. So no two
    # representatives are near each other. Ties go to the first member, so the result is reproducible.
    near, uncovered, found = distances <= _NEAR, list(members), []
    while uncovered:
        best = max(uncovered, key=lambda own: int(near[own, uncovered].sum()))
        found.append(best)
        uncovered = [own for own in uncovered if own != best and not near[best, own]]
    return found


def _decomposed(task: Task, family: _Family, leader: int, ranks: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield the cost of a format at each rank, as ``decompose(init="quantize", max_iter=2)`` computes it."""
    # One SVD serves all ranks: the first low-rank part at a smaller rank is that at the largest one, truncated. Only
    # the second iteration, quantization and a low-rank step, is done for each rank.
    fmt = family.formats[leader]
    residual = residual_of(task.matrix, family.sample.quantized(fmt))
    first = task.weighting.low_rank(residual, max(ranks), seed=task.seed) if max(ranks) else None
    for rank in ranks:
        if first is None or not rank:
            yield rank, task.weighting.squared_norm(residual)
        else:
            step = _truncated(first, rank)
            second = iterate(task.matrix, remainder(task.matrix, step), fmt, task.weighting, step)
            yield rank, second.squared_error


def _truncated(step: LowRankStep, rank: int) -> LowRankStep:
    """Return a low-rank step truncated to its largest components."""
    # Components are sorted by size. The basis of the randomized SVD keeps its oversampling columns for the next step.
    if rank == step.left.shape[1]:
        return step
    basis = None if step.basis is None else step.basis[:, : rank + OVERSAMPLING]
    return LowRankStep(step.left[:, :rank], step.right[:rank, :], basis, math.inf)
