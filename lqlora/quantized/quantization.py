"""``quantize``, ``dequantize`` and ``matmul``: encoding of dense arrays, decoding, and products with weights."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import (
    FLOATS,
    device_of,
    dtype_name,
    empty,
    namespace,
    plain_array,
    require_writable,
    requires_gradient,
)
from lqlora._messages import given
from lqlora._options import require_choice
from lqlora._printable import printable
from lqlora._warnings import warn
from lqlora.errors import InvalidArgumentError, ScaleUnderflowWarning, UnsupportedArrayError
from lqlora.formats import BlockFormat
from lqlora.quantized._decoding import decode_into, decode_scales, host_levels, zero_point_codes
from lqlora.quantized._fits import FITS, Fit, assemble, choose
from lqlora.quantized._layout import layout_of
from lqlora.quantized._rotation import as_rotated, as_stored, product, rotated, unrotate
from lqlora.quantized._source import Source
from lqlora.quantized._underflow import lost_blocks
from lqlora.quantized.array import QuantizedArray, require_quantized, stacked

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Fit", "check_start", "dequantize", "matmul", "multiply", "quantize", "with_fitted_levels"]


def quantize(
    w: Array,
    fmt: BlockFormat,
    *,
    weights: Array | None = None,
    fit: Fit = "absmax",
    start: QuantizedArray | None = None,
    batch_dims: int = 0,
    check_finite: bool = True,
    name: str = "w",
) -> QuantizedArray:
    """Quantize an array block by block.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, any shape and strides
        Weights. The result depends only on the logical order of the entries.
    fmt : BlockFormat
        Codebook, block size, axis and scale format.
    weights : array, broadcastable to the shape of ``w``, optional
        Importance of each entry, not negative, for a fit that minimizes an error: Fisher information, or second moments
        of the inputs as one row. If all importance in a block is zero, its entries count equally.
    fit : {"absmax", "scale", "levels+scale"}
        Choice of the scales. ``"absmax"``: the largest weight of a block becomes the largest level. ``"scale"``: the
        scale of least squared error among those tried; no block is worse than with ``"absmax"``. ``"levels+scale"``:
        levels are fitted too, in turns with the scales, and stored with the array; the total error is not above that of
        ``"scale"``. If the levels of the format are those of the codebook, the array gets one set (``levels="matrix"``).
    start : QuantizedArray, optional
        A similar array, quantized to the same format with the same fit. The levels of ``"levels+scale"`` start from its
        levels, and the search for scales is coarse, which is a fraction of the work. The error may then be above that
        of ``"scale"``. An alternation carries a fit from one iterate to the next in this way.
    batch_dims : int, default 0
        Number of leading dimensions that count arrays to quantize one by one, such as the experts of a layer.
    check_finite : bool, default True
        False skips the search for NaN and infinity. Scales computed from them may still raise an error.
    name : str, optional
        Name of the array in messages.

    Returns
    -------
    QuantizedArray
        Quantized array in the library and on the device of ``w``.

    Raises
    ------
    NonFiniteError
        If ``w`` or ``weights`` holds NaN or infinity, a scale is beyond the range of the dtype that stores it, or rotated weights are
        beyond that of float32.
    UnsupportedArrayError
        If ``w`` is not an array of a floating-point dtype.
    InvalidArgumentError
        If ``fmt`` is not a BlockFormat or does not fit the shape, or ``weights`` or ``start`` do not fit the array or
        the fit.

    Warns
    -----
    ScaleUnderflowWarning
        If blocks that are not zero decode to zeros because the format rounds their scale to zero.

    Notes
    -----
    Codes are the levels nearest to ``w / scale``, where ``scale`` is the *decoded* scale. So the codes compensate for the
    errors of double quantization. Besides input and output, the workspace is at most 64 MiB on the host and a few hundred
    MiB on a device, or a few times the size of one block where that is more.

    With quantized scales, ``"scale"`` keeps the second-level scales and the offset of ``"absmax"``, so that the choice of
    ``"absmax"`` is among the candidates of every block.

    A rotated format stores the rotated array. Fits then minimize the error of its entries, under the importance that
    :func:`lqlora.ops.rotated_importance` gives them.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; QLoRA, arXiv 2305.14314, section 3. Zero points: GPTQ, arXiv 2210.17323, and
    PEQA, arXiv 2305.14152, equation 1. Signed normalization and the importance in the centroids of fitted levels:
    BOF4, arXiv 2505.06653.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("nf4/64:u8/256:float32"))
    >>> q.shape, q.nbytes, round(float(abs(lq.dequantize(q) - w).max()), 3)
    ((16, 16), 140, 0.149)
    """
    w = plain_array(w, name, FLOATS)
    if not isinstance(fmt, BlockFormat):
        raise InvalidArgumentError(
            f"fmt must be a BlockFormat, such as BlockFormat.parse('nf4/64:float32'), got {given(fmt)}."
        )
    require_choice(fit, "fit", FITS)
    if fit == "levels+scale":
        fmt = with_fitted_levels(fmt)
    importance = None if weights is None else _checked_importance(weights, w, fit)
    if not isinstance(batch_dims, int) or not 0 <= batch_dims <= len(w.shape):
        raise InvalidArgumentError(
            f"batch_dims must be an int from 0 to {len(w.shape)}, the dimensions of {name}, got {given(batch_dims)}."
        )
    if start is not None:
        check_start(start, fmt, tuple(w.shape), fit, batch_dims)
        namespace(w, start.packed)
    if not batch_dims:
        return _quantize_one(Source(w, importance, fmt, name, start), fit, check_finite=check_finite)
    batch_shape = tuple(w.shape[:batch_dims])
    if not prod(batch_shape):
        raise InvalidArgumentError(
            f"batch_dims={batch_dims} must count at least one array, got {name} of shape {tuple(w.shape)}."
        )
    # One by one, so that a member of a stack has the bytes that it would have alone: its own offset and levels.
    parts = []
    starts = [None] * prod(batch_shape) if start is None else start.unstack()
    for index, near in zip(_indices(batch_shape), starts, strict=True):
        own = None if importance is None else importance[(*index, ...)]
        source = Source(w[(*index, ...)], own, fmt, f"{name}[{', '.join(map(str, index))}]", near)
        parts.append(_quantize_one(source, fit, check_finite=check_finite))
    return QuantizedArray.stack(parts, batch_shape)


def with_fitted_levels(fmt: BlockFormat) -> BlockFormat:
    """Return the format of an array that is quantized with ``fit="levels+scale"``.

    Parameters
    ----------
    fmt : BlockFormat
        Format that was asked for.

    Returns
    -------
    BlockFormat
        The same with one set of levels for the array, unless it stores levels already.

    Raises
    ------
    FormatError
        If levels of the codebook cannot be fitted.
    """
    return replace(fmt, levels="matrix") if fmt.levels == "codebook" else fmt


def _checked_importance(weights: Array, w: Array, fit: str) -> Array:
    """Return importance broadcast to the shape of the array; raise if a value is negative or not finite.

    It is divided by a power of four if its largest value is far from one, so that weighted squares stay in float64.
    """
    weights = plain_array(weights, "weights", FLOATS)
    xp = namespace(w, weights)
    if fit == "absmax":
        raise InvalidArgumentError("weights need fit='scale' or 'levels+scale', got 'absmax', which ignores weights.")
    wide = ops.widen(weights)
    ops.require_finite(wide, "weights")
    if prod(weights.shape):
        if (least := float(xp.min(wide))) < 0:
            raise InvalidArgumentError(f"weights must not be negative, got a minimum of {least:.4g}.")
        unit = ops.power_of_four(float(xp.max(wide)), 2.0**40, dtype_name(wide))
        weights = weights if unit == 1.0 else wide / unit
    try:
        return xp.broadcast_to(weights, w.shape)
    except (ValueError, RuntimeError):
        shapes = f"the array, {tuple(w.shape)}, got {tuple(weights.shape)}"
        raise InvalidArgumentError(f"weights must have a shape that broadcasts to that of {shapes}.") from None


def check_start(start: QuantizedArray, fmt: BlockFormat, shape: tuple[int, ...], fit: str, batch_dims: int = 0) -> None:
    """Raise unless a fit may start from a quantized array.

    Parameters
    ----------
    start : QuantizedArray
        The array.
    fmt : BlockFormat
        Format that it must have.
    shape : tuple of int
        Shape that it must have.
    fit : {"absmax", "scale", "levels+scale"}
        The fit.
    batch_dims : int, default 0
        Number of its batch dimensions.

    Raises
    ------
    InvalidArgumentError
        If it is another kind of object or array, or the fit does not search.
    """
    if fit == "absmax":
        raise InvalidArgumentError("start needs fit='scale' or 'levels+scale', got 'absmax', which does not search.")
    require_quantized(start, "start")
    found = start.format, start.shape, len(start.batch_shape)
    if found != (fmt, shape, batch_dims):
        raise InvalidArgumentError(
            f"start must have format {fmt}, shape {shape} and {batch_dims} batch dimensions, got {found[0]}, {found[1]} "
            f"and {found[2]}."
        )


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the indices of a batch in row-major order."""
    return list(itertools.product(*map(range, shape)))


def _quantize_one(source: Source, fit: Fit, *, check_finite: bool) -> QuantizedArray:
    if source.fmt.rotation is not None:
        return as_rotated(
            _quantize_one(_rotated(source, check_finite=check_finite), fit, check_finite=check_finite), source.fmt
        )
    statistic, choice, levels = choose(source, fit, check_finite=check_finite)
    if lost := lost_blocks(source, statistic, choice, levels):
        warn(
            f"{lost} of {statistic.shape[0]} blocks of {printable(source.name)} are not zero but decode to zeros: their scales "
            f"round to zero in {source.fmt.scales}. Scale the weights up, or choose a dtype of wider range.",
            ScaleUnderflowWarning,
        )
    return assemble(source, choice, levels)


def _rotated(source: Source, *, check_finite: bool) -> Source:
    """Return what is stored of an array in a rotated format, as an array to quantize in the format without rotation."""
    rotation, importance = source.fmt.rotation, source.importance
    assert rotation is not None
    source.fmt.lines(tuple(source.array.shape))  # raises if an axis is missing
    array = rotated(source.array, rotation, source.name, check_finite=check_finite)
    for axis in rotation.seeds if importance is not None else ():
        importance = ops.rotated_importance(importance, axis=axis)
    start = None if source.start is None else as_stored(source.start)
    return Source(array, importance, source.fmt.unrotated, source.name, start)


def dequantize(q: QuantizedArray, *, out: Array | None = None, dtype: str = "float32") -> Array:
    """Decode a quantized array to a dense one.

    Parameters
    ----------
    q : QuantizedArray
        Quantized array.
    out : array of shape ``q.shape``, optional
        Array of any strides to write the result to, in the library and on the device of ``q``. It is returned.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Dtype of the result if ``out`` is not given. The product of level and scale is rounded to float32 first.

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
    On the CPU the memory of a result of 4 MiB or more is reused: it is kept when the last array or tensor in it is deleted,
    for the next result of the same size. New pages cost more than decoding. At most 128 MiB are kept. Such a result cannot
    be resized in place. Resize a copy, or pass an array of your own as ``out``.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.array([0.0, 2.0, -2.0]), lq.BlockFormat(lq.NF4))
    >>> lq.dequantize(q).tolist()
    [0.0, 2.0, -2.0]
    """
    require_quantized(q)
    if out is None:
        out = empty(q.shape, ops.native_dtype(q.packed, dtype), q.packed)
    else:
        namespace(q.packed, out)  # refuses arrays of two libraries or devices
        if tuple(out.shape) != q.shape:
            raise InvalidArgumentError(f"out must have shape {q.shape}, got {tuple(out.shape)}.")
        require_writable(out, "out")
    for index, part in zip(_indices(q.batch_shape), q.unstack(), strict=True):
        own = out[(*index, ...)] if index else out
        if q.format.rotation is None:
            decode_into(part, own)
        elif dtype_name(own) == "float32":
            decode_into(as_stored(part), own)
            unrotate(own, q.format.rotation)
        else:
            own[...] = ops.storage_cast(unrotate(dequantize(as_stored(part)), q.format.rotation), dtype_name(own))
    return out


def matmul(
    x: Array, q: QuantizedArray, lora_A: Array | None = None, lora_B: Array | None = None, scaling: float = 1.0
) -> Array:
    """Multiply rows by a quantized weight, and optionally add their product with low-rank factors.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (..., n)
        Inputs. For a stack the shape is (batch, ..., rows, n), where batch stands for its batch dimensions.
    q : QuantizedArray of shape (m, n), or a stack of shape (batch, m, n)
        Quantized weight, or one for each expert.
    lora_A, lora_B : array of the dtype of ``x`` or of float32, shape (rank, n) and (m, rank), optional
        Low-rank factors, both or neither. For a stack they have its batch dimensions in front.
    scaling : float, default 1.0
        Factor of the low-rank part.

    Returns
    -------
    array of the dtype of ``x``, shape (..., m)
        ``x @ dequantize(q).T + scaling * (x @ lora_A.T) @ lora_B.T``. Of a stack, each matrix multiplies its own rows, with
        the result of a call for the matrix alone.

    Raises
    ------
    InvalidArgumentError
        If only one factor is given, the weight is not a matrix or a stack of matrices, or the rows do not have its number of
        columns and its batch dimensions.
    UnsupportedArrayError
        If ``x`` is not an array of a floating-point dtype.

    Notes
    -----
    The weight is decoded a few rows at a time, 2 MiB of them on the host and 128 MiB on a device. It is decoded as a
    whole only if it is smaller, its blocks do not run along its rows, or its rows have separate levels.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.eye(4, dtype=np.float32), lq.BlockFormat(lq.NF4, 4))
    >>> lq.matmul(np.ones((1, 4), dtype=np.float32), q).tolist()
    [[1.0, 1.0, 1.0, 1.0]]

    Two experts, each with one row:

    >>> stack = lq.quantize(np.stack([np.eye(4), -np.eye(4)]), lq.BlockFormat(lq.NF4, 4), batch_dims=1)
    >>> lq.matmul(np.ones((2, 1, 4), dtype=np.float32), stack).tolist()
    [[[1.0, 1.0, 1.0, 1.0]], [[-1.0, -1.0, -1.0, -1.0]]]
    """
    if (lora_A is None) != (lora_B is None):
        given = "lora_B" if lora_A is None else "lora_A"
        raise InvalidArgumentError(f"lora_A and lora_B must be given together, got {given} alone.")
    require_quantized(q)
    x = plain_array(x, "x", FLOATS)
    if lora_A is not None:
        lora_A, lora_B = plain_array(lora_A, "lora_A", FLOATS), plain_array(lora_B, "lora_B", FLOATS)
    namespace(x, q.packed, lora_A, lora_B)  # refuses arrays of two libraries or devices
    if len(q.shape) != 2 or q.batch_shape or not x.shape or x.shape[-1] != q.shape[1]:
        return _multiply_stack(x, q, lora_A, lora_B, scaling)
    if lora_A is not None:
        _check_factors(lora_A, lora_B, x, q.shape)
    y = multiply(x, q)
    return y if lora_A is None else ops.add_low_rank(y, x, lora_A, lora_B, scaling)


def _multiply_stack(x: Array, q: QuantizedArray, lora_A: Array | None, lora_B: Array | None, scaling: float) -> Array:
    """Return the products of a stack of matrices, each with its own rows."""
    batch, shape = q.batch_shape, tuple(x.shape)
    if len(q.shape) != len(batch) + 2:
        raise InvalidArgumentError(
            f"x must be multiplied by a matrix or a stack of matrices, got q of shape {q.shape}"
            f"{f' with {len(batch)} batch dimensions' if batch else ''}."
        )
    if not shape or shape[-1] != q.shape[-1] or shape[: len(batch)] != batch or len(shape) < len(q.shape) * bool(batch):
        own = "".join(f"{length}, " for length in batch)
        raise InvalidArgumentError(
            f"x must have as many columns as q, shape ({own}..., {'rows, ' if batch else ''}{q.shape[-1]}), got shape {shape}."
        )
    if lora_A is not None:
        _check_factors(lora_A, lora_B, x, q.shape)
    found = []
    for index, part in zip(_indices(batch), q.unstack(), strict=True):
        rows = x[(*index, ...)]
        y = multiply(rows, part)
        if lora_A is not None and lora_B is not None:
            y = ops.add_low_rank(y, rows, lora_A[(*index, ...)], lora_B[(*index, ...)], scaling)
        found.append(y)
    return stacked(found, batch)


def _check_factors(lora_A: Array, lora_B: Array, x: Array, shape: tuple[int, ...]) -> None:
    """Raise unless the factors of a product have the rank, the sides and the dtype that it takes."""
    left, right = tuple(lora_B.shape), tuple(lora_A.shape)
    *batch, rows, columns = shape
    if not len(left) == len(right) == len(shape) or left[:-1] + right[-1:] != shape or right[:-1] != (*batch, left[-1]):
        own = "".join(f"{length}, " for length in batch)
        raise InvalidArgumentError(
            f"lora_B and lora_A must have shapes ({own}{rows}, rank) and ({own}rank, {columns}), got {left} and {right}."
        )
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if dtype_name(factor) not in ("float32", dtype_name(x)):
            raise UnsupportedArrayError(
                f"{name} must be float32 or of the dtype of x, which is {dtype_name(x)}, got {dtype_name(factor)}."
            )


def multiply(x: Array, q: QuantizedArray) -> Array:
    """Return ``x @ dequantize(q).T`` without checks, for a matrix ``q`` and rows of its library, device and length.

    In a rotated format the rows are rotated, and the products rotated back.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (..., n)
        Rows.
    q : QuantizedArray of shape (m, n)
        Quantized weight, not a stack.

    Returns
    -------
    array of the dtype of ``x``, shape (..., m)
        Products.
    """
    if q.format.rotation is not None:
        return product(x, q, multiply)
    xp, layout, device = namespace(x), layout_of(q.format, q.shape), device_of(x)
    lead, (rows, columns) = tuple(x.shape[:-1]), q.shape
    flat = x if len(lead) == 1 else xp.reshape(x, (prod(lead), columns))
    levels = host_levels(q.levels, layout.codebook)
    is_tracked = getattr(x, "requires_grad", False) and requires_gradient(x)
    # Kernels decode whole rows of codes from one table. With levels by line, or blocks down the columns, the weight is
    # decoded first, and so it is where autograd has to multiply by it again.
    follows_rows = layout.axis not in (0, -2) if layout.is_trellis else layout.follows_rows
    if levels is None or q.offset is not None or not follows_rows or is_tracked:
        # Blocks down the columns are decoded to a matrix that lies column by column: each is written where it is.
        is_down, dtype = layout.axis in (0, -2), ops.native_dtype(x, ops.factor_dtype(x))
        memory = xp.empty((columns, rows) if is_down else q.shape, dtype=dtype, device=device)
        dense = xp.matrix_transpose(memory) if is_down else memory
        decode_into(q, dense)
        y = ops.matmul_dense(flat, dense)
    else:
        out = xp.empty((flat.shape[0], rows), dtype=x.dtype, device=device)
        scales, coding = decode_scales(q.scales, q.format.scales), (layout.bits, layout.block_size)
        if layout.is_trellis:
            length = rows * columns if layout.is_even else columns
            y = ops.matmul_trellis(flat, ops.PackedTrellis(q.packed, scales, levels, *coding, length), out)
        else:
            y = ops.matmul_packed(flat, ops.PackedBlocks(q.packed, scales, zero_point_codes(q), levels, *coding), out)
    return y if len(lead) == 1 else xp.reshape(y, (*lead, rows))
