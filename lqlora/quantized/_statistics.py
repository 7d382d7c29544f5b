"""Statistics of blocks from which scales are computed: absolute maxima, extremes and ranges."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.quantized._layout import piece_size, stream_size

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.quantized._source import Source

__all__ = ["block_statistics"]


def block_statistics(source: Source) -> tuple[Array, Array | None]:
    """Return the exact scale of each block, and for an affine format also the minimum of each block.

    With the largest level ``L`` of the codebook, the scale is ``max |w| / L``, or for a signed codebook the entry of
    largest magnitude over ``L``, or for an affine one ``(max w - min w) / L``. For trellis codes it is the root mean
    square.
    """
    xp, layout, dense = namespace(source.array), source.layout, source.dense
    if layout.codebook.normalization == "rms":
        return _root_mean_squares(source), None
    affine = layout.codebook.normalization == "affine"
    if layout.whole:
        found = [_extremes(source, slice(0, layout.count), layout.count)]
    else:
        limit = stream_size(dense) if layout.is_even else piece_size(dense)
        found = [_extremes(source, entries, limit) for entries, _ in layout.whole_blocks(limit)]
    if not found:
        empty = xp.zeros((0,), dtype=ops.widen(source.array).dtype, device=device_of(source.array))
        return empty, empty if affine else None
    low, high = found[0] if len(found) == 1 else (xp.concat(parts) for parts in zip(*found, strict=True))
    if layout.codebook.normalization == "absmax" and layout.widest == 1.0:
        return high, None
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that is not finite is refused when it is stored
        # n levels 0 .. n - 1 span n - 1 = L steps of one scale each.
        if affine:
            high = high - low
        # The largest level of a signed codebook is positive. A scale with the sign of the largest entry maps it there; of
        # two opposite ones the positive is taken.
        elif layout.codebook.normalization == "signed":
            high = xp.where(high >= -low, high, low)
        if layout.widest != 1.0:
            # An array of one number, not the number: a library may multiply by the reciprocal of a number.
            high = high / xp.full((1,), layout.widest, dtype=high.dtype, device=device_of(high))
    return high, low if affine else None


def _root_mean_squares(source: Source) -> Array:
    """Return the root mean square of each block, in the dtype of wide weights."""
    xp, layout, device = namespace(source.array), source.layout, device_of(source.array)
    wide, found = ops.widen(ops.take_flat(source.dense, 0, 0)).dtype, []
    # Squares of float32 neither overflow nor vanish in float64. The order of the sum is fixed, and quotient and root are
    # rounded correctly, so the bytes are the same on every library.
    sizes = np.minimum(
        np.arange(layout.block_size, layout.length + layout.block_size, layout.block_size), layout.length
    )
    sizes = np.diff(sizes, prepend=0)
    for entries, blocks in layout.whole_blocks(piece_size(source.dense)):
        flat = ops.take_flat(source.dense, entries.start, entries.stop)
        rows = xp.astype(layout.as_blocks(ops.widen(flat)), xp.float64)
        own = xp.asarray(sizes[np.arange(blocks.start, blocks.stop) % len(sizes)].astype(np.float64), device=device)
        with np.errstate(over="ignore", invalid="ignore"):  # a scale that is not finite is refused when it is stored
            found.append(xp.astype(xp.sqrt(ops.row_sums(rows * rows) / own), wide))
    return xp.concat(found) if found else xp.zeros((0,), dtype=wide, device=device)


def _extremes(source: Source, entries: slice, limit: int) -> tuple[Array, Array]:
    """Return minimum and maximum of each block in a range of weights, or the absmax twice for an absmax codebook."""
    layout, dense = source.layout, source.dense
    if layout.is_even and layout.block_size > limit:  # the range is one block or a part of it: read it piece by piece
        xp = namespace(dense)
        cuts = [*range(entries.start, entries.stop, limit), entries.stop]
        parts = [_flat_extremes(source, ops.take_flat(dense, *cut), limit) for cut in pairwise(cuts)]
        low, high = (xp.concat(values) for values in zip(*parts, strict=True))
        return xp.min(low, keepdims=True), xp.max(high, keepdims=True)
    flat = ops.take_flat(dense, entries.start, entries.stop)
    if not layout.is_even:
        flat = namespace(flat).reshape(layout.as_blocks(ops.widen(flat)), (-1,))
    return _flat_extremes(source, flat, layout.block_size)


def _flat_extremes(source: Source, flat: Array, block_size: int) -> tuple[Array, Array]:
    if source.layout.codebook.normalization != "absmax":
        low, high = ops.block_extremes(flat, block_size)
        return low, high
    absmax = ops.block_absmax(flat, block_size)
    return absmax, absmax
