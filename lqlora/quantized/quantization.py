"""Quantization, dequantization and multiplication by a quantized weight."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, empty, namespace
from lqlora.errors import InvalidArgumentError, NonFiniteError, ScaleUnderflowWarning
from lqlora.formats import BlockFormat
from lqlora.quantized._encoding import decode_into, encode_by_absmax
from lqlora.quantized._fits import Choice, Source, assemble, by_absmax, by_levels, by_scale, lost_blocks
from lqlora.quantized._layout import blocks_last, piece_size, stream_size
from lqlora.quantized._multiply import multiply
from lqlora.quantized.array import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora._typing import Array

__all__ = ["Fit", "dequantize", "matmul", "quantize"]

Fit: TypeAlias = Literal["absmax", "scale", "levels+scale"]


def quantize(
    w: Array,
    fmt: BlockFormat,
    *,
    weights: Array | None = None,
    fit: Fit = "absmax",
    start: QuantizedArray | None = None,
    batch_dims: int = 0,
    check_finite: bool = True,
    name: str = "the array",
) -> QuantizedArray:
    """Quantize an array block by block.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, any shape and strides
        Weights. The result depends on the logical order of the entries only.
    fmt : BlockFormat
        Codebook, block size, axis and scale format.
    weights : array, broadcastable to the shape of ``w``, optional
        Importance of each entry, not negative, for a fit that minimizes an error: Fisher information, or second moments
        of the inputs as one row. A block of zeros counts its entries the same.
    fit : {"absmax", "scale", "levels+scale"}
        How scales are chosen. ``"absmax"``: the largest weight of a block becomes the largest level. ``"scale"``: the
        scale of least squared error among those tried, in no block worse than ``"absmax"``. ``"levels+scale"``: levels
        are fitted too, in turns with the scales, and stored with the array; its total error is not above that of
        ``"scale"``. If the format names no sharing of levels, the whole array shares one set (``levels="matrix"``).
    start : QuantizedArray, optional
        A similar array, quantized to the same format with the same fit. Its levels are where those of
        ``"levels+scale"`` start from, with no promise about ``"scale"`` then, and the search for scales is a coarse one:
        a fraction of the work. This is how an alternation carries a fit from one iterate to the next.
    batch_dims : int, default 0
        Number of leading dimensions that count arrays to quantize one by one, such as the experts of a layer.
    check_finite : bool, default True
        False skips the check for NaN and infinity, which then may or may not raise when scales are made of them.
    name : str, optional
        What the array is, for errors.

    Returns
    -------
    QuantizedArray
        In the library and on the device of ``w``.

    Raises
    ------
    NonFiniteError
        If ``w`` or ``weights`` hold NaN or infinity, or a scale is beyond the range of the dtype that stores it.
    UnsupportedArrayError
        If ``w`` is not an array of a floating-point dtype.
    InvalidArgumentError
        If ``fmt`` is no BlockFormat or does not fit the shape, or the weights are negative, have another shape or are
        given to a fit that has no use for them.

    Warns
    -----
    ScaleUnderflowWarning
        If blocks that are not zero decode to zeros because the format cannot tell their scale from zero.

    Notes
    -----
    Codes are the nearest levels of ``w / scale``, where ``scale`` is the *decoded* scale, so that the errors of double
    quantization are compensated by the codes. Beyond its input and its output this takes at most 64 MiB, on a device some
    hundred MiB, or a few times the size of one block where that is more.

    Under ``"scale"`` with quantized scales, second-level scales and offset are those of ``"absmax"``, so that its
    choice is among the candidates of every block.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; QLoRA, arXiv 2305.14314, section 3. Zero points: GPTQ, arXiv 2210.17323, and
    PEQA, arXiv 2305.14152, equation 1. Signed normalization and the weights of the centroids of fitted levels: BOF4,
    arXiv 2505.06653.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("nf4/64:u8/256:float32"))
    >>> q.shape, q.nbytes, round(float(abs(lq.dequantize(q) - w).max()), 3)
    ((16, 16), 140, 0.149)
    """
    namespace(w)
    if not isinstance(fmt, BlockFormat):
        raise InvalidArgumentError(
            f"A format is a BlockFormat, such as BlockFormat.parse('nf4/64:float32'), not {fmt!r}."
        )
    if fit not in ("absmax", "scale", "levels+scale"):
        raise InvalidArgumentError(f"fit is 'absmax', 'scale' or 'levels+scale', not {fit!r}.")
    if fit == "levels+scale" and fmt.levels == "codebook":
        fmt = replace(fmt, levels="matrix")
    ops.require_float(w, name)
    if weights is not None:
        weights = _checked_weights(weights, w, fit)
    if not isinstance(batch_dims, int) or not 0 <= batch_dims <= len(w.shape):
        raise InvalidArgumentError(f"batch_dims is 0 to the {len(w.shape)} dimensions of {name}, not {batch_dims!r}.")
    if start is not None:
        _check_start(start, fmt, tuple(w.shape), fit, batch_dims)
        namespace(w, start.packed)
    if not batch_dims:
        return _quantize_one(Source(w, weights, fmt, name, start), fit, check_finite=check_finite)
    batch_shape = tuple(w.shape[:batch_dims])
    if not prod(batch_shape):
        raise InvalidArgumentError(
            f"A stack holds at least one array; the batch dimensions of {name} are {batch_shape}."
        )
    parts = []
    starts = [None] * prod(batch_shape) if start is None else start.unstack()
    for index, near in zip(_indices(batch_shape), starts, strict=True):
        own = None if weights is None else weights[(*index, ...)]
        source = Source(w[(*index, ...)], own, fmt, f"{name}[{', '.join(map(str, index))}]", near)
        parts.append(_quantize_one(source, fit, check_finite=check_finite))
    return QuantizedArray.stack(parts, batch_shape)


def _checked_weights(weights: Array, w: Array, fit: str) -> Array:
    """Return weights of the shape of the array, after looking for what cannot weigh anything."""
    xp = namespace(w, weights)
    if fit == "absmax":
        raise InvalidArgumentError("fit='absmax' minimizes no error: weights need fit='scale' or 'levels+scale'.")
    ops.require_float(weights, "weights")
    ops.require_finite(ops.widen(weights), "The array of weights")
    if prod(weights.shape) and bool(xp.min(ops.widen(weights)) < 0):
        raise InvalidArgumentError("Weights of squared errors are not negative.")
    try:
        return xp.broadcast_to(weights, w.shape)
    except (ValueError, RuntimeError):
        shapes = f"{tuple(weights.shape)} do not fit weights of shape {tuple(w.shape)}"
        raise InvalidArgumentError(f"Importances of shape {shapes}.") from None


def _check_start(start: QuantizedArray, fmt: BlockFormat, shape: tuple[int, ...], fit: str, batch_dims: int) -> None:
    if fit == "absmax":
        raise InvalidArgumentError("fit='absmax' searches nothing: a start needs fit='scale' or 'levels+scale'.")
    if not isinstance(start, QuantizedArray):
        raise InvalidArgumentError(f"A start is a QuantizedArray, not {type(start).__name__}.")
    if (start.format, start.shape, len(start.batch_shape)) != (fmt, shape, batch_dims):
        raise InvalidArgumentError(
            f"A start in {start.format} of shape {start.shape} is none for {fmt} and shape {shape}"
            f"{'' if len(start.batch_shape) == batch_dims else ': it has other batch dimensions'}."
        )


def _indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for length in shape:
        indices = [(*index, position) for index in indices for position in range(length)]
    return indices


def _quantize_one(source: Source, fit: Fit, *, check_finite: bool) -> QuantizedArray:
    statistic, choice, levels = choose(source, fit, check_finite=check_finite)
    if lost := lost_blocks(source, statistic, choice, levels):
        warnings.warn(
            f"{lost} of {statistic.shape[0]} blocks of {source.name} are not zero but decode to zeros: scales stored "
            f"as {source.fmt.scales} cannot tell theirs from zero. Scale the weights, or choose a wider range.",
            ScaleUnderflowWarning,
            stacklevel=3,
        )
    return assemble(source, choice, levels)


def choose(source: Source, fit: Fit, *, check_finite: bool) -> tuple[Array, Choice, Array | None]:
    """Return the scale that the extremes of each block give it, the scales that a fit chooses, and fitted levels."""
    encoded = encode_by_absmax(source.array, source.fmt) if fit == "absmax" else None
    statistic, low = block_statistics(source) if encoded is None else (encoded[0], None)
    try:
        first = by_absmax(source, statistic, low)
    except NonFiniteError as error:
        # Whatever is not finite shows in the scale of its block: the array itself is read again only to say where.
        if check_finite:
            _say_where(source)
        raise error from None
    if encoded is not None:
        return statistic, first._replace(packed=encoded[1]), None
    if fit == "levels+scale":
        return statistic, *by_levels(source, statistic, first)
    return statistic, by_scale(source, statistic, first) if fit == "scale" else first, None


def _say_where(source: Source) -> None:
    try:
        ops.require_finite(ops.widen(source.array), source.name)
    except NonFiniteError as error:
        raise error from None  # instead of what was said of a scale


def block_statistics(source: Source) -> tuple[Array, Array | None]:
    """Return the scale that the extremes of each block give it; and for an affine format its minimum."""
    xp, book = namespace(source.array), source.fmt.codebook
    layout = source.layout
    dense = blocks_last(source.array, source.fmt.axis)
    limit = stream_size(dense) if layout.is_even else piece_size(dense)
    found = [_extremes(source, entries, limit) for entries, _ in layout.whole_blocks(limit)]
    if not found:
        dtype = ops.widen(source.array).dtype
        empty = xp.zeros((0,), dtype=dtype, device=device_of(source.array))
        return empty, empty if book.normalization == "affine" else None
    low, high = found[0] if len(found) == 1 else (xp.concat(parts) for parts in zip(*found, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused when it is stored
        if book.normalization == "affine":
            high = high - low
        elif book.normalization == "signed":
            high = xp.where(high >= -low, high, low)
        if (widest := book.widest) != 1.0:
            # An array of one number and not the number: a library may multiply by the reciprocal of that.
            high = high / xp.full((1,), widest, dtype=high.dtype, device=device_of(high))
    return high, low if book.normalization == "affine" else None


def _extremes(source: Source, entries: slice, limit: int) -> tuple[Array, Array]:
    """Return minimum and maximum of each block in a range of weights; twice the absolute maximum where that will do."""
    layout = source.layout
    xp, dense = namespace(source.array), blocks_last(source.array, source.fmt.axis)
    if layout.is_even and layout.block_size > limit:  # one block, or less: read piece by piece
        cuts = [*range(entries.start, entries.stop, limit), entries.stop]
        parts = [_flat_extremes(source, ops.take_flat(dense, *cut), limit) for cut in pairwise(cuts)]
        low, high = (xp.concat(values) for values in zip(*parts, strict=True))
        return xp.min(low, keepdims=True), xp.max(high, keepdims=True)
    flat = ops.take_flat(dense, entries.start, entries.stop)
    if not layout.is_even:
        flat = xp.reshape(layout.as_blocks(ops.widen(flat)), (-1,))
    return _flat_extremes(source, flat, layout.block_size)


def _flat_extremes(source: Source, flat: Array, block_size: int) -> tuple[Array, Array]:
    if source.fmt.codebook.normalization != "absmax":
        low, high = ops.block_extremes(flat, block_size)
        return low, high
    absmax = ops.block_absmax(flat, block_size)
    return absmax, absmax


def dequantize(q: QuantizedArray, *, out: Array | None = None, dtype: str = "float32") -> Array:
    """Return the dense array.

    Parameters
    ----------
    q : QuantizedArray
        Quantized array.
    out : array of shape ``q.shape``, optional
        Written to and returned instead of a new array; of the library and device of ``q``, any strides.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Of the result when ``out`` is not given. The product of level and scale is rounded to float32 first.

    Returns
    -------
    array, shape ``q.shape``
        Dense values.

    Raises
    ------
    InvalidArgumentError
        If ``out`` has another shape.
    UnsupportedArrayError
        If the library has no such dtype.

    Notes
    -----
    On the CPU the memory of a large result, of 4 MiB or more, serves for the next one of its size when the last array or
    tensor in it is gone: new pages cost more than decoding. At most 128 MiB are kept so. Such a result cannot be resized
    in place; its copy can, and ``out`` may be any array.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.array([0.0, 2.0, -2.0]), lq.BlockFormat(lq.NF4))
    >>> lq.dequantize(q).tolist()
    [0.0, 2.0, -2.0]
    """
    namespace(q.packed, out)  # refuses those of two libraries or devices
    if out is None:
        out = empty(q.shape, ops.native_dtype(q.packed, dtype), q.packed)
    elif tuple(out.shape) != q.shape:
        raise InvalidArgumentError(f"out has shape {tuple(out.shape)}, the array has {q.shape}.")
    for index, part in zip(_indices(q.batch_shape), q.unstack(), strict=True):
        decode_into(part, out[(*index, ...)])
    return out


def matmul(
    x: Array, q: QuantizedArray, lora_A: Array | None = None, lora_B: Array | None = None, scaling: float = 1.0
) -> Array:
    """Apply a quantized weight, and its low-rank part, to rows.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (..., n)
        Inputs.
    q : QuantizedArray of shape (m, n)
        Quantized weight.
    lora_A, lora_B : array of the dtype of ``x`` or of float32, shape (rank, n) and (m, rank), optional
        Low-rank factors, both or neither.
    scaling : float, default 1.0
        Factor of the low-rank part.

    Returns
    -------
    array of the dtype of ``x``, shape (..., m)
        ``x @ dequantize(q).T + scaling * (x @ lora_A.T) @ lora_B.T``.

    Raises
    ------
    InvalidArgumentError
        If only one factor is given, the weight is no matrix, or the rows do not have its number of columns.
    UnsupportedArrayError
        If ``x`` is not an array of a floating-point dtype.

    Notes
    -----
    The weight is decoded a few rows at a time, 2 MiB of them, 128 MiB on a device: it never exists as a whole, unless it
    is smaller, its blocks do not run along its rows or its rows have levels of their own.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.eye(4, dtype=np.float32), lq.BlockFormat(lq.NF4, 4))
    >>> lq.matmul(np.ones((1, 4), dtype=np.float32), q).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    if (lora_A is None) != (lora_B is None):
        raise InvalidArgumentError("Give both lora_A and lora_B, or neither.")
    xp = namespace(x, q.packed, lora_A, lora_B)
    ops.require_float(x, "x")
    if len(q.shape) != 2 or q.batch_shape or not x.shape or x.shape[-1] != q.shape[1]:
        raise InvalidArgumentError(f"Rows of shape {tuple(x.shape)} do not fit a weight of shape {q.shape}.")
    rows = multiply(xp.reshape(x, (prod(x.shape[:-1]), q.shape[1])), q)
    y = xp.reshape(rows, (*x.shape[:-1], q.shape[0]))
    return y if lora_A is None else ops.add_low_rank(y, x, lora_A, lora_B, scaling)
