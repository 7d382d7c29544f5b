"""Costs of many formats of one matrix, by few decompositions.

Formats that share codebook and blocks are a family, and what they round a sample of the blocks to tells how far apart two
of them are. Few of a family are decomposed, such that one of these is near every other format. The others cost what the
nearest of these does, times the ratio of the errors of quantization alone: what the low-rank part takes away of an
error is about the same share for both.
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

#: Formats are near each other if the squared norm of the difference of what they round to is at most this share of the
#: smaller of their squared errors. Two independent roundings of one error are 2 apart.
_NEAR = 1.0

#: A format is hopeless, and not decomposed, if one that is not larger has an error so many times smaller.
_HOPELESS = 1.5


class Task(NamedTuple):
    """A matrix, and what its decompositions share."""

    matrix: Array
    weighting: AbstractWeighting
    seed: int
    name: str


@dataclass(frozen=True, eq=False)
class _Family:
    """Formats that differ in how scales are stored.

    Parameters
    ----------
    formats : list of BlockFormat
        The formats.
    sample : RoundingSample
        Blocks of the matrix.
    errors : ndarray of float64, shape (k,)
        Squared error of quantization alone, measured on a sample.
    apart : ndarray of float64, shape (k, k)
        Squared distances, as shares of the smaller error.
    """

    formats: list[BlockFormat]
    sample: RoundingSample
    errors: npt.NDArray[np.float64]
    apart: npt.NDArray[np.float64]


def fast_costs(
    task: Task, formats: Sequence[BlockFormat], ranks: Sequence[int]
) -> dict[tuple[BlockFormat, int], float]:
    """Return the cost of each pair of format and rank; the ranks are those that the matrix can have."""
    grouped: dict[tuple[object, ...], list[BlockFormat]] = {}
    for fmt in formats:
        grouped.setdefault((fmt.codebook, fmt.block_size, fmt.axis, fmt.levels), []).append(fmt)
    families = [_compared(task, own) for own in grouped.values()]
    hopeful = _hopeful(task, families)
    found: dict[tuple[BlockFormat, int], float] = {}
    for family, own in zip(families, hopeful, strict=True):
        leaders = _cover(family.apart, own)
        costs = {leader: dict(_decomposed(task, family, leader, ranks)) for leader in leaders}
        for index, fmt in enumerate(family.formats):
            leader = min(leaders, key=family.apart[index].__getitem__)
            ratio = float(family.errors[index] / family.errors[leader]) if family.errors[leader] > 0 else 1.0
            found |= {(fmt, rank): cost * ratio for rank, cost in costs[leader].items()}
    return found


def _compared(task: Task, formats: list[BlockFormat]) -> _Family:
    """Round a sample of the blocks to each format of a family."""
    sample = RoundingSample(task.matrix, formats[0], task.weighting.element_weights(), name=task.name)
    rounded = [sample.rounded(fmt) for fmt in formats]
    lost = np.stack([np.asarray(ops.convert(own.errors, np)) for own in rounded])
    products = lost @ lost.T
    squares = np.diagonal(products)
    apart = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    smaller = np.minimum(squares[:, None], squares[None, :])
    shares = np.divide(apart, smaller, out=np.where(apart > 0, np.inf, 0.0), where=smaller > 0)
    return _Family(formats, sample, np.array([own.squared_error for own in rounded]), shares)


def _hopeful(task: Task, families: Sequence[_Family]) -> list[list[int]]:
    """Return the formats of each family that no other beats by far at no larger size; at least the best of a family."""
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


def _cover(apart: npt.NDArray[np.float64], members: Sequence[int]) -> list[int]:
    """Return few of the members such that every member is near one: again and again the one that has most near it."""
    near, left, found = apart <= _NEAR, list(members), []
    while left:
        best = max(left, key=lambda own: int(near[own, left].sum()))
        found.append(best)
        left = [own for own in left if own != best and not near[best, own]]
    return found


def _decomposed(task: Task, family: _Family, leader: int, ranks: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield the cost of a format at each rank, by what ``decompose(init="quantize", max_iter=2)`` does.

    The first low-rank part at a smaller rank is that at the largest one, truncated.
    """
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
    """Keep the largest components of a step."""
    if rank == step.left.shape[1]:
        return step
    basis = None if step.basis is None else step.basis[:, : rank + OVERSAMPLING]
    return LowRankStep(step.left[:, :rank], step.right[:rank, :], basis, math.inf)
