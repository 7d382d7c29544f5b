"""``Source``: an array to quantize with the importance of its entries, read as rows of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.quantized._layout import Layout, blocks_last, layout_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat
    from lqlora.quantized.array import QuantizedArray

__all__ = ["Rows", "Source"]


@dataclass(eq=False)
class Source:
    """Array to quantize, with the importance of its entries.

    Parameters
    ----------
    array : array of a floating-point dtype
        The weights.
    importance : array of the same shape, optional
        Factor of each squared error, not negative.
    fmt : BlockFormat
        The format.
    name : str
        Name of the array in messages.
    start : QuantizedArray, optional
        A similar array in this format; a search starts from its levels.

    Attributes
    ----------
    layout : Layout
        Layout of the array in its format.
    dense : array
        The array in block order; flat if it is small.
    """

    array: Array
    importance: Array | None
    fmt: BlockFormat
    name: str
    start: QuantizedArray | None = None
    layout: Layout = field(init=False)
    dense: Array = field(init=False)

    def __post_init__(self) -> None:
        self.layout = layout_of(self.fmt, tuple(self.array.shape))
        dense = blocks_last(self.array, self.layout.axis)
        self.dense = ops.take_flat(dense, 0, self.layout.count) if self.layout.whole else dense

    @property
    def importance_in_block_order(self) -> Array | None:
        """The importance as :attr:`dense` has the weights."""
        return None if self.importance is None else blocks_last(self.importance, self.layout.axis)

    def pieces(self, limit: int) -> Iterator[tuple[slice, Rows]]:
        """Yield the range of blocks of each piece, and these blocks."""
        for entries, blocks in self.layout.whole_blocks(limit):
            yield blocks, self.read(entries)

    def read(self, entries: slice) -> Rows:
        """Return a range of whole blocks, one per row."""
        layout = self.layout
        flat = ops.widen(ops.take_flat(self.dense, entries.start, entries.stop))
        rows = layout.as_blocks(flat)
        is_whole = layout.is_even and flat.shape[0] % layout.block_size == 0
        mask = None if is_whole else layout.as_blocks(namespace(flat).ones_like(flat))
        if self.importance is None:
            return Rows(rows, None, mask)
        importance = self.importance_in_block_order
        return Rows(rows, layout.as_blocks(ops.widen(ops.take_flat(importance, entries.start, entries.stop))), mask)

    def sets_of(self, blocks: slice) -> Array | None:
        """Return the set of fitted levels of each block of a range; None without fitted levels."""
        if self.fmt.levels == "codebook":
            return None
        xp, layout = namespace(self.array), self.layout
        numbers = xp.arange(blocks.start, blocks.stop, dtype=xp.int64, device=device_of(self.array))
        # Blocks are numbered line by line, so the blocks of a set of lines are consecutive.
        per_set = layout.blocks if layout.lines_per_set is None else layout.blocks_per_line * layout.lines_per_set
        return numbers // max(1, per_set)


class Rows(NamedTuple):
    """Blocks laid out as rows, with optional importance and a 0/1 mask that marks the padding of short blocks.

    If the importance of a whole block is zero, its entries count equally.
    """

    entries: Array
    importance: Array | None
    mask: Array | None

    def exact_importance(self) -> Array | None:
        """Return the factor of each squared error."""
        if self.importance is None:
            return self.mask
        positive, _, equal = self._largest(self.importance)
        return namespace(self.importance).where(positive, self.importance, equal)

    def relative_importance(self) -> tuple[Array | None, Array | None]:
        """Return importance divided by the largest of its row, and these largest values."""
        if self.importance is None:
            return self.mask, None if self.mask is None else self.mask[:, 0]
        # A common factor of a row does not move the minimum of its error. Dividing by the largest value keeps the products of
        # float32 in range, whatever the unit of the importance.
        positive, largest, equal = self._largest(self.importance)
        xp = namespace(largest)
        relative = xp.where(positive, self.importance / xp.where(positive, largest, xp.ones_like(largest)), equal)
        return relative, largest[:, 0]

    def _largest(self, importance: Array) -> tuple[Array, Array, Array]:
        """Return whether each row has positive importance, its largest value, and the importance to use if it has none."""
        xp = namespace(importance)
        largest = xp.max(importance, axis=1, keepdims=True)
        equal = xp.ones_like(largest) if self.mask is None else xp.astype(self.mask, importance.dtype)
        return largest > 0, largest, equal
