r"""The alternating solver of ``W ≈ Q + B A``: quantize ``W - B A``, approximate ``W - Q`` by low rank, and repeat.

LQ-LoRA, LoftQ and their relatives are options of this one loop: the start, the norm, the quantizer and the stopping
rule. Each iterate ends with the low-rank step, so that its factors are the best for its own ``Q``. The best iterate is
returned, not the last.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.decomposition._arguments import (
    check_options,
    check_scaling,
    checked_continuation,
    checked_matrix,
    checked_norm,
    checked_rank,
    checked_start,
)
from lqlora.decomposition._stopping import StoppingRule
from lqlora.decomposition.iteration import remainder, residual_of
from lqlora.decomposition.quantizers import make_quantizer
from lqlora.decomposition.result import Decomposition
from lqlora.errors import InvalidArgumentError
from lqlora.quantized import QuantizedArray, dequantize, quantize
from lqlora.weighting import AbstractWeighting, Uniform
from lqlora.weighting.base import in_float64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora._typing import Array
    from lqlora.decomposition.quantizers import Quantizer, QuantizerName
    from lqlora.formats import BlockFormat
    from lqlora.quantized import Fit
    from lqlora.weighting import LowRankStep

__all__ = ["Init", "decompose"]

Init: TypeAlias = Literal["svd", "quantize", "zero"]

#: Default extrapolation beta, measured on matrices of a language model. Nearest rounding with a fit lowers the error in
#: each step and tolerates more of it. With absmax scales at two bits the error does not fall reliably in each step, so
#: the default there is 0.
_EXTRAPOLATION = 0.75
_FITTED = 0.95

#: Largest number of low-rank steps that refine the factors of the returned iterate.
_REFITS = 2

#: A refit that lowers the squared error by less than this fraction is the last.
_REFIT_GAIN = 1e-3

#: Change of a squared error by the rounding of factors to float32, relative to it, up to which it is not measured again.
_ROUNDED = 2.0**-10

#: Relative error of quantization alone above which the format is coarse, which in practice means two bits. Codes then
#: change so much from iterate to iterate that the low-rank step needs two rounds to follow.
_COARSE = 0.3


def decompose(
    w: Array,
    fmt: BlockFormat,
    rank: int,
    *,
    weighting: AbstractWeighting | None = None,
    init: Init = "svd",
    init_rank: int | None = None,
    start: Decomposition | LowRankStep | tuple[Array, Array] | None = None,
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
    name: str = "w",
) -> Decomposition:
    r"""Split a matrix into a quantized part and a low-rank part, by alternating between the two.

    The default options are LQ-LoRA with extrapolation; :mod:`lqlora.initializers` has the methods of papers by name.
    Use :func:`lqlora.decompose_stack` for several matrices in one array, and :func:`lqlora.nn.quantize_model` for a
    whole torch model.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, n)
        Matrix, outputs by inputs. It may be a transposed view, such as that of a ``Conv1D`` weight.
    fmt : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part, 0 to ``min(m, n)``. Rank 0 is plain quantization.
    weighting : AbstractWeighting, optional
        Norm of the residual to minimize; the Frobenius norm if not given.
    init : {"svd", "quantize", "zero"}
        ``"svd"`` starts from the best low-rank approximation of ``w`` (LQ-LoRA), ``"quantize"`` from the quantized
        ``w`` (LoftQ). ``"zero"`` quantizes ``w`` and does not alternate (QLoRA): ``lora_B`` is zero and ``lora_A``
        uniform noise, ready for training.
    init_rank : int, optional
        Rank of the approximation that ``init="svd"`` starts from, 0 to ``rank``; ``rank`` if not given. A smaller value
        splits the rank: the first part is subtracted before quantization, the rest corrects errors of quantization.
    start : Decomposition, or tuple of arrays of shapes (m, k) and (k, n), optional
        A Decomposition of this format and rank is continued, codes and all: perhaps with another quantizer, in another norm, or with
        factors that have trained since. The result is not worse than it. A tuple is ``lora_B`` and ``lora_A`` of a similar
        decomposition with a scaling of 1. ``init="svd"`` then starts from their
        product instead of an approximation of ``w``. The result of ``weighting.low_rank(w, rank, seed=seed)`` is also
        accepted. It is the step that this function would compute, so decompositions in many formats can share it.
    quantizer : {"nearest", "gptq"} or callable
        ``"nearest"`` rounds each entry independently (:func:`lqlora.quantize`). ``"gptq"`` feeds errors back
        (:func:`lqlora.gptq`) and needs a weighting with the second moment of the inputs. A callable takes the matrix to
        quantize and its own result for the iterate to continue from (None at first), and returns a QuantizedArray.
    fit : {"absmax", "scale", "levels+scale"}
        Rule that chooses scales and levels, see :func:`lqlora.quantize`. Squared errors are weighted by the importance
        of single entries. From the second iterate on, a fit starts from the scales and levels of the iterate before.
    extrapolation : float, optional
        Momentum of the alternation, 0 to 1. Before each quantization, this multiple of the last change of the low-rank
        part is added to it. When the error rises the momentum is halved, and the alternation continues from the best
        iterate. 0 is the plain alternation of the papers, which always continues from the last iterate. The default is
        0.95 for nearest rounding with a fit. Otherwise it is 0.75, or 0 if quantization alone leaves a relative error
        above 0.3.
    max_iter : int, default 100
        Largest number of iterations, at least 1.
    rtol : float, default 1e-3
        Stop when three iterations together lower the error by less than this fraction. With 0 the alternation stops
        early only at zero error, or when a step without extrapolation from the best iterate fails.
    target : float, optional
        Relative error at which to stop.
    time_limit : float, optional
        Seconds from the call, after which no further iteration starts.
    scaling : float, default 1.0
        Scaling of the adapter that will hold the factors: ``lora_alpha / rank``, or ``lora_alpha / rank**0.5`` with
        rsLoRA. The factors are divided by its square root, so that the approximation does not change.
    factor_format : BlockFormat, optional
        Format in which to quantize the factors at the end. ``lora_A`` and ``lora_B`` are then the decoded factors, and
        the matrix is quantized again to compensate for their errors, if that lowers the error.
    clip_rank : bool, default False
        Allow a rank above ``min(m, n)``, and pad the factors with zeros.
    seed : int, default 0
        Seed of the randomized SVD, and of the noise of ``init="zero"``.
    callback : callable, optional
        Function called with the index and the relative error of each entry of ``errors``. A true result stops.
    name : str, optional
        Name of the matrix in error messages.

    Returns
    -------
    Decomposition
        Best iterate, with refitted factors. Its weighted error is never above that of quantization alone, nor above
        that of quantization with one SVD of its residual. The second promise does not hold for ``init="zero"``, or if
        a stopping rule ends the call before that SVD. Both hold up to the rounding of quantized factors.

    Raises
    ------
    InvalidArgumentError
        If an argument is out of range, or the weighting, the start or the quantizer does not suit the matrix. Largest
        magnitudes of a matrix are between 1.1e-41 and 1.7e+38, and squared norms between 1e-288 and 1e+302; zeros are
        allowed. Any importance in between gives the result of one near 1.
    NonFiniteError
        If the matrix or the start holds NaN or infinity.

    Notes
    -----
    The alternation lowers :math:`\lVert W - Q - BA \rVert` over :math:`Q` and :math:`BA` in turns. Plain alternation
    takes many short steps: the change of :math:`BA` keeps its direction from iterate to iterate. Quantizing
    :math:`W - B_k A_k - \beta (B_k A_k - B_{k-1} A_{k-1})` instead needs an eighth to a third of the iterations, and
    ends at a lower error (``experiments/alternation.py``). Each low-rank step starts from the subspace of the previous
    one.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, algorithm 1; LoftQ, arXiv 2310.08659, algorithm 1; CALDERA, arXiv 2405.18886, for keeping
    the best iterate and for quantized factors; SRR, arXiv 2602.02001, for splitting the rank. The extrapolation was
    developed for this library.

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
        quantizer=quantizer,
        init=init,
        fit=fit,
        max_iter=max_iter,
        rtol=rtol,
        target=target,
        time_limit=time_limit,
        scaling=scaling,
        callback=callback,
        seed=seed,
        extrapolation=extrapolation,
        factor_format=factor_format,
    )
    # Numbers of NumPy and fractions become Python's.
    rank, max_iter, seed, scaling = int(rank), int(max_iter), int(seed), float(scaling)
    weighting = Uniform() if weighting is None else weighting
    if not isinstance(weighting, AbstractWeighting):
        raise InvalidArgumentError(f"weighting must be a norm of lqlora.weighting, got {type(weighting).__name__}.")
    weighting.check(tuple(matrix.shape))
    check_scaling(scaling, matrix, name)
    # Everything below works in a unit in which the squared norm of the matrix is about one, so that no error, and no ratio
    # of errors, leaves the range of float64.
    weighting, norm, exponent = checked_norm(weighting, matrix, name)
    if extrapolation is None and quantizer == "nearest" and fit != "absmax":
        extrapolation = _FITTED
    kept: LowRankStep | None
    if isinstance(start, Decomposition):
        kept = checked_continuation(start, matrix, fmt, (rank, used), fit, init)
    else:
        kept = None if start is None else checked_start(start, matrix, init)
    goal = _Goal(matrix, used, weighting, make_quantizer(quantizer, fmt, fit, weighting, name), seed)
    stopping: StoppingRule[_Iterate] = StoppingRule(norm, rtol, target, time_limit, callback)
    if isinstance(start, Decomposition):
        assert kept is not None
        iterates = _continued(goal, start.quantized, kept, max_iter, extrapolation)
    else:
        iterates = _iterates(goal, norm, init, init_rank if kept is None else kept, max_iter, extrapolation)
    for iterate in iterates:
        if stopping.record(iterate, iterate.squared_error):
            break
    else:
        # The generator ended. Under "quantize" the second safeguard is the first iteration.
        every = 1 + (init == "svd" and not isinstance(start, Decomposition)) + max_iter  # safeguards and iterations
        stopping.reason = "max_iter" if len(stopping.errors) == every else "converged"
        if used == 0 or init == "zero":
            stopping.reason = "rank_zero"
    best = _refitted(goal, stopping.best_iterate)
    found = _finished(goal, best, stopping, scaling, rank, factor_format)
    return replace(found, squared_error=in_float64(found.squared_error, exponent))


class _Goal(NamedTuple):
    """Inputs of an alternation, which stay fixed."""

    matrix: Array
    rank: int
    weighting: AbstractWeighting
    quantizer: Quantizer
    seed: int
    is_coarse: bool = False


class _Iterate(NamedTuple):
    """A quantized part and the low-rank step of its residual, which is None for quantization alone."""

    quantized: QuantizedArray
    step: LowRankStep | None
    squared_error: float


def _iterates(
    goal: _Goal, norm: float, init: Init, kept: LowRankStep | int, max_iter: int, extrapolation: float | None
) -> Iterator[_Iterate]:
    """Yield the two safeguards, quantization without and with one SVD of its residual, then the alternation."""
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
    # Start the subspace iteration from the SVD of the matrix if that has the rank of the steps, else from the
    # safeguard.
    previous = kept if kept.basis is not None and kept.left.shape[1] == goal.rank else step
    yield from _alternate(goal, kept, _Iterate(first, previous, math.inf), max_iter, extrapolation)


def _continued(
    goal: _Goal, quantized: QuantizedArray, kept: LowRankStep, max_iter: int, extrapolation: float | None
) -> Iterator[_Iterate]:
    """Yield a decomposition as it is, then the alternation from it."""
    target = goal.matrix - kept.left @ kept.right
    error = goal.weighting.squared_norm(residual_of(target, quantized))
    if goal.rank == 0:
        yield _Iterate(quantized, None, error)
        again = goal.quantizer(goal.matrix, quantized)
        yield _Iterate(again, None, goal.weighting.squared_norm(residual_of(goal.matrix, again)))
        return
    iterate = _Iterate(quantized, kept._replace(squared_error=error), error)
    yield iterate
    goal = goal._replace(is_coarse=error > _COARSE**2 * goal.weighting.squared_norm(target))
    if extrapolation is None:
        extrapolation = 0.0 if goal.is_coarse else _EXTRAPOLATION
    yield from _alternate(goal, kept, iterate, max_iter, extrapolation)


def _alternate(
    goal: _Goal, kept: LowRankStep, best: _Iterate, max_iter: int, extrapolation: float
) -> Iterator[_Iterate]:
    """Yield iterates, each a quantization and a low-rank step, with extrapolation and a safeguard.

    If an iterate is worse than the best, the next one starts from the best with half the extrapolation. Without
    extrapolation each iterate starts from the one before, as in the papers.

    Parameters
    ----------
    goal : _Goal
        Problem to solve.
    kept : LowRankStep
        Low-rank part to subtract first.
    best : _Iterate
        Iterate whose quantized part and subspace the first steps start from.
    max_iter : int
        Largest number of iterates.
    extrapolation : float
        Extrapolation as in :func:`decompose`.
    """
    # With P_k = B_k A_k, an iteration computes
    #     Q_{k+1} = quantize(W - P_k - beta (P_k - P_{k-1})),    P_{k+1} = low_rank(W - Q_{k+1}).
    # Codes are coarse, so most of them stay when P moves a little, and Q takes up most of the move: the changes
    # P_k - P_{k-1} are short and nearly parallel. The term with beta repeats the last change, as momentum does.
    # Only the target of the quantizer is extrapolated, never the low-rank part itself. Every iterate is therefore an
    # ordinary pair whose factors belong to its Q, and the safeguard can compare errors.
    #
    # Safeguard: `kept` and `best` move only when the error falls below the best. After a failure the momentum is
    # dropped (former = None), so the next step is a plain one from the best iterate, and beta is halved for later.
    # If that plain step fails too, the loop ends: it would compute the same again.
    # In plain mode (beta = 0) `best` is the last iterate, whatever its error.
    former, is_plain = None, extrapolation == 0
    for _ in range(max_iter):
        quantized = goal.quantizer(remainder(goal.matrix, kept, former, extrapolation), best.quantized)
        iterate = _approximated(goal, quantized, best.step)
        if goal.is_coarse or (iterate.squared_error >= best.squared_error and not is_plain):
            # The step is one round of subspace iteration from the previous subspace: before a failure is believed, a
            # second round from its own result.
            iterate = _approximated(goal, quantized, iterate.step)
        yield iterate
        if is_plain or iterate.squared_error < best.squared_error:
            assert iterate.step is not None  # only quantization alone has none
            former, kept, best = None if is_plain else kept, iterate.step, iterate
        elif former is None and best.squared_error < math.inf:
            return  # a plain step from the best iterate failed
        else:
            former, extrapolation = None, extrapolation / 2


def _approximated(goal: _Goal, quantized: QuantizedArray, previous: LowRankStep | None) -> _Iterate:
    """Return the iterate of a quantized part: approximate its residual by low rank, starting from a previous step."""
    residual = residual_of(goal.matrix, quantized)
    step = goal.weighting.low_rank(residual, goal.rank, previous=previous, seed=goal.seed)
    return _Iterate(quantized, step, step.squared_error)


def _refitted(goal: _Goal, best: _Iterate) -> _Iterate:
    """Return the best iterate with factors refined for its quantized part, and with its error measured."""
    if best.step is None:
        return best
    for _ in range(_REFITS):
        again = _approximated(goal, best.quantized, best.step)
        gained = best.squared_error - again.squared_error
        best = again if gained > 0 else best
        if gained < _REFIT_GAIN * best.squared_error:
            break
    assert best.step is not None  # refits keep the step
    # A step may compute its error as a difference of squares. The error that is returned is measured.
    rest = residual_of(goal.matrix, best.quantized) - best.step.left @ best.step.right
    return best._replace(squared_error=goal.weighting.squared_norm(rest))


def _finished(
    goal: _Goal,
    best: _Iterate,
    stopping: StoppingRule[_Iterate],
    scaling: float,
    rank: int,
    factor_format: BlockFormat | None,
) -> Decomposition:
    """Return the best iterate as a decomposition, its factors in the form of an adapter."""
    if best.step is None:
        lora_A, lora_B = _fresh_factors(goal, rank)
    else:
        share = scaling**-0.5  # in both factors: scaling * (share B) (share A) = B A, and they stay balanced
        lora_A, lora_B = _in_float32(best.step.right * share), _in_float32(best.step.left * share)
        if scaling != 1.0 or goal.matrix.dtype != lora_B.dtype:
            best = _measured_again(goal, best, lora_B, lora_A, scaling)
        if factor_format is None and best.squared_error > stopping.first_iterate.squared_error:
            # Float32 does not hold the factors well enough: quantization alone is better.
            stopping.return_first(best.squared_error)
            return _finished(goal, stopping.best_iterate, stopping, scaling, rank, None)
        lora_A, lora_B = _padded(lora_A, rank, 0), _padded(lora_B, rank, 1)
    factors = None
    if factor_format is not None:
        best, factors = _with_quantized_factors(goal, best, lora_A, lora_B, scaling, factor_format)
        lora_A, lora_B = (dequantize(factor) for factor in factors)
    stopping.revise_best(best.squared_error)
    return Decomposition(
        best.quantized,
        lora_A,
        lora_B,
        scaling,
        tuple(stopping.errors),
        stopping.best,
        stopping.reason,
        best.squared_error,
        factors,
    )


def _measured_again(goal: _Goal, best: _Iterate, lora_B: Array, lora_A: Array, scaling: float) -> _Iterate:
    """Return the iterate with the error of its factors as they are returned, if rounding them changed it."""
    # Factors are rounded to float32. At ordinary scales this changes the seventh digit of the product. It matters where
    # the product is near the smallest numbers of float32, where importance lies on entries much smaller than others, and
    # where the factors are exact, with an error of zero.
    with np.errstate(over="ignore", invalid="ignore"):
        product = ops.low_rank_product(lora_B, lora_A, scaling)
    if not ops.is_finite(product):  # entries without importance may be far larger than those of the matrix
        return best._replace(squared_error=math.inf)
    rest = residual_of(goal.matrix, best.quantized)
    rest -= namespace(rest).astype(product, rest.dtype, copy=False)
    error = goal.weighting.squared_norm(rest)
    return (
        best if abs(error - best.squared_error) <= _ROUNDED * best.squared_error else best._replace(squared_error=error)
    )


def _with_quantized_factors(
    goal: _Goal, best: _Iterate, lora_A: Array, lora_B: Array, scaling: float, fmt: BlockFormat
) -> tuple[_Iterate, tuple[QuantizedArray, QuantizedArray]]:
    """Return the iterate with quantized factors, its matrix quantized again to compensate for their errors."""
    factors = quantize(lora_A, fmt, name="lora_A"), quantize(lora_B, fmt, name="lora_B")
    rest = goal.matrix - ops.low_rank_product(dequantize(factors[1]), dequantize(factors[0]), scaling)
    tried = [
        _Iterate(quantized, best.step, goal.weighting.squared_norm(rest - dequantize(quantized)))
        for quantized in (best.quantized, goal.quantizer(rest, best.quantized))
    ]
    return min(tried, key=lambda iterate: iterate.squared_error), factors


def _fresh_factors(goal: _Goal, rank: int) -> tuple[Array, Array]:
    """Return factors whose product is zero: ``lora_B`` is zero and ``lora_A`` noise.

    The gradient of each factor is proportional to the other one, so both at zero would never train.
    """
    xp = namespace(goal.matrix)
    rows, columns = goal.matrix.shape
    device = device_of(goal.matrix)
    # PEFT draws lora_A from the same distribution: uniform between plus and minus 1 / sqrt(number of inputs).
    lora_A = np.random.default_rng(goal.seed).uniform(-1, 1, (rank, columns)) / max(columns, 1) ** 0.5
    return (
        xp.asarray(lora_A, dtype=xp.float32, device=device),
        xp.zeros((rows, rank), dtype=xp.float32, device=device),
    )


def _in_float32(factor: Array) -> Array:
    xp = namespace(factor)
    return xp.astype(factor, xp.float32)


def _padded(factor: Array, rank: int, axis: int) -> Array:
    """Return a factor padded with zeros to a rank above that of the matrix."""
    xp = namespace(factor)
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = tuple(missing if own == axis else size for own, size in enumerate(factor.shape))
    return xp.concat([factor, xp.zeros(shape, dtype=xp.float32, device=device_of(factor))], axis=axis)
