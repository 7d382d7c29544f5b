"""Looking at the arguments of a decomposition before any work is done."""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.weighting import LowRankStep

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["check_options", "checked_matrix", "checked_rank", "checked_start"]


def checked_matrix(w: Array, name: str) -> Array:
    """Return a finite matrix of float32 or float64."""
    matrix = ops.widen(w, name)
    if len(matrix.shape) != 2:
        raise InvalidArgumentError(f"{name} has {len(matrix.shape)} dimensions; a decomposition needs two.")
    ops.require_finite(matrix, name)
    return matrix


def checked_rank(matrix: Array, rank: int, init_rank: int | None, name: str, *, clip_rank: bool) -> tuple[int, int]:
    """Return the rank that the matrix can have, and that of the start."""
    limit = min(matrix.shape)
    if not _is_int(rank) or rank < 0 or (rank > limit and not clip_rank):
        hint = f": clip_rank=True pads the factors with zeros beyond {limit}" if _is_int(rank) and rank > limit else ""
        raise InvalidArgumentError(f"Rank {rank!r} of {name} is no int from 0 to {limit}{hint}.")
    used = int(min(rank, limit))
    if init_rank is None:
        return used, used
    if not _is_int(init_rank) or not 0 <= init_rank <= rank:
        raise InvalidArgumentError(f"init_rank is an int from 0 to the rank of {rank}, not {init_rank!r}.")
    return used, int(min(init_rank, used))


def checked_start(start: LowRankStep | tuple[Array, Array], matrix: Array, init: str) -> LowRankStep:
    """Return the low-rank part to start from, in the dtype of the matrix."""
    if init != "svd":
        raise InvalidArgumentError(
            f"A start takes the place of an SVD of the matrix: it needs init='svd', not {init!r}."
        )
    if isinstance(start, LowRankStep):
        step = start
    elif isinstance(start, tuple) and len(start) == 2:
        step = LowRankStep(start[0], start[1], None, math.inf)
    else:
        raise InvalidArgumentError("A start is a pair of lora_B and lora_A, or a LowRankStep.")
    xp = namespace(matrix, step.left, step.right)
    shapes = tuple(step.left.shape), tuple(step.right.shape)
    if [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1], shapes[0][1]) != (
        *matrix.shape,
        shapes[1][0],
    ):
        raise InvalidArgumentError(f"Factors of {shapes[0]} and {shapes[1]} are no start for {tuple(matrix.shape)}.")
    left, right = (xp.astype(factor, matrix.dtype) for factor in (step.left, step.right))
    ops.require_finite(left, "lora_B")
    ops.require_finite(right, "lora_A")
    return step._replace(left=left, right=right)


def check_options(
    *,
    init: str,
    fit: str,
    max_iter: int,
    rtol: float,
    target: float | None,
    time_limit: float | None,
    scaling: float,
    seed: int,
    extrapolation: float | None,
    factor_format: BlockFormat | None,
) -> None:
    """Raise if an option is out of range."""
    if init not in ("svd", "quantize", "zero"):
        raise InvalidArgumentError(f"init is 'svd', 'quantize' or 'zero', not {init!r}.")
    if fit not in ("absmax", "scale", "levels+scale"):
        raise InvalidArgumentError(f"fit is 'absmax', 'scale' or 'levels+scale', not {fit!r}.")
    if not _is_int(max_iter) or max_iter < 1:
        raise InvalidArgumentError(f"max_iter is at least 1, not {max_iter!r}.")
    if not rtol >= 0 or (target is not None and not target >= 0):
        raise InvalidArgumentError(f"rtol and target are at least 0, not {rtol!r} and {target!r}.")
    if time_limit is not None and not time_limit >= 0:
        raise InvalidArgumentError(f"time_limit is at least 0 seconds, not {time_limit!r}.")
    if not 0 < scaling < float("inf"):
        raise InvalidArgumentError(f"scaling is positive and finite, not {scaling!r}.")
    if not _is_int(seed) or seed < 0:
        raise InvalidArgumentError(f"seed is an int of at least 0, not {seed!r}.")
    if extrapolation is not None and not 0 <= extrapolation <= 1:
        raise InvalidArgumentError(f"extrapolation is 0 to 1, not {extrapolation!r}.")
    if factor_format is not None and not isinstance(factor_format, BlockFormat):
        raise InvalidArgumentError(f"factor_format is a BlockFormat, not {factor_format!r}.")


def _is_int(value: object) -> bool:
    """Tell integers of Python and of NumPy from all else, truth values too."""
    return isinstance(value, Integral) and not isinstance(value, bool)
