"""Plan of an array in a format: lines, blocks, packed codes, and the pieces that are worked on one at a time.

A plan depends on the format and the shape alone. It is made once by :func:`layout_of` and kept, so that quantizing,
decoding and multiplying look it up instead of working it out again.

Weights are numbered in *block order*: the row-major order of the array with the axis of the blocks moved to the end. A
block is then a range of consecutive numbers. Pieces bound the workspace: no step of quantization holds more than a few
pieces besides its input and its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from typing import TYPE_CHECKING, TypeAlias

from lqlora import ops
from lqlora._dispatch import device_of, namespace, preferred_piece
from lqlora.codebooks import Trellis

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lqlora._typing import Array
    from lqlora.codebooks import Codebook
    from lqlora.formats import BlockFormat

    #: A range of weights, and the range of their blocks where each of them is whole or the array has only one.
    Piece: TypeAlias = tuple[slice, slice | None]

__all__ = ["Layout", "blocks_last", "bytes_of", "in_shape", "layout_of", "piece_size", "stream_size"]

#: Arrays of at most this many weights are one piece, on the host and on devices alike.
_SMALL = 1 << 19


def piece_size(array: Array) -> int:
    """Return the number of weights to work on at a time: as many as fit a cache, or fill a device."""
    return _SMALL if ops.is_on_host(array) else 1 << 23


def stream_size(array: Array) -> int:
    """Return the number of weights to pass at a time to operations that read and write memory in place.

    Where an operation would first copy its piece, this is :func:`piece_size`.
    """
    return (ops.is_contiguous(array) and preferred_piece(array)) or piece_size(array)


def bytes_of(codes: slice, bits: int) -> slice:
    """Return the range of bytes that a range of packed codes takes. Its start must begin a byte."""
    return slice(codes.start * bits // 8, ops.packed_size(codes.stop, bits))


def blocks_last(array: Array, axis: int | None) -> Array:
    """Return a view whose row-major order is block order."""
    return array if axis is None else namespace(array).moveaxis(array, axis, -1)


def in_shape(flat: Array, axis: int | None, shape: Sequence[int]) -> Array:
    """Return an array of a shape from all of its entries in block order."""
    xp, moved = namespace(flat), list(shape)
    if axis is None:
        return xp.reshape(flat, tuple(shape))
    moved.append(moved.pop(axis))
    return xp.moveaxis(xp.reshape(flat, tuple(moved)), -1, axis)


@dataclass(frozen=True, eq=False)
class Layout:
    """Lines of equal length, each cut into blocks of which the last may be short.

    Two layouts are the same only if they are one object, which makes them cheap keys of caches.

    Parameters
    ----------
    codebook : Codebook
        Codebook of the format.
    lines : int
        Number of lines. No block crosses the end of a line.
    length : int
        Weights of a line.
    blocks : int
        Blocks of all lines.
    block_size : int
        Weights of a whole block, at most ``length`` unless that is zero.
    axis : int, optional
        Axis that lines follow; None for one line of all weights.
    lines_per_set : int, optional
        Number of lines that share a set of fitted levels; None if all lines do.
    is_plain : bool
        Whether the format stores each scale as float32 and rounds to the levels of the codebook.
    """

    codebook: Codebook
    lines: int
    length: int
    blocks: int
    block_size: int
    axis: int | None
    lines_per_set: int | None
    is_plain: bool

    @cached_property
    def bits(self) -> int:
        """Bits of a code."""
        return self.codebook.bits

    @cached_property
    def is_trellis(self) -> bool:
        """True if codes depend on their neighbors."""
        return isinstance(self.codebook, Trellis)

    @cached_property
    def widest(self) -> float:
        """Level that the largest weight of a block is scaled to."""
        return self.codebook.widest

    @cached_property
    def count(self) -> int:
        """Weights of the array."""
        return self.lines * self.length

    @cached_property
    def blocks_per_line(self) -> int:
        """Blocks of one line."""
        return self.blocks // max(1, self.lines)

    @cached_property
    def is_even(self) -> bool:
        """True if block ``i`` begins at weight ``i * block_size``: only the last line may end in a short block."""
        return self.lines <= 1 or self.length % self.block_size == 0

    @cached_property
    def stores_absmax(self) -> bool:
        """True if the stored scales are the absolute maxima of the blocks, bit for bit, for weights up to float32."""
        return self.is_plain and self.codebook.normalization == "absmax" and self.widest == 1.0

    @cached_property
    def follows_rows(self) -> bool:
        """True if the codes of a matrix lie row by row, and block ``i`` begins at weight ``i * block_size``."""
        return self.is_even and self.axis not in (0, -2)

    @cached_property
    def whole(self) -> tuple[Piece, ...]:
        """The only piece of a small array; empty for arrays that are larger, or have no weights."""
        if not 0 < self.count <= _SMALL:
            return ()
        return ((slice(0, self.count), slice(0, self.blocks) if self.is_even else None),)

    def pieces(self, array: Array, *, streams: bool = True) -> Iterable[Piece]:
        """Return the pieces of an array, given in block order. Each begins at a multiple of eight weights.

        A code then begins where a byte does. Pieces are whole lines where groups of lines have separate levels.
        ``streams=False`` bounds the pieces by :func:`piece_size`, for callers that copy each piece.
        """
        if self.whole:
            return self.whole
        if self.lines_per_set is not None:
            return self.line_pieces(piece_size(array))
        # Code i takes bits [b i, b (i + 1)). For odd b only a multiple of eight makes b i one of eight, and then b i / 8 bytes
        # hold the codes before i. Limits are powers of two from 8 up, so pieces that ignore blocks begin right as well.
        limit = stream_size(array) if streams else piece_size(array)
        # Where the ends of blocks and pieces differ, scales are repeated for each weight, which takes workspace.
        lines_up = self.is_even and (self.block_size <= limit or self.blocks == 1)
        return self.byte_pieces(limit if lines_up else piece_size(array))

    def whole_blocks(self, limit: int) -> Iterator[tuple[slice, slice]]:
        """Yield ranges of weights and of blocks: whole blocks, or whole lines where a line ends in a short block."""
        if not self.count:
            return
        # Ragged lines: the block ends are not at multiples of the block size, but whole lines end where blocks do.
        size, factor = (self.block_size, 1) if self.is_even else (self.length, self.blocks_per_line)
        per_step, steps = max(1, limit // size), -(-self.count // size)
        for first in range(0, steps, per_step):
            last = min(first + per_step, steps)
            yield slice(first * size, min(last * size, self.count)), slice(first * factor, last * factor)

    def as_blocks(self, flat: Array) -> Array:
        """Lay a range of :meth:`whole_blocks` out as one row per block, short blocks padded with zeros."""
        xp = namespace(flat)
        row = flat.shape[0] if self.is_even else self.length
        lines = xp.reshape(flat, (-1, row)) if row else xp.reshape(flat, (0, 0))
        # Zeros change neither absolute maxima nor extremes, which include zero. In errors a mask excludes them.
        tail = -row % self.block_size
        if tail:
            padding = xp.zeros((lines.shape[0], tail), dtype=flat.dtype, device=device_of(flat))
            lines = xp.concat([lines, padding], axis=1)
        return xp.reshape(lines, (-1, self.block_size))

    def byte_pieces(self, limit: int) -> Iterator[Piece]:
        """Yield pieces of at most ``limit`` weights; of whole blocks where eight of them fit into one piece."""
        # Eight blocks of any size are a multiple of eight weights. Fewer would need a block size that is one.
        step = limit // self.block_size // 8 * 8
        if self.is_even and step:
            for first in range(0, self.blocks, step):
                last = min(first + step, self.blocks)
                yield (
                    slice(first * self.block_size, min(last * self.block_size, self.count)),
                    slice(first, last),
                )
            return
        only = slice(0, 1) if self.blocks == 1 else None
        for start in range(0, self.count, limit):
            yield slice(start, min(start + limit, self.count)), only

    def aligned_blocks(self, limit: int) -> Iterator[tuple[slice, slice]]:
        """Yield ranges of weights and of blocks as :meth:`whole_blocks`, each of which begins where a byte does."""
        if not self.count:
            return
        size, factor = (self.block_size, 1) if self.is_even else (self.length, self.blocks_per_line)
        unit, steps = 8 // gcd(8, size), -(-self.count // size)
        step = max(1, limit // (unit * size)) * unit
        for first in range(0, steps, step):
            last = min(first + step, steps)
            yield slice(first * size, min(last * size, self.count)), slice(first * factor, last * factor)

    def line_pieces(self, limit: int) -> Iterator[Piece]:
        """Yield pieces of whole lines. The number of lines in a piece is a multiple of eight, except in the last."""
        step = 8 * max(1, limit // 8 // max(1, self.length)) * self.length
        for start in range(0, self.count, step or 1):
            yield slice(start, min(start + step, self.count)), None

    def bytes_of(self, weights: slice) -> slice:
        """Return the range of bytes that the packed codes of a piece take."""
        return bytes_of(weights, self.bits)

    def scales_of(self, scales: Array, zero_points: Array | None, piece: Piece) -> tuple[Array, Array | None, int]:
        """Return the scales and zero points of a piece, and the number of weights that share one.

        A piece that begins or ends within a block gets a scale for each of its weights.
        """
        weights, blocks = piece
        if blocks is None:
            index = self.block_of(weights, scales)
            return ops.pick(scales, index), None if zero_points is None else ops.pick(zero_points, index), 1
        if blocks.stop - blocks.start < self.blocks:
            scales, zero_points = scales[blocks], None if zero_points is None else zero_points[blocks]
        return scales, zero_points, self.block_size

    def sets_of(self, weights: slice, like: Array) -> Array:
        """Return the set of levels of each row that a piece is laid out as: a line, or the whole piece."""
        xp, device = namespace(like), device_of(like)
        if self.lines_per_set is None:
            return xp.zeros((1,), dtype=xp.int64, device=device)
        return self.lines_of(weights, like) // self.lines_per_set

    def lines_of(self, weights: slice, like: Array) -> Array:
        """Return the numbers of the lines of a range of :meth:`line_pieces`, as int64 on the device of ``like``."""
        first, last = weights.start // self.length, weights.stop // self.length
        return namespace(like).arange(first, last, dtype=namespace(like).int64, device=device_of(like))

    def block_of(self, weights: slice, like: Array) -> Array:
        """Return the block of each weight of a range, as int64 on the device of ``like``."""
        xp = namespace(like)
        numbers = xp.arange(weights.start, weights.stop, dtype=xp.int64, device=device_of(like))
        return self.blocks_at(numbers)

    def blocks_at(self, numbers: Array) -> Array:
        """Return the block of each weight, given the numbers of the weights as int64."""
        if self.is_even:
            return numbers // self.block_size
        # Each line ends its last block, so that i // block_size is wrong after a ragged line. Weight i lies in line
        # i // length, before which there are blocks_per_line blocks each, at position i % length.
        lines = numbers // self.length
        return lines * self.blocks_per_line + (numbers - lines * self.length) // self.block_size


@lru_cache(maxsize=4096)
def layout_of(fmt: BlockFormat, shape: tuple[int, ...]) -> Layout:
    """Return the layout that a format gives to arrays of a shape, planned once."""
    # The cache is bounded because shapes are data: a process may see any number of them, and a plan is a few hundred bytes.
    # A model has a few dozen pairs of format and shape, and as many again for each depth of scales. An evicted plan is made
    # anew and equals the old one in all but identity, so a cache keyed by plans only computes its entry again.
    lines, length = fmt.lines(shape)
    return Layout(
        codebook=fmt.codebook,
        lines=lines,
        length=length,
        blocks=fmt.blocks(shape),
        block_size=max(1, min(fmt.block_size, length)),
        axis=fmt.axis,
        lines_per_set=fmt.levels if isinstance(fmt.levels, int) else None,
        is_plain=fmt.scales == "float32" and fmt.levels == "codebook",
    )
