"""How an array is cut into lines, blocks, and pieces that are worked on one at a time.

Everything here is about positions. Weights are numbered in *block order*: the row-major order of the array with the axis
of the blocks moved to the end, so that a block is a stretch of consecutive numbers. Pieces bound the workspace: no step
of quantization ever holds more than a few pieces besides its input and its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import device_of, namespace, preferred_piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat

__all__ = ["Layout", "blocks_last", "blocks_restored", "in_shape", "piece_size", "stream_size"]


def piece_size(array: Array) -> int:
    """Return the weights that are worked on at a time: what fits a cache, or fills a device; a multiple of eight."""
    return 1 << 19 if ops.is_on_host(array) else 1 << 23


def stream_size(array: Array) -> int:
    """Return the weights that are handed at a time to operations that may not need a workspace; others are copied."""
    return (ops.is_contiguous(array) and preferred_piece(array)) or piece_size(array)


def blocks_last(array: Array, axis: int | None) -> Array:
    """Return a view whose row-major order is block order."""
    return array if axis is None else namespace(array).moveaxis(array, axis, -1)


def blocks_restored(array: Array, axis: int | None) -> Array:
    """Undo :func:`blocks_last`."""
    return array if axis is None else namespace(array).moveaxis(array, -1, axis)


def in_shape(flat: Array, axis: int | None, shape: Sequence[int]) -> Array:
    """Return all entries of an array, which are given in block order, in its shape."""
    moved = list(shape)
    if axis is not None:
        moved.append(moved.pop(axis))
    return blocks_restored(namespace(flat).reshape(flat, tuple(moved)), axis)


@dataclass(frozen=True)
class Layout:
    """Lines of one length, each cut into blocks of which the last may be short.

    Parameters
    ----------
    lines : int
        Lines that blocks do not cross.
    length : int
        Weights of a line.
    block_size : int
        Weights of a whole block, at most ``length`` unless that is zero.
    """

    lines: int
    length: int
    block_size: int

    @classmethod
    def of(cls, fmt: BlockFormat, shape: Sequence[int]) -> Layout:
        """Return the layout that a format gives to an array of a shape."""
        lines, length = fmt.lines(shape)
        return cls(lines, length, max(1, min(fmt.block_size, length)))

    @property
    def count(self) -> int:
        """Weights of the array."""
        return self.lines * self.length

    @property
    def blocks_per_line(self) -> int:
        """Blocks of one line."""
        return -(-self.length // self.block_size)

    @property
    def blocks(self) -> int:
        """Blocks of the array."""
        return self.lines * self.blocks_per_line

    @property
    def is_even(self) -> bool:
        """Whether block ``i`` begins at weight ``i * block_size``: no line but the last one ends in a short block."""
        return self.lines <= 1 or self.length % self.block_size == 0

    def whole_blocks(self, limit: int) -> Iterator[tuple[slice, slice]]:
        """Yield ranges of weights and of blocks: whole blocks, and where these do not line up, whole lines."""
        if not self.count:
            return
        size, per_step = (
            (self.block_size, max(1, limit // self.block_size))
            if self.is_even
            else (self.length, max(1, limit // self.length))
        )
        factor = 1 if self.is_even else self.blocks_per_line
        for first in range(0, -(-self.count // size), per_step):
            last = min(first + per_step, -(-self.count // size))
            yield slice(first * size, min(last * size, self.count)), slice(first * factor, last * factor)

    def as_blocks(self, flat: Array) -> Array:
        """Lay a range of :meth:`whole_blocks` out as one row per block, short blocks padded with zeros."""
        xp = namespace(flat)
        row = flat.shape[0] if self.is_even else self.length
        lines = xp.reshape(flat, (-1, row)) if row else xp.reshape(flat, (0, 0))
        tail = -row % self.block_size
        if tail:
            padding = xp.zeros((lines.shape[0], tail), dtype=flat.dtype, device=device_of(flat))
            lines = xp.concat([lines, padding], axis=1)
        return xp.reshape(lines, (-1, self.block_size))

    def byte_pieces(self, limit: int) -> Iterator[tuple[slice, slice | None]]:
        """Yield ranges of weights that begin at a multiple of eight; and of blocks if they are whole, or all are of one."""
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

    def line_pieces(self, limit: int) -> Iterator[tuple[slice, None]]:
        """Yield ranges of weights that are whole lines and begin at a multiple of eight."""
        step = 8 * max(1, limit // 8 // max(1, self.length)) * self.length
        for start in range(0, self.count, step or 1):
            yield slice(start, min(start + step, self.count)), None

    def lines_of(self, weights: slice, like: Array) -> Array:
        """Return the numbers of the lines of a range of :meth:`line_pieces`, as int64 on the device of another array."""
        first, last = weights.start // self.length, weights.stop // self.length
        return namespace(like).arange(first, last, dtype=namespace(like).int64, device=device_of(like))

    def block_of(self, weights: slice, like: Array) -> Array:
        """Return the block of each weight of a range, as int64 on the device of another array."""
        xp = namespace(like)
        numbers = xp.arange(weights.start, weights.stop, dtype=xp.int64, device=device_of(like))
        lines = numbers // self.length
        return lines * self.blocks_per_line + (numbers - lines * self.length) // self.block_size
