r"""The alternation: quantize what the low-rank part leaves, then approximate what the quantized part leaves.

LQ-LoRA, LoftQ and their relatives are choices of this one loop: where it starts, which norm it lowers, how it quantizes
and when it stops. Each iterate ends with the low-rank step, so that its factors are fitted to its own ``Q``, and the
best iterate is returned, not the last.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.decomposition._arguments import check_options, checked_matrix, checked_rank, checked_start
from lqlora.decomposition._stopping import Watch
from lqlora.decomposition.iteration import remainder, residual_of
from lqlora.decomposition.quantizers import make_quantizer
from lqlora.decomposition.result import Decomposition
from lqlora.errors import InvalidArgumentError
from lqlora.quantized import QuantizedArray, dequantize, quantize
from lqlora.weighting import AbstractWeighting, Uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora._typing import Array
    from lqlora.decomposition.quantizers import Quantizer, QuantizerName
    from lqlora.formats import BlockFormat
    from lqlora.quantized import Fit
    from lqlora.weighting import LowRankStep

__all__ = ["Init", "decompose"]

Init: TypeAlias = Literal["svd", "quantize", "zero"]

#: How far the low-rank part is carried on in the direction of its last change before the next quantization. Measured on
#: matrices of a language model: nearest rounding under a fit lowers the error by itself, and takes more. Absolute maxima
#: at two bits do not lower it reliably, and take none.
_EXTRAPOLATION = 0.75
_FITTED = 0.95

#: Steps that the factors of the returned pair are refined by. Two find what is left to be found.
_REFITS = 2

#: A refit that lowers the squared error by less than this fraction is the last.
_REFIT_GAIN = 1e-3

#: Relative error of quantization alone above which codes change so much from iterate to iterate that the low-rank step
#: takes two rounds to follow: two bits.
_COARSE = 0.3


def decompose(
    w: Array,
    fmt: BlockFormat,
    rank: int,
    *,
    weighting: AbstractWeighting | None = None,
    init: Init = "svd",
    init_rank: int | None = None,
    start: LowRankStep | tuple[Array, Array] | None = None,
    quantizer: QuantizerName | Quantizer = "nearest",
    fit: Fit = "absmax",
    extrapolation: float | None = None,
    max_iter: int = 100,
    rtol: float = 1e-3,
    target: float | None = None,
    time_limit: float | None = None,
    scaling: float = 1.0,
    factor_format: BlockFormat | None = None,
    clip_rank: bool = False,
    seed: int = 0,
    callback: Callable[[int, float], bool | None] | None = None,
    name: str = "the matrix",
) -> Decomposition:
    r"""Split a matrix into a quantized and a low-rank part, by alternating between the two.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, n)
        The matrix, outputs by inputs. A view of one stored the other way round, as in ``Conv1D``, is as good.
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
    init_rank : int, optional
        Rank of the approximation that ``init="svd"`` starts from, 0 to ``rank``; ``rank`` if not given. Between the two
        it splits the rank: part is kept back from the quantizer, the rest is left to repair what it does.
    start : tuple of arrays of shapes (m, k) and (k, n), optional
        ``lora_B`` and ``lora_A`` of a similar decomposition with a scaling of 1, for ``init="svd"`` to start from their
        product instead of an approximation of ``w``. What ``weighting.low_rank(w, rank, seed=seed)`` returned serves,
        too: it is what would be computed, so that many formats can share it.
    quantizer : {"nearest", "gptq"} or callable
        ``"nearest"`` rounds every entry by itself (:func:`lqlora.quantize`), ``"gptq"`` feeds errors back
        (:func:`lqlora.gptq`; it needs a weighting with the second moment of the inputs). A callable takes the matrix to
        quantize and what it returned for the iterate it goes on from (None for the first), and returns a
        QuantizedArray.
    fit : {"absmax", "scale", "levels+scale"}
        How scales and levels are chosen, see :func:`lqlora.quantize`; by squares of errors that the weighting weighs
        entry by entry. From the second iterate on they are fitted from those of the iterate it goes on from.
    extrapolation : float, optional
        How far the low-rank part is carried on, in the direction of its last change, before it is subtracted for the
        next quantization: 1 repeats the change. It is halved whenever the error rises, and the alternation then goes
        on from the best iterate. 0 is the plain alternation of the papers, which goes on from wherever it is. If not
        given, 0.95 for nearest rounding under a fit; else 0.75, or 0 where quantization alone leaves an error above
        0.3.
    max_iter : int, default 100
        Largest number of iterations, at least 1.
    rtol : float, default 1e-3
        Stop when three iterations together lower the error by less than this fraction. 0 stops early only where
        nothing can follow: at no error, or when a plain step from the best iterate fails.
    target : float, optional
        Stop as soon as the relative error is at most this.
    time_limit : float, optional
        Stop after the first iteration that ends later than this, in seconds from the call.
    scaling : float, default 1.0
        ``lora_alpha / rank`` of the adapter that will hold the factors (with rsLoRA, ``lora_alpha / rank**0.5``); it is
        divided out of them, so the matrix is approximated whatever its value.
    factor_format : BlockFormat, optional
        Quantize the factors, too, at the end. ``lora_A`` and ``lora_B`` are then what ``factors`` decode to, and the
        matrix is quantized once more beside them if that lowers the error.
    clip_rank : bool, default False
        Allow a rank above ``min(m, n)``: the factors then have rows and columns of zeros beyond it.
    seed : int, default 0
        Of the randomized SVD, and of the noise under ``init="zero"``.
    callback : callable, optional
        Called with the iteration and its relative error; a true return value stops.
    name : str, optional
        What the matrix is, for errors.

    Returns
    -------
    Decomposition
        The best pair seen, its factors refitted. Its weighted error is never above that of quantization alone nor
        above that of quantization plus one SVD of the residual (except under ``init="zero"``, which is quantization
        alone, where it is stopped before that, and up to the rounding of factors that are quantized).

    Raises
    ------
    InvalidArgumentError
        If the rank, the shape, the scaling, a tolerance or the number of iterations is out of range, or the weighting
        or the quantizer does not fit.
    NonFiniteError
        If the matrix holds NaN or infinity.

    Notes
    -----
    It lowers :math:`\lVert W - Q - BA \rVert` over :math:`Q` and :math:`BA` in turns. Plain alternation creeps: what
    changes in :math:`BA` from one iterate to the next keeps its direction. Quantizing
    :math:`W - B_k A_k - \beta (B_k A_k - B_{k-1} A_{k-1})` instead needs an eighth to a third of the iterations, and ends lower
    (``benchmarks/alternation.py``).
    The low-rank step starts from the subspace of the iterate before.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, algorithm 1; LoftQ, arXiv 2310.08659, algorithm 1; CALDERA, arXiv 2405.18886, for keeping
    the best iterate and for quantized factors; SRR, arXiv 2602.02001, for splitting the rank. The extrapolation is
    ours.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    >>> d = lq.decompose(w, lq.BlockFormat.parse("nf3/64:float32"), rank=8)
    >>> d.relative_error < d.errors[0]
    True
    """
    matrix = checked_matrix(w, name)
    used, init_rank = checked_rank(matrix, rank, init_rank, name, clip_rank=clip_rank)
    check_options(
        init=init,
        fit=fit,
        max_iter=max_iter,
        rtol=rtol,
        target=target,
        time_limit=time_limit,
        scaling=scaling,
        seed=seed,
        extrapolation=extrapolation,
        factor_format=factor_format,
    )
    rank, max_iter, seed = int(rank), int(max_iter), int(seed)  # NumPy's are integers, too
    weighting = Uniform() if weighting is None else weighting
    if not isinstance(weighting, AbstractWeighting):
        raise InvalidArgumentError(f"A weighting is one of lqlora.weighting, not {type(weighting).__name__}.")
    weighting.check(tuple(matrix.shape))
    if extrapolation is None and quantizer == "nearest" and fit != "absmax":
        extrapolation = _FITTED
    kept = None if start is None else checked_start(start, matrix, init)
    goal = _Goal(matrix, used, weighting, make_quantizer(quantizer, fmt, fit, weighting, name), seed)
    norm = weighting.squared_norm(matrix)
    watch: Watch[_Iterate] = Watch(norm, rtol, target, time_limit, callback)
    for iterate in _iterates(goal, norm, init, init_rank if kept is None else kept, max_iter, extrapolation):
        if watch.see(iterate, iterate.squared_error):
            break
    else:
        every = 1 + (init == "svd") + max_iter  # safeguards and iterations
        watch.reason = "max_iter" if len(watch.errors) == every else "converged"
        if used == 0 or init == "zero":
            watch.reason = "rank_zero"
    best = _refitted(goal, watch.best_iterate)
    return _finished(goal, best, watch, scaling, rank, factor_format)


class _Goal(NamedTuple):
    """What does not change during an alternation."""

    matrix: Array
    rank: int
    weighting: AbstractWeighting
    quantizer: Quantizer
    seed: int
    is_coarse: bool = False


class _Iterate(NamedTuple):
    """A quantized part, and what approximates its residual: nothing for quantization alone."""

    quantized: QuantizedArray
    step: LowRankStep | None
    squared_error: float


def _iterates(
    goal: _Goal, norm: float, init: Init, kept: LowRankStep | int, max_iter: int, extrapolation: float | None
) -> Iterator[_Iterate]:
    """Yield quantization alone, then one SVD of its residual, then the alternation from the chosen start."""
    first = goal.quantizer(goal.matrix, None)
    residual = residual_of(goal.matrix, first)
    alone = goal.weighting.squared_norm(residual)
    yield _Iterate(first, None, alone)
    if goal.rank == 0 or init == "zero":
        return
    goal = goal._replace(is_coarse=alone > _COARSE**2 * norm)
    if extrapolation is None:
        extrapolation = 0.0 if goal.is_coarse else _EXTRAPOLATION
    step = goal.weighting.low_rank(residual, goal.rank, seed=goal.seed)
    iterate = _Iterate(first, step, step.squared_error)
    yield iterate
    if init == "quantize":
        yield from _alternate(goal, step, iterate, max_iter - 1, extrapolation)
        return
    if isinstance(kept, int):
        kept = goal.weighting.low_rank(goal.matrix, kept, seed=goal.seed)
    # Of the two bases one is as wide as the steps to come.
    previous = kept if kept.basis is not None and kept.left.shape[1] == goal.rank else step
    yield from _alternate(goal, kept, _Iterate(first, previous, math.inf), max_iter, extrapolation)


def _alternate(
    goal: _Goal, kept: LowRankStep, best: _Iterate, max_iter: int, extrapolation: float
) -> Iterator[_Iterate]:
    """Yield iterates; where one is worse than the best, go back there with half the extrapolation.

    Plain alternation, without any, never goes back: that is what the papers do.

    Parameters
    ----------
    goal : _Goal
        What to approximate.
    kept : LowRankStep
        Low-rank part to begin with.
    best : _Iterate
        What the first steps start from.
    max_iter : int
        Largest number of iterates.
    extrapolation : float
        See :func:`decompose`.
    """
    former, is_plain = None, extrapolation == 0
    for _ in range(max_iter):
        quantized = goal.quantizer(remainder(goal.matrix, kept, former, extrapolation), best.quantized)
        iterate = _approximated(goal, quantized, best.step)
        if goal.is_coarse or (iterate.squared_error >= best.squared_error and not is_plain):
            iterate = _approximated(goal, quantized, iterate.step)
        yield iterate
        if is_plain or iterate.squared_error < best.squared_error:
            assert iterate.step is not None  # only quantization alone has none
            former, kept, best = None if is_plain else kept, iterate.step, iterate
        elif former is None and best.squared_error < math.inf:
            return  # once more would be the same
        else:
            former, extrapolation = None, extrapolation / 2


def _approximated(goal: _Goal, quantized: QuantizedArray, previous: LowRankStep | None) -> _Iterate:
    residual = residual_of(goal.matrix, quantized)
    step = goal.weighting.low_rank(residual, goal.rank, previous=previous, seed=goal.seed)
    return _Iterate(quantized, step, step.squared_error)


def _refitted(goal: _Goal, best: _Iterate) -> _Iterate:
    """Return the best pair, its factors brought closer to the best for its quantized part and its error measured."""
    if best.step is None:
        return best
    for _ in range(_REFITS):
        again = _approximated(goal, best.quantized, best.step)
        gained = best.squared_error - again.squared_error
        best = again if gained > 0 else best
        if gained < _REFIT_GAIN * best.squared_error:
            break
    assert best.step is not None  # nor is it after a refit
    # A step may tell its error as a difference; what is returned is told exactly.
    rest = residual_of(goal.matrix, best.quantized) - best.step.left @ best.step.right
    return best._replace(squared_error=goal.weighting.squared_norm(rest))


def _finished(
    goal: _Goal, best: _Iterate, watch: Watch[_Iterate], scaling: float, rank: int, factor_format: BlockFormat | None
) -> Decomposition:
    """Return the best pair as the factors of an adapter."""
    if best.step is None:
        lora_A, lora_B = _fresh_factors(goal, rank)
    else:
        share = scaling**-0.5
        lora_A, lora_B = _padded(best.step.right * share, rank, 0), _padded(best.step.left * share, rank, 1)
    factors = None
    if factor_format is not None:
        best, factors = _with_quantized_factors(goal, best, lora_A, lora_B, scaling, factor_format)
        lora_A, lora_B = (dequantize(factor) for factor in factors)
    watch.improve(best.squared_error)
    return Decomposition(
        best.quantized,
        lora_A,
        lora_B,
        scaling,
        tuple(watch.errors),
        watch.best,
        watch.reason,
        best.squared_error,
        factors,
    )


def _with_quantized_factors(
    goal: _Goal, best: _Iterate, lora_A: Array, lora_B: Array, scaling: float, fmt: BlockFormat
) -> tuple[_Iterate, tuple[QuantizedArray, QuantizedArray]]:
    """Quantize the factors, and the matrix once more beside them: its errors make up for some of theirs."""
    factors = quantize(lora_A, fmt, name="lora_A"), quantize(lora_B, fmt, name="lora_B")
    rest = goal.matrix - ops.low_rank_product(dequantize(factors[1]), dequantize(factors[0]), scaling)
    tried = [
        _Iterate(quantized, best.step, goal.weighting.squared_norm(rest - dequantize(quantized)))
        for quantized in (best.quantized, goal.quantizer(rest, best.quantized))
    ]
    return min(tried, key=lambda iterate: iterate.squared_error), factors


def _fresh_factors(goal: _Goal, rank: int) -> tuple[Array, Array]:
    """Return factors whose product is zero. ``lora_A`` is noise: with both at zero neither would ever get a gradient."""
    xp = namespace(goal.matrix)
    rows, columns = goal.matrix.shape
    device = device_of(goal.matrix)
    # As PEFT initializes lora_A: uniform within the reciprocal root of the number of inputs.
    lora_A = np.random.default_rng(goal.seed).uniform(-1, 1, (rank, columns)) / max(columns, 1) ** 0.5
    return (
        xp.asarray(lora_A, dtype=xp.float32, device=device),
        xp.zeros((rows, rank), dtype=xp.float32, device=device),
    )


def _padded(factor: Array, rank: int, axis: int) -> Array:
    """Return a factor as float32, with zeros beyond the rank that the matrix has."""
    xp = namespace(factor)
    factor = xp.astype(factor, xp.float32)
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = tuple(missing if own == axis else size for own, size in enumerate(factor.shape))
    return xp.concat([factor, xp.zeros(shape, dtype=xp.float32, device=device_of(factor))], axis=axis)
