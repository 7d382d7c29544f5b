r"""The alternating decomposition ``W ≈ Q + scaling * lora_B @ lora_A``.

LQ-LoRA and LoftQ are two choices of one alternation: quantize what the low-rank part leaves, then approximate what the
quantized part leaves. They differ in where they start. Here each iterate ends with the low-rank step, so that its
factors are fitted to its own ``Q``, and the best iterate is returned, not the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import array_api_compat
import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError
from lqlora.quantized import QuantizedArray, dequantize, quantize
from lqlora.weighting import AbstractWeighting, Uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat

__all__ = ["Decomposition", "Init", "StopReason", "decompose"]

Init: TypeAlias = Literal["svd", "quantize", "zero"]
StopReason: TypeAlias = Literal["converged", "max_iter", "target", "rank_zero", "callback"]

#: Iterations in a row that must bring less than ``rtol`` together before the alternation counts as converged. One is
#: too few: the error of an alternation is not monotone, since the quantizer minimizes no norm of the whole residual.
_PATIENCE = 3


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A quantized matrix and its low-rank factors, with the history of how they were found.

    Parameters
    ----------
    quantized : QuantizedArray of shape (m, n)
        The frozen part.
    lora_A : array of float32, shape (rank, n)
        Right factor.
    lora_B : array of float32, shape (m, rank)
        Left factor.
    scaling : float
        Factor of the product: the matrix is ``dequantize(quantized) + scaling * lora_B @ lora_A``.
    errors : tuple of float
        Relative weighted errors. Entry 0 is quantization alone (rank 0), entry 1 adds one SVD of its residual, the
        rest are the iterates.
    best : int
        Index into ``errors`` of the pair that is returned.
    stop_reason : {"converged", "max_iter", "target", "rank_zero", "callback"}
        Why the alternation ended; ``"rank_zero"`` if there was none, as for rank 0 and ``init="zero"``.
    squared_error : float
        Weighted sum of squares of the residual of the returned pair, not divided by anything.
    """

    quantized: QuantizedArray
    lora_A: Array
    lora_B: Array
    scaling: float
    errors: tuple[float, ...]
    best: int
    stop_reason: StopReason
    squared_error: float

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return int(self.lora_A.shape[0])

    @property
    def relative_error(self) -> float:
        """Weighted norm of the residual, divided by the weighted norm of the matrix."""
        return self.errors[self.best]

    def reconstruct(self) -> Array:
        """Return the dense approximation.

        Returns
        -------
        array of float32, shape (m, n)
            ``dequantize(quantized) + scaling * lora_B @ lora_A``.
        """
        return dequantize(self.quantized) + ops.low_rank_product(self.lora_B, self.lora_A, self.scaling)


class _Iterate(NamedTuple):
    quantized: QuantizedArray
    lora_A: Array
    lora_B: Array
    product: Array | None
    squared_error: float


class _Target(NamedTuple):
    """What does not change during an alternation."""

    matrix: Array
    fmt: BlockFormat
    rank: int
    weighting: AbstractWeighting
    scaling: float
    seed: int
    name: str
    unit: float


def decompose(
    w: Array,
    fmt: BlockFormat,
    rank: int,
    *,
    weighting: AbstractWeighting | None = None,
    init: Init = "svd",
    max_iter: int = 100,
    rtol: float = 1e-3,
    target: float | None = None,
    scaling: float = 1.0,
    seed: int = 0,
    callback: Callable[[int, float], bool | None] | None = None,
    name: str = "the matrix",
) -> Decomposition:
    """Split a matrix into a quantized and a low-rank part, by alternating between the two.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, n)
        The matrix.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part, 0 to ``min(m, n)``. At rank 0 this is plain quantization.
    weighting : AbstractWeighting, optional
        Norm of the residual to minimize; every entry counts the same if not given.
    init : {"svd", "quantize", "zero"}
        ``"svd"`` starts from the best low-rank approximation of ``w`` (LQ-LoRA), ``"quantize"`` from the quantized
        ``w`` (LoftQ), ``"zero"`` quantizes ``w`` and leaves the product of the factors at zero (QLoRA): ``lora_B`` is
        zero and ``lora_A`` uniform noise, ready to be trained.
    max_iter : int, default 100
        Largest number of iterations, at least 1.
    rtol : float, default 1e-3
        Stop when three iterations together lower the error by less than this fraction. 0 stops early only at no error.
    target : float, optional
        Stop as soon as the relative error is at most this.
    scaling : float, default 1.0
        ``lora_alpha / rank`` of the adapter that will hold the factors; it is divided out of them, so the matrix is
        approximated whatever its value.
    seed : int, default 0
        Of the randomized SVD, and of the noise under ``init="zero"``.
    callback : callable, optional
        Called with the iteration and its relative error; a true return value stops.
    name : str, optional
        What the matrix is, for errors.

    Returns
    -------
    Decomposition
        The best pair seen. Its weighted error is never above that of quantization alone nor above that of quantization
        plus one SVD of the residual (except under ``init="zero"``, which is quantization alone).

    Raises
    ------
    InvalidArgumentError
        If the rank, the shape, the scaling, a tolerance or the number of iterations is out of range, or the weighting
        does not fit.
    NonFiniteError
        If the matrix holds NaN or infinity.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, algorithm 1; LoftQ, arXiv 2310.08659, algorithm 1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    >>> d = lq.decompose(w, lq.BlockFormat.parse("nf3/64:float32"), rank=8)
    >>> d.relative_error < d.errors[0]
    True
    """
    matrix = _checked_matrix(w, rank, max_iter, scaling, init, seed, name)
    weighting = Uniform() if weighting is None else weighting
    if not isinstance(weighting, AbstractWeighting):
        raise InvalidArgumentError(f"A weighting is one of lqlora.weighting, not {type(weighting).__name__}.")
    weighting.check(tuple(matrix.shape))
    if not rtol >= 0 or (target is not None and not target >= 0):
        raise InvalidArgumentError(f"rtol and target are at least 0, not {rtol!r} and {target!r}.")
    unit = _unit(weighting.scale(matrix))
    goal = _Target(matrix, fmt, rank, weighting, scaling, seed, name, unit)
    norm = weighting.squared_norm(matrix)
    watch = _Watch(norm, rtol, target, callback)
    stop: StopReason | None = None
    for iterate in _iterates(goal, init, max_iter):
        stop = watch.see(iterate)
        if stop is not None:
            break
    if stop is None:
        stop = "max_iter" if rank and init != "zero" else "rank_zero"
    best = watch.best_iterate
    return Decomposition(
        best.quantized, best.lora_A, best.lora_B, scaling, tuple(watch.errors), watch.best, stop, best.squared_error
    )


class _Watch:
    """Keeps the best iterate, and decides when to stop."""

    def __init__(
        self, norm: float, rtol: float, target: float | None, callback: Callable[[int, float], bool | None] | None
    ) -> None:
        self._norm, self._rtol, self._target, self._callback = norm, rtol, target, callback
        self.errors: list[float] = []
        self._lowest: list[float] = []
        self.best = 0
        self.best_iterate: _Iterate

    def see(self, iterate: _Iterate) -> StopReason | None:
        # A matrix of norm zero is represented exactly, unless the weighting is zero: both count as no error.
        error = (iterate.squared_error / self._norm) ** 0.5 if self._norm > 0 else 0.0
        self.errors.append(error)
        if len(self.errors) == 1 or error < self.errors[self.best]:
            self.best, self.best_iterate = len(self.errors) - 1, iterate
        self._lowest.append(self.errors[self.best])
        if self._callback is not None and self._callback(len(self.errors) - 1, error):
            return "callback"
        if self._target is not None and error <= self._target:
            return "target"
        return "converged" if self._stalled() else None

    def _stalled(self) -> bool:
        if len(self._lowest) < _PATIENCE + 3:  # the two safeguards are no iterations
            return False
        return (
            self._lowest[-1] == 0.0 or self._lowest[-1 - _PATIENCE] - self._lowest[-1] < self._rtol * self._lowest[-1]
        )


def _iterates(goal: _Target, init: Init, max_iter: int) -> Iterator[_Iterate]:
    """Yield quantization alone, then one SVD of its residual, then the alternation from the chosen start."""
    first = quantize(goal.matrix, goal.fmt, check_finite=False, name=goal.name)
    yield _rank_zero(goal, first)
    if goal.rank == 0 or init == "zero":
        return
    iterate, basis = _refit(goal, first, None)
    yield iterate
    product = iterate.product
    if init == "svd":
        factors = _low_rank(goal, goal.matrix, None)
        product, basis = ops.low_rank_product(factors[1], factors[0], goal.scaling), factors[2]
    for _ in range(max_iter - (init == "quantize")):
        # The residual may overflow the range of narrow scales although the matrix did not: check again.
        quantized = quantize(goal.matrix - product, goal.fmt, name=goal.name)
        iterate, basis = _refit(goal, quantized, basis)
        product = iterate.product
        yield iterate


def _rank_zero(goal: _Target, quantized: QuantizedArray) -> _Iterate:
    """Return quantization alone. Its ``lora_A`` is noise: with both factors zero neither would ever get a gradient."""
    xp = namespace(goal.matrix)
    rows, columns = goal.matrix.shape
    device = array_api_compat.device(goal.matrix)
    # As PEFT initializes lora_A: uniform within the reciprocal root of the number of inputs.
    lora_A = np.random.default_rng(goal.seed).uniform(-1, 1, (goal.rank, columns)) / max(columns, 1) ** 0.5
    squared_error = goal.weighting.squared_norm(goal.matrix - dequantize(quantized))
    return _Iterate(
        quantized,
        xp.asarray(lora_A, dtype=xp.float32, device=device),
        xp.zeros((rows, goal.rank), dtype=xp.float32, device=device),
        None,
        squared_error,
    )


def _refit(goal: _Target, quantized: QuantizedArray, basis: Array | None) -> tuple[_Iterate, Array]:
    residual = goal.matrix - dequantize(quantized)
    lora_A, lora_B, basis = _low_rank(goal, residual, basis)
    product = ops.low_rank_product(lora_B, lora_A, goal.scaling)
    squared_error = goal.weighting.squared_norm(residual - product)
    return _Iterate(quantized, lora_A, lora_B, product, squared_error), basis


def _low_rank(goal: _Target, residual: Array, basis: Array | None) -> tuple[Array, Array, Array]:
    """Return float32 factors with the scaling divided out, and the subspace to start the next step from."""
    xp = namespace(residual)
    scaled = goal.weighting.scale(residual)
    svd = ops.subspace_svd(scaled if goal.unit == 1.0 else scaled / goal.unit, goal.rank, seed=goal.seed, start=basis)
    root = xp.sqrt(svd.values)
    left, right = _balanced(*goal.weighting.unscale(svd.left * root[None, :], svd.right * root[:, None]))
    share = (goal.unit / goal.scaling) ** 0.5
    return xp.astype(right * share, xp.float32), xp.astype(left * share, xp.float32), svd.basis


def _unit(scaled: Array) -> float:
    """Return a power of four near the largest entry if squares of entries might leave the range of float32, else 1."""
    xp = namespace(scaled)
    largest = float(xp.max(xp.abs(scaled))) if min(scaled.shape) else 0.0
    if largest == 0.0 or 2.0**-40 < largest < 2.0**40:
        return 1.0
    return 4.0 ** round(math.log(largest, 4))


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Give both factors of each component the same norm.

    Weights stretch one side more than the other, by orders of magnitude for Fisher information. The product does not
    care, but an optimizer that moves every entry by the same step would destroy the shorter factor.
    """
    xp = namespace(left, right)
    norms = xp.sqrt(xp.sum(left * left, axis=0)), xp.sqrt(xp.sum(right * right, axis=1))
    positive = (norms[0] > 0) & (norms[1] > 0)
    ones = xp.ones_like(norms[0])
    ratio = xp.sqrt(xp.where(positive, norms[1], ones) / xp.where(positive, norms[0], ones))
    return left * ratio[None, :], right / ratio[:, None]


def _checked_matrix(w: Array, rank: int, max_iter: int, scaling: float, init: str, seed: int, name: str) -> Array:
    matrix = ops.widen(w, name)
    if len(matrix.shape) != 2:
        raise InvalidArgumentError(f"{name} has {len(matrix.shape)} dimensions; a decomposition needs two.")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= min(matrix.shape):
        raise InvalidArgumentError(f"Rank {rank!r} of {name} is no int from 0 to {min(matrix.shape)}.")
    if not isinstance(max_iter, int) or max_iter < 1:
        raise InvalidArgumentError(f"max_iter is at least 1, not {max_iter!r}.")
    if not 0 < scaling < float("inf"):
        raise InvalidArgumentError(f"scaling is positive and finite, not {scaling!r}.")
    if seed < 0:
        raise InvalidArgumentError(f"seed is at least 0, not {seed!r}.")
    if init not in ("svd", "quantize", "zero"):
        raise InvalidArgumentError(f"init is 'svd', 'quantize' or 'zero', not {init!r}.")
    ops.require_finite(matrix, name)
    return matrix
