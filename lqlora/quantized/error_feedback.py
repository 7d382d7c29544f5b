"""Quantization that makes the error of a layer's outputs small, not that of its weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.quantized._encoding import decode_scales, encode_array
from lqlora.quantized._fits import Source, assemble
from lqlora.quantized._layout import Layout
from lqlora.quantized._sweep import System, targets
from lqlora.quantized.quantization import Fit, choose, dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
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
    name: str = "the matrix",
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
        How scales and levels are chosen, as by :func:`quantize`: first for the weights, with the diagonal of ``gram``
        as weights of the columns, then for what the weights become when columns make up for the errors of others.
    damping : float, default 0.01
        Added to the diagonal of ``gram``, times its mean: what is not learned from few inputs counts less.
    order : {"activation", "natural"}
        ``"activation"``: columns of large inputs are rounded first, when most others can still make up for them; the
        codes are stored where they belong, so this costs nothing later. ``"natural"``: from the first to the last.
    rounds : int, default 3
        Passes of error feedback, at least 1. Each after the first fits scales and levels to the targets of the one
        before. A single one is plain GPTQ.
    sweeps : int, default 2
        Passes of coordinate descent over the codes of the best round, at least 0; scales and levels stay.
    start : QuantizedArray, optional
        A result for a similar matrix, in the same format and by the same fit: fits then start from it, and from each
        other, as those of :func:`quantize` do. Not for ``fit="absmax"``.
    check_finite : bool, default True
        False skips the check of ``w`` for NaN and infinity.
    name : str, optional
        What the matrix is, for errors.

    Returns
    -------
    QuantizedArray
        In the library and on the device of ``w``. Of everything tried, nearest rounding included, what leaves the least
        ``tr((w - q) @ gram @ (w - q).T)``.

    Raises
    ------
    NonFiniteError
        If ``w`` or ``gram`` hold NaN or infinity, or a scale is beyond the range of the dtype that stores it.
    UnsupportedArrayError
        If ``w`` or ``gram`` is not an array of a floating-point dtype.
    MixedArraysError
        If the two belong to different libraries or devices.
    InvalidArgumentError
        If ``w`` is no matrix, ``gram`` does not fit it, is not symmetric or not positive definite with its damping, or
        an option has another value.

    Warns
    -----
    UserWarning
        If ``gram`` is zero; then the weights are rounded to nearest.
    ScaleUnderflowWarning
        If nearest rounding loses blocks, as by :func:`quantize`.

    Notes
    -----
    Scales that are chosen before the feedback suit the weights and not what is rounded in the end, which at two bits
    costs much: hence the rounds. The squared distance of a column from its target counts the square of a diagonal entry
    of the Cholesky factor, and with these weights the fit of a block minimizes what the feedback will leave.

    Results of two libraries differ where a target is a rounding error away from the boundary between two levels.

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
    xp = namespace(w, gram)
    w = ops.widen(w, name)
    _check_options(damping, order, rounds, sweeps)
    moment = _checked_moment(gram, w, name)
    if not bool(xp.any(moment != 0)):
        if moment.shape[0]:
            warnings.warn(f"The gram of {name} is zero: its weights are rounded to nearest.", UserWarning, stacklevel=2)
        return quantize(w, fmt, fit=fit, start=start, check_finite=check_finite, name=name)
    system, diagonal = _system(moment, damping, order, w)
    weights = None if fit == "absmax" else _row(diagonal)
    best = quantize(w, fmt, fit=fit, weights=weights, start=start, check_finite=check_finite, name=name)
    least = _output_error(w, best, moment)
    for q in _rounds(w, best, system, fit, rounds, name, again=start is not None):
        error = _output_error(w, q, moment)
        best, least = (q, error) if error < least else (best, least)
    for q in _sweeps(w, best, system, sweeps):
        error = _output_error(w, q, moment)
        best, least = (q, error) if error < least else (best, least)
    return best


def _check_options(damping: float, order: str, rounds: int, sweeps: int) -> None:
    if not 0 <= damping < math.inf:
        raise InvalidArgumentError(f"damping is at least 0 and finite, not {damping!r}.")
    if order not in ("activation", "natural"):
        raise InvalidArgumentError(f"order is 'activation' or 'natural', not {order!r}.")
    for option, value, least in (("rounds", rounds, 1), ("sweeps", sweeps, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidArgumentError(f"{option} is an int of at least {least}, not {value!r}.")


def _checked_moment(gram: Array, w: Array, name: str) -> Array:
    """Return a gram in float64, symmetric to the last bit and with its largest entry between 1/2 and 1."""
    xp = namespace(gram)
    if len(w.shape) != 2:
        raise InvalidArgumentError(f"{name} has {len(w.shape)} dimensions; a gram of inputs needs two.")
    columns = w.shape[1]
    if tuple(gram.shape) != (columns, columns):
        raise InvalidArgumentError(
            f"A gram of {columns} inputs has shape {(columns, columns)}, not {tuple(gram.shape)}; {name} is "
            f"{tuple(w.shape)}."
        )
    moment = ops.symmetric_moment(gram, f"the gram of {name}")
    largest = float(xp.max(xp.abs(moment))) if columns else 0.0
    # A power of two, so that a gram in another unit gives the same bytes.
    return moment * math.ldexp(1.0, min(-math.frexp(largest)[1], 1000))


def _system(moment: Array, damping: float, order: Order, w: Array) -> tuple[System, Array]:
    """Return how errors spread from column to column, and the diagonal of the damped moment."""
    xp = namespace(moment)
    diagonal = xp.linalg.diagonal(moment)
    columns, device = moment.shape[0], device_of(moment)
    share = damping * float(xp.mean(diagonal))
    damped = moment + share * xp.eye(columns, dtype=xp.float64, device=device)
    places = xp.arange(columns, dtype=xp.int64, device=device)
    if order == "activation":
        places = xp.argsort(-diagonal, stable=True)
    return System.of(damped, places, w.dtype), diagonal + share


def _row(weights: Array) -> Array:
    """Return the weights of columns as one row, the largest 1: of equal ones all are."""
    xp = namespace(weights)
    return xp.astype(weights / xp.max(weights), xp.float32)[None, :]


def _output_error(w: Array, q: QuantizedArray, moment: Array) -> float:
    xp = namespace(w)
    errors = xp.astype(w, xp.float64) - xp.astype(dequantize(q), xp.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # it then compares as no better
        return float(xp.sum((errors @ moment) * errors))


def _rounds(
    w: Array, nearest: QuantizedArray, system: System, fit: Fit, rounds: int, name: str, *, again: bool
) -> Iterator[QuantizedArray]:
    """Yield what each round of error feedback gives."""
    found = targets(w, nearest, system)
    yield _with_codes_of(found, nearest)
    fitted, weights = nearest, None
    if fit != "absmax":
        weights = namespace(w).broadcast_to(_row(system.importance), w.shape)
    for _ in range(rounds - 1):
        source = Source(found, weights, nearest.format, name, fitted if again else None)
        try:
            _, choice, levels = choose(source, fit, check_finite=True)
        except NonFiniteError:  # targets may be larger than the weights, and their scales beyond the range
            return
        fitted = assemble(source, choice, levels)
        found = targets(w, fitted, system)
        yield _with_codes_of(found, fitted)


def _sweeps(w: Array, q: QuantizedArray, system: System, sweeps: int) -> Iterator[QuantizedArray]:
    """Yield what each sweep of coordinate descent gives."""
    for _ in range(sweeps):
        q = _with_codes_of(targets(w, q, system, dequantize(q)), q)
        yield q


def _with_codes_of(found: Array, q: QuantizedArray) -> QuantizedArray:
    """Return targets rounded to nearest under the scales and levels of a quantized matrix."""
    zeros = None
    if q.zero_points is not None:
        zeros = ops.unpack_codes(q.zero_points, q.format.bits, Layout.of(q.format, q.shape).blocks)
    return replace(q, packed=encode_array(found, q.format, decode_scales(q.scales), zeros, q.levels))
