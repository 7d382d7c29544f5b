"""Quantized arrays: what is stored, and the checks on it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import FormatError, InvalidArgumentError, LQLoRAError, UnsupportedArrayError
from lqlora.formats import BlockFormat, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lqlora._typing import Array, Namespace
    from lqlora.codebooks import Codebook

__all__ = ["QuantizedArray"]


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A block-quantized array. Made by :func:`quantize` or :meth:`from_arrays`, not changed afterwards.

    Every stored array may have leading batch dimensions, the first ones of ``shape``: then this is a stack of arrays
    that were quantized one by one, such as the experts of a layer. What follows describes one of them, of ``n`` weights
    in ``blocks`` blocks.

    Parameters
    ----------
    packed : array of uint8, shape (ceil(n * bits / 8),)
        Packed codes, in the layout of :mod:`lqlora.ops.packing`, block after block.
    scales : array, shape (blocks,), or QuantizedArray
        One scale per block, in the storage the format names; quantized itself under double quantization.
    format : BlockFormat
        Codebook, block size, axis and scale format.
    shape : tuple of int
        Shape of the dense array, batch dimensions included.
    offset : array of float32, shape (1,), optional
        Added to every decoded value: set only where this array is the scales of another.
    zero_points : array of uint8, shape (ceil(blocks * bits / 8),), optional
        Packed codes that zero has in each block of an affine format.
    levels : array of float32, shape (sets, number of levels), optional
        Fitted levels, where the format has them: of the whole array, or of each group of lines.
    """

    packed: Array
    scales: Array | QuantizedArray
    format: BlockFormat
    shape: tuple[int, ...]
    offset: Array | None = None
    zero_points: Array | None = None
    levels: Array | None = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions of ``shape`` that count the arrays of a stack; empty for a single array."""
        return tuple(self.packed.shape[:-1])

    @property
    def codes(self) -> Array:
        """Unpacked codes as an array of uint8 of the dense shape, computed at each access."""
        from lqlora.quantized._encoding import unpacked  # noqa: PLC0415 - which needs this class

        return stacked([unpacked(q) for q in self.unstack()], self.batch_shape)

    @property
    def codebook(self) -> Codebook:
        """The codebook of the format. If the array has fitted levels, those count and not the codebook's."""
        return self.format.codebook

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays; for a single array ``8 * nbytes == format.storage_bits(shape)``."""
        return sum(ops.stored_bytes(array) for array in self.to_arrays().values())

    def __getitem__(self, index: int) -> QuantizedArray:
        """Return one array of a stack; nothing is copied."""
        if not self.batch_shape:
            raise InvalidArgumentError("Only a stack of quantized arrays has items; this is a single one.")
        if not -self.batch_shape[0] <= index < self.batch_shape[0]:
            raise IndexError(f"Item {index} of a stack of {self.batch_shape[0]}.")
        arrays = {name: array[index, ...] for name, array in self.to_arrays().items()}
        return _rebuild(arrays, self.format, self.shape[1:], len(self.batch_shape) - 1, offset=self.offset is not None)

    @classmethod
    def stack(cls, parts: Sequence[QuantizedArray], batch_shape: tuple[int, ...]) -> QuantizedArray:
        """Join arrays of one format and shape: the inverse of :meth:`unstack`.

        Parameters
        ----------
        parts : sequence of QuantizedArray of shape (...)
            As many as the batch has, in row-major order; none of them a stack itself.
        batch_shape : tuple of int
            Dimensions to put in front.

        Returns
        -------
        QuantizedArray of shape ``(*batch_shape, ...)``
            The stack.

        Raises
        ------
        InvalidArgumentError
            If there are too few or too many, or they differ in format or shape.
        """
        kinds = {(part.format, part.shape, part.batch_shape) for part in parts}
        if len(parts) != prod(batch_shape) or len(kinds) != 1 or parts[0].batch_shape:
            raise InvalidArgumentError(
                f"A stack of {batch_shape} is made of {prod(batch_shape)} arrays of one format and one shape, not of "
                f"{len(parts)} of {len(kinds)} kind(s)."
            )
        arrays = [part.to_arrays() for part in parts]
        joined = {key: stacked([own[key] for own in arrays], batch_shape) for key in arrays[0]}
        shape = (*batch_shape, *parts[0].shape)
        return _rebuild(joined, parts[0].format, shape, len(batch_shape), offset=parts[0].offset is not None)

    def unstack(self) -> list[QuantizedArray]:
        """Return the arrays of a stack in order, without its batch dimensions; a single array is a stack of itself.

        Returns
        -------
        list of QuantizedArray
            Views, no copies.
        """
        if not self.batch_shape:
            return [self]
        return [q for index in range(self.batch_shape[0]) for q in self[index].unstack()]

    def to_arrays(self) -> dict[str, Array]:
        """Return the stored arrays by name.

        Returns
        -------
        dict of str to array
            ``codes`` and ``scales``, or under double quantization ``codes``, ``scales.codes``, ``scales.scales`` and
            ``scales.offset``, and so on for deeper levels; ``zero_points`` and ``levels`` where the format has them. No
            array is copied.

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
        optional = {"offset": self.offset, "zero_points": self.zero_points, "levels": self.levels}
        return arrays | {name: array for name, array in optional.items() if array is not None}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array], fmt: BlockFormat, shape: tuple[int, ...], batch_dims: int = 0
    ) -> QuantizedArray:
        """Rebuild from the arrays of :meth:`to_arrays`, after checking every one.

        Parameters
        ----------
        arrays : mapping of str to array
            The stored arrays.
        fmt : BlockFormat
            Their format.
        shape : tuple of int
            Shape of the dense array.
        batch_dims : int, default 0
            Number of leading dimensions that count the arrays of a stack.

        Returns
        -------
        QuantizedArray
            Shares the arrays, no copy.

        Raises
        ------
        FormatError
            If an array is missing or left over, or has the wrong length or dtype, a code is beyond the codebook, levels
            are not sorted, a stored scale has a sign that the format does not allow, or finite arrays decode to
            infinite scales. What is stored as NaN or infinity is let through: it may be what someone wants to look at.
        MixedArraysError
            If the arrays belong to two libraries.

        Notes
        -----
        Quantized scales may decode to negative numbers where their codebook has a sign: those of blocks of zeros do if
        the mean was subtracted, and those of bitsandbytes do.
        """
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            raise FormatError(f"A shape has lengths of at least 0: {tuple(shape)}.")
        if not 0 <= batch_dims <= len(shape) or not prod(shape[:batch_dims]):
            raise FormatError(f"A stack holds at least one array; {batch_dims} dimensions of {tuple(shape)} do not.")
        quantized = _rebuild(dict(arrays), fmt, tuple(shape), batch_dims, offset=False)
        namespace(*quantized.to_arrays().values())  # refuses arrays of several libraries
        _check_values(quantized)
        _check_decoded_scales(quantized)
        return quantized

    def to(self, xp: Namespace, device: object = None) -> QuantizedArray:
        """Move to another array library or device: the one explicit way to do so. Memory is shared where both allow it.

        Parameters
        ----------
        xp : module
            Target namespace, such as ``numpy`` or ``torch``.
        device : object, optional
            Target device, in the words of that library. If not given, arrays of that library stay on their device.

        Returns
        -------
        QuantizedArray
            The same bytes there.
        """
        moved = {name: ops.convert(array, xp, device) for name, array in self.to_arrays().items()}
        return _rebuild(moved, self.format, self.shape, len(self.batch_shape), offset=self.offset is not None)


def stacked(arrays: list[Array], batch_shape: tuple[int, ...]) -> Array:
    """Return arrays of one shape as one, with the batch dimensions in front."""
    if not batch_shape:
        return arrays[0]
    xp = namespace(*arrays)
    return xp.reshape(xp.stack(arrays), (*batch_shape, *arrays[0].shape))


def _rebuild(
    arrays: dict[str, Array], fmt: BlockFormat, shape: tuple[int, ...], batch_dims: int, *, offset: bool
) -> QuantizedArray:
    """Check names, lengths and dtypes, level by level."""
    batch, own = shape[:batch_dims], shape[batch_dims:]
    try:
        lines, length = fmt.lines(own)
    except InvalidArgumentError as error:
        raise FormatError(str(error)) from None
    blocks = lines * -(-length // fmt.block_size)
    packed = _take(arrays, "codes", "uint8", (*batch, ops.packed_size(lines * length, fmt.bits)))
    own_offset = _take(arrays, "offset", "float32", (*batch, 1)) if offset else None
    affine, sets = fmt.codebook.normalization == "affine", fmt.level_sets(own)
    zero_points = _take(arrays, "zero_points", "uint8", (*batch, ops.packed_size(blocks, fmt.bits))) if affine else None
    levels = _take(arrays, "levels", "float32", (*batch, sets, len(fmt.codebook))) if fmt.levels != "codebook" else None
    scales: Array | QuantizedArray
    if isinstance(fmt.scales, ScaleFormat):
        inner = {key.removeprefix("scales."): arrays.pop(key) for key in list(arrays) if key.startswith("scales.")}
        has_offset = fmt.scales.offset != "none"
        scales = _rebuild(inner, fmt.scales.format, (*batch, blocks), batch_dims, offset=has_offset)
    else:
        scales = _take(arrays, "scales", fmt.scales, (*batch, blocks))
    if arrays:
        raise FormatError(f"Format {fmt} has no array named {', '.join(sorted(arrays))}.")
    return QuantizedArray(packed, scales, fmt, shape, own_offset, zero_points, levels)


def _take(arrays: dict[str, Array], key: str, dtype: str, shape: tuple[int, ...]) -> Array:
    if key not in arrays:
        raise FormatError(f"Array {key!r} is missing.")
    array = arrays.pop(key)
    try:
        found = ops.dtype_name(array), tuple(array.shape)
    except (AttributeError, LQLoRAError):
        raise UnsupportedArrayError(f"{key!r} is not an array.") from None
    if found != (dtype, shape):
        raise FormatError(f"Array {key!r} should be {dtype} of shape {shape}, not {found[0]} of shape {found[1]}.")
    return array


def _check_values(q: QuantizedArray, *, signed: bool = False) -> None:
    """Check codes, levels and the sign of scales; an offset below zero is the mark of signed scales."""
    book = q.format.codebook
    for codes in [] if len(book) == 2**q.format.bits else [part.codes for part in q.unstack()]:
        if prod(codes.shape) and int(namespace(codes).max(codes)) >= len(book):
            raise FormatError(f"A code is beyond the {len(book)} levels of {book.name}.")
    if q.levels is not None:
        _check_levels(q.levels)
    if q.offset is not None:
        _check_scales(q.offset, signed=signed)
    own_sign = book.normalization == "signed"
    if isinstance(q.scales, QuantizedArray):
        _check_values(q.scales, signed=own_sign)
    else:
        _check_scales(q.scales, signed=own_sign)


def _check_levels(levels: Array) -> None:
    if bool(namespace(levels).any(levels[..., 1:] < levels[..., :-1])):
        raise FormatError("Fitted levels are not in ascending order.")


def _check_scales(scales: Array, *, signed: bool) -> None:
    wide = ops.widen(scales)
    if not signed and bool(namespace(wide).any(wide < 0)):
        raise FormatError("A scale, or the offset of scales, is negative.")


def _check_decoded_scales(q: QuantizedArray) -> None:
    """Refuse what :func:`quantize` never stores: second-level scales or an offset under which a scale overflows."""
    from lqlora.quantized._encoding import decode_scales  # noqa: PLC0415 - which needs this class

    if not isinstance(q.scales, QuantizedArray) or not all(map(_is_finite, q.scales.to_arrays().values())):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        decoded = [decode_scales(part.scales) for part in q.unstack()]
    if not all(map(_is_finite, decoded)):
        raise FormatError("The arrays of 'scales' are finite, but a scale that they decode to is not.")


def _is_finite(array: Array) -> bool:
    return ops.dtype_name(array) == "uint8" or ops.is_finite(ops.widen(array))
