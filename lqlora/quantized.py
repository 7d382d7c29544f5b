"""Quantized arrays: what is stored, and the two functions between it and dense arrays."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import FormatError, InvalidArgumentError, LQLoRAError, NonFiniteError, UnsupportedArrayError
from lqlora.formats import BlockFormat, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora._typing import Array, Namespace

__all__ = ["QuantizedArray", "dequantize", "matmul", "quantize"]


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A block-quantized array. Made by :func:`quantize` or :meth:`from_arrays`, not changed afterwards.

    Parameters
    ----------
    packed : array of uint8, shape (ceil(n * bits / 8),)
        Packed codes, in the layout of :mod:`lqlora.ops.packing`.
    scales : array, shape (ceil(n / block_size),), or QuantizedArray
        One scale per block, in the storage the format names; quantized itself under double quantization.
    format : BlockFormat
        Codebook, block size and scale format.
    shape : tuple of int
        Shape of the dense array; ``n`` is its size. Blocks follow the row-major order.
    offset : array of float32, shape (1,), optional
        Added to every decoded value: set only where this array is the scales of another.
    """

    packed: Array
    scales: Array | QuantizedArray
    format: BlockFormat
    shape: tuple[int, ...]
    offset: Array | None = None

    @property
    def codes(self) -> Array:
        """Unpacked codes as an array of uint8 of the dense shape, computed at each access."""
        flat = ops.unpack_codes(self.packed, self.format.bits, prod(self.shape))
        return namespace(flat).reshape(flat, self.shape)

    @property
    def codebook(self) -> object:
        """The codebook of the format."""
        return self.format.codebook

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays; ``8 * nbytes == format.storage_bits(shape)``."""
        return sum(ops.stored_bytes(array) for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, Array]:
        """Return the stored arrays by name.

        Returns
        -------
        dict of str to array
            ``codes`` and ``scales``, or under double quantization ``codes``, ``scales.codes``, ``scales.scales`` and
            ``scales.offset``, and so on for deeper levels. No array is copied.

        Examples
        --------
        >>> import numpy as np, lqlora as lq
        >>> q = lq.quantize(np.ones(100, dtype=np.float32), lq.BlockFormat.parse("nf4/64:u8/256:float32"))
        >>> sorted(q.to_arrays())
        ['codes', 'scales.codes', 'scales.offset', 'scales.scales']
        """
        arrays = {"codes": self.packed}
        if isinstance(self.scales, QuantizedArray):
            arrays |= {f"scales.{name}": array for name, array in self.scales.to_arrays().items()}
        else:
            arrays["scales"] = self.scales
        if self.offset is not None:
            arrays["offset"] = self.offset
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], fmt: BlockFormat, shape: tuple[int, ...]) -> QuantizedArray:
        """Rebuild from the arrays of :meth:`to_arrays`, after checking every one.

        Parameters
        ----------
        arrays : mapping of str to array
            The stored arrays.
        fmt : BlockFormat
            Their format.
        shape : tuple of int
            Shape of the dense array.

        Returns
        -------
        QuantizedArray
            Shares the arrays, no copy.

        Raises
        ------
        FormatError
            If an array is missing or left over, or has the wrong length or dtype, a code is beyond the codebook, or a
            scale is negative.
        MixedArraysError
            If the arrays belong to two libraries.
        """
        if any(length < 0 for length in shape):
            raise FormatError(f"A shape has no negative lengths: {tuple(shape)}.")
        quantized = _rebuild(dict(arrays), fmt, tuple(shape), offset=False)
        namespace(*quantized.to_arrays().values())  # refuses arrays of several libraries
        _check_values(quantized)
        return quantized

    def to(self, xp: Namespace, device: object = None) -> QuantizedArray:
        """Move to another array library or device: the one explicit way to do so. Memory is shared where both allow it.

        Parameters
        ----------
        xp : module
            Target namespace, such as ``numpy`` or ``torch``.
        device : object, optional
            Target device, in the words of that library.

        Returns
        -------
        QuantizedArray
            The same bytes there.
        """
        moved = {name: ops.convert(array, xp, device) for name, array in self.to_arrays().items()}
        return _rebuild(moved, self.format, self.shape, offset=self.offset is not None)


def quantize(w: Array, fmt: BlockFormat, *, check_finite: bool = True, name: str = "the array") -> QuantizedArray:
    """Quantize an array block by block, each block against its absolute maximum.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, any shape and strides
        Weights. The result depends on the logical order of the entries only.
    fmt : BlockFormat
        Codebook, block size and scale format.
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
        If ``w`` holds NaN or infinity, or a scale is beyond the range of the dtype that stores it.
    UnsupportedArrayError
        If ``w`` is not an array of a floating-point dtype.
    InvalidArgumentError
        If ``fmt`` is no BlockFormat.

    Notes
    -----
    The scale of a block is its absolute maximum, divided by the largest absolute level where that is not 1; codes are the nearest levels of ``w / scale``, where ``scale`` is the
    *decoded* scale, so that the errors of double quantization are compensated by the codes.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2; QLoRA, arXiv 2305.14314, section 3.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> w = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)
    >>> q = lq.quantize(w, lq.BlockFormat.parse("nf4/64:u8/256:float32"))
    >>> q.shape, q.nbytes, round(float(abs(lq.dequantize(q) - w).max()), 3)
    ((16, 16), 140, 0.149)
    """
    xp = namespace(w)
    if not isinstance(fmt, BlockFormat):
        raise InvalidArgumentError(
            f"A format is a BlockFormat, such as BlockFormat.parse('nf4/64:float32'), not {fmt!r}."
        )
    wide = ops.widen(w, name)
    if check_finite:
        ops.require_finite(wide, name)
    return _quantize(xp.reshape(wide, (-1,)), fmt, tuple(w.shape), name)


def _quantize(flat: Array, fmt: BlockFormat, shape: tuple[int, ...], name: str) -> QuantizedArray:
    absmax = ops.block_absmax(flat, fmt.block_size)
    widest = fmt.codebook.widest
    absmax = absmax if widest == 1.0 else absmax / widest
    scales = _store_scales(absmax, fmt.scales, name)
    decoded = _decode_scales(scales)
    _require_scales(decoded, fmt.scales, name)  # a rounded second-level scale plus the offset may be out of range
    xp = namespace(flat)
    packed = ops.encode(flat, xp.astype(decoded, flat.dtype), fmt.codebook.boundaries, fmt.bits, fmt.block_size)
    return QuantizedArray(packed, scales, fmt, shape)


def _store_scales(absmax: Array, scale_format: str | ScaleFormat, name: str) -> Array | QuantizedArray:
    xp = namespace(absmax)
    if not isinstance(scale_format, ScaleFormat):
        stored = ops.storage_cast(absmax, scale_format)
        _require_scales(ops.widen(stored), scale_format, name)
        return stored
    absmax = ops.storage_cast(absmax, "float32")
    _require_scales(absmax, "float32", name)
    offset = None
    if scale_format.offset == "min":
        offset = xp.reshape(xp.min(absmax), (1,)) if absmax.shape[0] else xp.zeros((1,), dtype=xp.float32)
        absmax = absmax - offset
    inner = _quantize(absmax, scale_format.format, tuple(absmax.shape), name)
    return QuantizedArray(inner.packed, inner.scales, inner.format, inner.shape, offset)


def _require_scales(scales: Array, scale_format: str | ScaleFormat, name: str) -> None:
    try:
        ops.require_finite(scales, "The array of scales")
    except NonFiniteError as error:
        raise NonFiniteError(f"A scale of {name} is beyond the range of {scale_format}: {error}") from None


def _decode_scales(scales: Array | QuantizedArray) -> Array:
    return dequantize(scales) if isinstance(scales, QuantizedArray) else ops.widen(scales)


def dequantize(q: QuantizedArray, *, out: Array | None = None, dtype: str = "float32") -> Array:
    """Return the dense array.

    Parameters
    ----------
    q : QuantizedArray
        Quantized array.
    out : array of shape ``q.shape``, optional
        Written to and returned instead of a new array; of the library and device of ``q``.
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

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.array([0.0, 2.0, -2.0]), lq.BlockFormat(lq.NF4))
    >>> lq.dequantize(q).tolist()
    [0.0, 2.0, -2.0]
    """
    xp = namespace(q.packed, out)
    count = prod(q.shape)
    scales = _decode_scales(q.scales)
    flat = ops.decode(q.packed, scales, q.format.codebook.levels, q.format.bits, q.format.block_size, count)
    if q.offset is not None:
        with np.errstate(over="ignore"):  # quantize() looks at the decoded scales and refuses infinite ones
            flat = flat + q.offset
    dense = xp.reshape(flat, q.shape)
    if out is not None:
        if tuple(out.shape) != q.shape:
            raise InvalidArgumentError(f"out has shape {tuple(out.shape)}, the array has {q.shape}.")
        out[...] = xp.astype(dense, out.dtype)
        return out
    return dense if dtype == "float32" else ops.storage_cast(dense, dtype)


def matmul(
    x: Array, q: QuantizedArray, lora_A: Array | None = None, lora_B: Array | None = None, scaling: float = 1.0
) -> Array:
    """Apply a quantized weight, and its low-rank part, to rows.

    Parameters
    ----------
    x : array of float32, shape (..., n)
        Inputs.
    q : QuantizedArray of shape (m, n)
        Quantized weight.
    lora_A, lora_B : array, shape (rank, n) and (m, rank), optional
        Low-rank factors, both or neither.
    scaling : float, default 1.0
        Factor of the low-rank part.

    Returns
    -------
    array of float32, shape (..., m)
        ``x @ dequantize(q).T + scaling * (x @ lora_A.T) @ lora_B.T``.

    Raises
    ------
    InvalidArgumentError
        If only one factor is given, the weight is no matrix, or the rows do not have its number of columns.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> q = lq.quantize(np.eye(4, dtype=np.float32), lq.BlockFormat(lq.NF4, 4))
    >>> lq.matmul(np.ones((1, 4), dtype=np.float32), q).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    if (lora_A is None) != (lora_B is None):
        raise InvalidArgumentError("Give both lora_A and lora_B, or neither.")
    if len(q.shape) != 2 or not x.shape or x.shape[-1] != q.shape[1]:
        raise InvalidArgumentError(f"Rows of shape {tuple(x.shape)} do not fit a weight of shape {q.shape}.")
    return ops.matmul_dense(x, dequantize(q), lora_A, lora_B, scaling)


def _rebuild(arrays: dict[str, Array], fmt: BlockFormat, shape: tuple[int, ...], *, offset: bool) -> QuantizedArray:
    """Check names, lengths and dtypes, level by level."""
    count = prod(shape)
    blocks = -(-count // fmt.block_size)
    packed = _take(arrays, "codes", "uint8", ops.packed_size(count, fmt.bits))
    own_offset = _take(arrays, "offset", "float32", 1) if offset else None
    scales: Array | QuantizedArray
    if isinstance(fmt.scales, ScaleFormat):
        inner = {key.removeprefix("scales."): arrays.pop(key) for key in list(arrays) if key.startswith("scales.")}
        scales = _rebuild(inner, fmt.scales.format, (blocks,), offset=fmt.scales.offset != "none")
    else:
        scales = _take(arrays, "scales", fmt.scales, blocks)
    if arrays:
        raise FormatError(f"Format {fmt} has no array named {', '.join(sorted(arrays))}.")
    return QuantizedArray(packed, scales, fmt, shape, own_offset)


def _take(arrays: dict[str, Array], key: str, dtype: str, length: int) -> Array:
    if key not in arrays:
        raise FormatError(f"Array {key!r} is missing.")
    array = arrays.pop(key)
    try:
        found = ops.dtype_name(array), tuple(array.shape)
    except (AttributeError, LQLoRAError):
        raise UnsupportedArrayError(f"{key!r} is not an array.") from None
    if found != (dtype, (length,)):
        raise FormatError(f"Array {key!r} should be {dtype} of shape ({length},), not {found[0]} of shape {found[1]}.")
    return array


def _check_values(q: QuantizedArray) -> None:
    if len(q.format.codebook) < 2**q.format.bits:
        codes = q.codes
        if prod(q.shape) and int(namespace(codes).max(codes)) >= len(q.format.codebook):
            raise FormatError(f"A code is beyond the {len(q.format.codebook)} levels of {q.format.codebook.name}.")
    if q.offset is not None:
        _check_scales(q.offset)
    if isinstance(q.scales, QuantizedArray):
        _check_values(q.scales)
    else:
        _check_scales(q.scales)


def _check_scales(scales: Array) -> None:
    wide = ops.widen(scales)
    if bool(namespace(wide).any(wide < 0)):
        raise FormatError("A scale, or the offset of scales, is negative.")
