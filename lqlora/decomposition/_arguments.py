"""Checks of the arguments of a decomposition, made before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from lqlora import ops
from lqlora._dispatch import FLOATS, namespace, plain_array
from lqlora._messages import given
from lqlora._options import is_integer, require_choice, require_integer, require_kind, require_number
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.formats import BlockFormat
from lqlora.quantized import Fit
from lqlora.quantized.quantization import with_fitted_levels
from lqlora.weighting import LowRankStep
from lqlora.weighting.base import largest_magnitude

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.decomposition.result import Decomposition
    from lqlora.weighting import AbstractWeighting, MeasuredNorm

__all__ = [
    "check_options",
    "check_scaling",
    "checked_continuation",
    "checked_matrix",
    "checked_norm",
    "checked_rank",
    "checked_start",
]

#: Range of the largest magnitude of a matrix. Values decode to float32. Below 2**-136 a subnormal number has fewer than 13
#: bits, and rounding to it is seen in the error; above 2**127 a low-rank part that exceeds the matrix by a factor of two would overflow.
_SMALLEST, _LARGEST = 2.0**-136, 2.0**127

#: Range of the binary exponent of the squared norm of a matrix, so that squared errors are normal numbers of float64: those
#: 2**64 times smaller than the norm, which float32 factors do not reach, and those 2**20 times larger.
_LEAST_EXPONENT, _MOST_EXPONENT = -1022 + 64, 1024 - 20


def checked_matrix(w: Array, name: str) -> Array:
    """Return a matrix in float32 or float64; raise unless it has two dimensions and finite entries that float32 holds."""
    matrix = ops.widen(plain_array(w, name, FLOATS), name)
    if len(matrix.shape) != 2:
        raise InvalidArgumentError(
            f"{name} must have two dimensions, got shape {tuple(matrix.shape)}. "
            "Use decompose_stack for stacks of matrices."
        )
    largest = largest_magnitude(matrix)
    if not largest < math.inf:  # NaN included
        ops.require_finite(matrix, name)
    if largest and not _SMALLEST <= largest <= _LARGEST:
        raise InvalidArgumentError(
            f"{name} must have a largest magnitude between {_SMALLEST:.2g} and {_LARGEST:.2g}, since it is stored by scales "
            f"and factors of float32, got {largest:.3g}. Multiply it by a power of two, and the results by its inverse."
        )
    return matrix


def checked_norm(weighting: AbstractWeighting, matrix: Array, name: str) -> MeasuredNorm:
    """Return the norm in a unit that suits the matrix; raise unless float64 holds its squared errors in the old unit."""
    found = weighting.measured(matrix)
    norm = found.squared_norm
    if not 0 <= norm < math.inf:
        raise NonFiniteError(f"weighting must give {name} a finite squared norm of at least 0, got {norm!r}.")
    exponent = math.frexp(norm)[1] + found.exponent
    if norm and not _LEAST_EXPONENT <= exponent <= _MOST_EXPONENT:
        least, most = (_power_of_ten(limit) for limit in (_LEAST_EXPONENT, _MOST_EXPONENT))
        raise InvalidArgumentError(
            f"weighting must give {name} a squared norm between {least} and {most}, so that float64 holds its squared "
            f"errors, got about {_power_of_ten(exponent)}. Multiply the importance by a power of two: this changes no "
            "relative error."
        )
    return found


def check_scaling(scaling: float, matrix: Array, name: str) -> None:
    """Raise unless float32 holds the scaling, and the low-rank part divided by it."""
    # lora_B @ lora_A is the low-rank part divided by the scaling, and entries of the low-rank part are at most about as large
    # as those of the matrix: their quotients must be normal numbers of float32. A scaling of 1 changes nothing.
    largest = largest_magnitude(matrix) or 1.0
    least, most = max(2.0**-126, largest * 2.0**-127), min(2.0**127, max(1.0, largest * 2.0**126))
    if not least <= scaling <= most:
        raise InvalidArgumentError(
            f"scaling must be between {least:.2g} and {most:.2g} for {name} with a largest magnitude of {largest:.3g}, "
            f"so that float32 holds the product of lora_B and lora_A, got {scaling!r}."
        )


def _power_of_ten(exponent: int) -> str:
    """Return a power of two as the nearest power of ten, as text: it may be beyond float64."""
    return f"1e{exponent * math.log10(2):+.0f}"


def checked_rank(matrix: Array, rank: int, init_rank: int | None, name: str, *, clip_rank: bool) -> tuple[int, int]:
    """Return the rank that the matrix can have, and the rank of the starting approximation."""
    limit = min(matrix.shape)
    if not is_integer(rank) or rank < 0 or (rank > limit and not clip_rank):
        hint = " Pass clip_rank=True to pad the factors with zeros." if is_integer(rank) and rank > limit else ""
        raise InvalidArgumentError(
            f"rank must be an integer between 0 and {limit} (the smaller side of {name}), got {given(rank)}.{hint}"
        )
    used = int(min(rank, limit))
    if init_rank is None:
        return used, used
    if not is_integer(init_rank) or not 0 <= init_rank <= rank:
        raise InvalidArgumentError(
            f"init_rank must be an integer between 0 and rank, which is {rank}, got {given(init_rank)}."
        )
    return used, int(min(init_rank, used))


def checked_start(start: LowRankStep | tuple[Array, Array], matrix: Array, init: str) -> LowRankStep:
    """Return the low-rank part to start from, in the dtype of the matrix; raise unless its shapes match."""
    _require_svd(init)
    if isinstance(start, LowRankStep):
        step = start
    elif isinstance(start, tuple) and len(start) == 2:
        step = LowRankStep(start[0], start[1], None, math.inf)
    else:
        found = f"a tuple of {len(start)}" if isinstance(start, tuple) else type(start).__name__
        raise InvalidArgumentError(
            f"start must be a Decomposition, a pair (lora_B, lora_A) or a LowRankStep, got {found}."
        )
    step = step._replace(
        left=plain_array(step.left, "lora_B of start", FLOATS), right=plain_array(step.right, "lora_A of start", FLOATS)
    )
    xp = namespace(matrix, step.left, step.right)
    shapes = tuple(step.left.shape), tuple(step.right.shape)
    if [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1], shapes[0][1]) != (
        *matrix.shape,
        shapes[1][0],
    ):
        rows, columns = matrix.shape
        raise InvalidArgumentError(
            f"start must hold factors of shapes ({rows}, k) and (k, {columns}), got {shapes[0]} and {shapes[1]}."
        )
    left, right = (xp.astype(factor, matrix.dtype) for factor in (step.left, step.right))
    ops.require_finite(left, "lora_B")
    ops.require_finite(right, "lora_A")
    return step._replace(left=left, right=right)


def checked_continuation(
    start: Decomposition, matrix: Array, fmt: BlockFormat, ranks: tuple[int, int], fit: Fit, init: str
) -> LowRankStep:
    """Return the low-rank part of a decomposition to continue, in the dtype of the matrix; raise unless it is one of the matrix.

    ``ranks`` are the rank that was asked for, and the rank without padding.
    """
    _require_svd(init)
    rank, used = ranks
    expected = with_fitted_levels(fmt) if fit == "levels+scale" else fmt
    found = start.quantized.format, start.quantized.shape, start.rank
    if found != (expected, tuple(matrix.shape), rank):
        raise InvalidArgumentError(
            f"start must have format {expected}, shape {tuple(matrix.shape)} and rank {rank} to be continued, got {found[0]}, "
            f"{found[1]} and {found[2]}. To start from its factors alone, pass (lora_B, lora_A)."
        )
    namespace(matrix, start.quantized.packed)  # raises if the two are of different libraries
    share = float(start.scaling) ** 0.5  # in both factors, as in the result
    step = LowRankStep(start.lora_B[:, :used] * share, start.lora_A[:used, :] * share, None, math.inf)
    return checked_start(step, matrix, init)


def _require_svd(init: str) -> None:
    if init != "svd":
        raise InvalidArgumentError(
            f"start needs init='svd', whose SVD it replaces, got init={init!r}. Drop one of the two."
        )


def check_options(
    *,
    quantizer: object,
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
    callback: Callable[[int, float], bool | None] | None,
) -> None:
    """Raise if an option is out of range; comparisons are written so that NaN is refused, too."""
    if not callable(quantizer):
        require_choice(quantizer, "quantizer", ("nearest", "gptq"))
    require_choice(init, "init", ("svd", "quantize", "zero"))
    require_choice(fit, "fit", get_args(Fit))
    require_integer(max_iter, "max_iter", 1)
    for name, value in (("rtol", rtol), ("target", target), ("time_limit", time_limit)):
        if value is not None or name == "rtol":
            require_number(value, name, "at least 0", lambda own: own >= 0)
    require_number(scaling, "scaling", "positive and finite", lambda own: 0 < own < math.inf)
    require_integer(seed, "seed")
    if extrapolation is not None:
        require_number(extrapolation, "extrapolation", "between 0 and 1", lambda own: 0 <= own <= 1)
    if callback is not None:
        require_kind(callback, "callback", Callable, "a function")  # type: ignore[arg-type]
    if factor_format is not None:
        require_kind(
            factor_format, "factor_format", BlockFormat, "a BlockFormat, such as BlockFormat.parse('nf4/64:float32')"
        )
