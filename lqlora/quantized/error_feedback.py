r"""``gptq``: quantization with error feedback, which reduces the error of a layer's outputs.

With rows of inputs ``x`` and their second moment :math:`H = X^T X`, the squared error of the outputs is

.. math:: \|X (W - Q)^T\|^2 = \operatorname{tr}\bigl((W - Q) \, H \, (W - Q)^T\bigr) .

Columns of the weight are coupled by ``H``: a column that is rounded later can compensate the errors of columns rounded
before it. :mod:`lqlora.quantized._sweep` makes one such pass under given scales. This module alternates between fitting
scales and making passes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._dispatch import FLOATS, device_of, namespace, plain_array
from lqlora._options import require_choice, require_integer, require_number
from lqlora._printable import printable
from lqlora._warnings import warn
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.formats import BlockFormat
from lqlora.quantized._decoding import decode_scales, zero_point_codes
from lqlora.quantized._encoding import encode_codes
from lqlora.quantized._fits import FITS, Fit, assemble, choose
from lqlora.quantized._layout import blocks_last, layout_of
from lqlora.quantized._rotation import as_rotated, as_stored, rotated
from lqlora.quantized._source import Source
from lqlora.quantized._sweep import System, targets
from lqlora.quantized.quantization import check_start, dequantize, quantize, with_fitted_levels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora._typing import Array
    from lqlora.quantized.array import QuantizedArray

__all__ = ["Order", "gptq"]

Order: TypeAlias = Literal["activation", "natural"]


def gptq(
    w: Array,
    fmt: BlockFormat,
    gram: Array,
    *,
    fit: Fit = "scale",
    damping: float = 0.01,
    order: Order = "activation",
    rounds: int = 3,
    sweeps: int = 2,
    start: QuantizedArray | None = None,
    check_finite: bool = True,
    name: str = "w",
) -> QuantizedArray:
    r"""Quantize the weight of a linear layer so that its outputs change little.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, n)
        Weight of a layer with ``n`` inputs and ``m`` outputs.
    fmt : BlockFormat
        Any format.
    gram : array of a floating-point dtype, shape (n, n)
        Second moment of the inputs, ``x.T @ x`` of many rows of inputs, in any unit.
    fit : {"scale", "levels+scale", "absmax"}
        Choice of scales and levels, as in :func:`quantize`: first for the weights, with the diagonal of ``gram`` as the
        importance of the columns, then for the targets that the weights become under error feedback.
    damping : float, default 0.01
        Number that is added to the diagonal of ``gram``, as a multiple of its mean. It keeps the matrix positive definite
        when there are few inputs.
    order : {"activation", "natural"}
        Order in which columns are rounded. ``"activation"``: columns of large inputs first, when most others can still
        compensate their errors. Codes are stored in the original order of columns. ``"natural"``: first to last.
    rounds : int, default 3
        Passes of error feedback, at least 1. Each pass after the first fits scales and levels to the targets of the pass
        before. A single pass is plain GPTQ.
    sweeps : int, default 2
        Passes of coordinate descent over the codes of the best round, at least 0; scales and levels stay.
    start : QuantizedArray, optional
        Result for a similar matrix, in the same format and by the same fit. Fits then start from it, and from each other,
        as in :func:`quantize`. Not for ``fit="absmax"``.
    check_finite : bool, default True
        False skips the check of ``w`` for NaN and infinity.
    name : str, optional
        Name of the matrix in messages.

    Returns
    -------
    QuantizedArray
        Result in the library and on the device of ``w``. Among all results tried, nearest rounding included, it has the
        least ``tr((w - q) @ gram @ (w - q).T)``.

    Raises
    ------
    NonFiniteError
        If ``w`` or ``gram`` holds NaN or infinity, or a scale is beyond the range of the dtype that stores it.
    UnsupportedArrayError
        If ``w`` or ``gram`` is not an array of a floating-point dtype.
    MixedArraysError
        If the two belong to different libraries or devices.
    InvalidArgumentError
        If ``w`` is not a matrix, ``gram`` does not fit it, is not symmetric or not positive definite with its damping,
        or an option has a value that is not allowed.

    Warns
    -----
    UserWarning
        If ``gram`` is zero. The weights are then rounded to nearest.
    ScaleUnderflowWarning
        If nearest rounding loses blocks, as in :func:`quantize`.

    Notes
    -----
    Scales that are chosen before the feedback suit the weights, not the targets that are rounded in the
    end. At two bits this raises the error a lot, so further rounds fit the scales to the targets. The squared distance
    of column ``k`` from its target is multiplied by ``d_k``, the square of a diagonal entry of the Cholesky factor.
    With this importance, the fit of a block minimizes the error that the feedback will leave.

    Results of two libraries differ where a target is within a rounding error of the boundary between two levels.

    References
    ----------
    GPTQ, arXiv 2210.17323, section 3.3 and algorithm 1; the form of the feedback without an inverse is LDLQ, QuIP, arXiv
    2307.13304, section 3. Coordinate descent over codes: QuantEase, arXiv 2309.01885. The rounds are ours.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((32, 64)), rng.standard_normal((500, 64))
    >>> x += rng.standard_normal((500, 8)) @ rng.standard_normal((8, 64))
    >>> fmt = lq.BlockFormat.parse("nf2/16:float32")
    >>> pair = lq.quantize(w, fmt, fit="scale"), lq.gptq(w, fmt, x.T @ x)
    >>> nearest, ours = (np.linalg.norm(x @ (w - lq.dequantize(q)).T) for q in pair)
    >>> bool(ours < 0.5 * nearest)
    True
    """
    w, gram = plain_array(w, name, FLOATS), plain_array(gram, f"gram of {name}", FLOATS)
    xp = namespace(w, gram)
    w = ops.widen(w, name)
    _check_options(damping, fit, order, rounds, sweeps)
    moment = _checked_moment(gram, w, name)
    if isinstance(fmt, BlockFormat) and fmt.rotation is not None:
        if start is not None:
            check_start(start, with_fitted_levels(fmt) if fit == "levels+scale" else fmt, tuple(w.shape), fit)
            start = as_stored(start)
        turned = ops.rotated_moment(moment, fmt.rotation.seeds[-1]) if -1 in fmt.rotation.seeds else moment
        stored = gptq(
            rotated(w, fmt.rotation, name, check_finite=check_finite), fmt.unrotated, turned, fit=fit, damping=damping, order=order,
            rounds=rounds, sweeps=sweeps, start=start, check_finite=False, name=name,
        )  # fmt: skip
        return as_rotated(stored, fmt)
    if not bool(xp.any(moment != 0)):
        if moment.shape[0]:
            warn(f"gram of {printable(name)} is zero: its weights are rounded to nearest.")
        return quantize(w, fmt, fit=fit, start=start, check_finite=check_finite, name=name)
    system, diagonal = _system(moment, damping, order, w)
    importance = None if fit == "absmax" else _row(diagonal)
    best = quantize(w, fmt, fit=fit, weights=importance, start=start, check_finite=check_finite, name=name)
    least = _output_error(w, best, moment)
    # Rounds need not lower the error: scales are fitted to targets that move once the scales do. The objective does not
    # include damping either. Each result is measured with the undamped H, and the best one, nearest rounding included, stays.
    for q in _rounds(w, best, system, fit, rounds, name, again=start is not None):
        error = _output_error(w, q, moment)
        best, least = (q, error) if error < least else (best, least)
    for q in _sweeps(w, best, system, sweeps):
        error = _output_error(w, q, moment)
        best, least = (q, error) if error < least else (best, least)
    return best


def _check_options(damping: float, fit: str, order: str, rounds: int, sweeps: int) -> None:
    require_number(damping, "damping", "at least 0 and finite", lambda own: 0 <= own < math.inf)
    require_choice(fit, "fit", FITS)
    require_choice(order, "order", ("activation", "natural"))
    require_integer(rounds, "rounds", 1)
    require_integer(sweeps, "sweeps")


def _checked_moment(gram: Array, w: Array, name: str) -> Array:
    """Return a gram in float64, symmetric to the last bit and with its largest entry between 1/2 and 1."""
    xp = namespace(gram)
    if len(w.shape) != 2:
        raise InvalidArgumentError(f"w must be a matrix for a gram of inputs, got {name} of shape {tuple(w.shape)}.")
    columns = w.shape[1]
    if tuple(gram.shape) != (columns, columns):
        raise InvalidArgumentError(
            f"gram must have shape {(columns, columns)} for {name} of shape {tuple(w.shape)}, got {tuple(gram.shape)}."
        )
    moment = ops.symmetric_moment(gram, f"the gram of {name}")
    largest = float(xp.max(xp.abs(moment))) if columns else 0.0
    # Scaled by a power of two, so that a gram in another unit gives the same bytes. In two steps, since the power of a
    # subnormal gram is beyond float64.
    exponent = -math.frexp(largest)[1]
    return moment * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)


def _system(moment: Array, damping: float, order: Order, w: Array) -> tuple[System, Array]:
    """Return the feedback between columns, and the diagonal of the damped moment."""
    xp = namespace(moment)
    diagonal = xp.linalg.diagonal(moment)
    columns, device = moment.shape[0], device_of(moment)
    # Fewer rows of inputs than columns make H singular, and no Cholesky factor exists. H + c I has no eigenvalue below c, and
    # adds c ||E||^2 to the error: changes far from the weights are no longer free in directions without inputs. The mean of
    # the diagonal gives c the unit of H.
    share = damping * float(xp.mean(diagonal))
    damped = moment + share * xp.eye(columns, dtype=xp.float64, device=device)
    places = xp.arange(columns, dtype=xp.int64, device=device)
    if order == "activation":
        # d_k is H_kk less what later columns can undo, so a column should be rounded while many are left. Large H_kk go first.
        places = xp.argsort(-diagonal, stable=True)
    return System.of(damped, places, w.dtype), diagonal + share


def _row(importance: Array) -> Array:
    """Return the importance of columns as one row, scaled so that the largest is 1."""
    xp = namespace(importance)
    return xp.astype(importance / xp.max(importance), xp.float32)[None, :]


def _output_error(w: Array, q: QuantizedArray, moment: Array) -> float:
    """Return ``tr((w - q) @ moment @ (w - q).T)`` in float64."""
    xp = namespace(w)
    # tr(E H E^T) = sum_ij (E H)_ij E_ij, without forming a product of m x m.
    errors = xp.astype(w, xp.float64) - xp.astype(dequantize(q), xp.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity compare as not better
        return float(xp.sum((errors @ moment) * errors))


def _rounds(
    w: Array, nearest: QuantizedArray, system: System, fit: Fit, rounds: int, name: str, *, again: bool
) -> Iterator[QuantizedArray]:
    """Yield the result of each round of error feedback.

    The first round rounds the targets to the scales and levels of nearest rounding. Each round after it fits scales and
    levels to the targets of the round before, and then computes targets under the new ones.
    """
    # ||E U||^2 = sum_k d_k ||T_k - Q_k||^2, so with the targets fixed the error of the outputs is a weighted squared error of
    # T, with one importance d_k for each column. The fits of ``quantize`` minimize just that.
    found = targets(w, nearest, system)
    yield _with_codes_of(found, nearest)
    fitted, importance = nearest, None
    if fit != "absmax":
        importance = namespace(w).broadcast_to(_row(system.importance), w.shape)
    for _ in range(rounds - 1):
        source = Source(found, importance, nearest.format, name, fitted if again else None)
        try:
            _, choice, levels = choose(source, fit, check_finite=True)
        except NonFiniteError:  # targets may be larger than the weights, and their scales beyond the range
            return
        fitted = assemble(source, choice, levels)
        found = targets(w, fitted, system)
        yield _with_codes_of(found, fitted)


def _sweeps(w: Array, q: QuantizedArray, system: System, sweeps: int) -> Iterator[QuantizedArray]:
    """Yield the result of each sweep of coordinate descent, which never increases the error of the outputs."""
    for _ in range(sweeps):
        q = _with_codes_of(targets(w, q, system, dequantize(q)), q)
        yield q


def _with_codes_of(found: Array, q: QuantizedArray) -> QuantizedArray:
    """Return targets rounded to nearest under the scales and levels of a quantized matrix."""
    layout, scales = layout_of(q.format, q.shape), decode_scales(q.scales, q.format.scales)
    packed = encode_codes(blocks_last(found, layout.axis), layout, scales, zero_point_codes(q), q.levels)
    return replace(q, packed=packed)
