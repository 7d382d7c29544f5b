"""Detection of lost blocks: nonzero blocks whose weights all decode to zero.

A block is lost where its stored scale is zero, or so much larger than its weights that even the largest one is rounded to
the level zero. Let ``a`` be the largest magnitude of the block, ``s`` its decoded scale, and ``c`` the largest magnitude that
rounds to the level zero. Then

    the block is lost   if and only if   s = 0   or   a / s <= c .

Reading the weights again would take as long as quantizing them. The statistic of each block gives ``a``, so that one
comparison per block decides in nearly every case, and weights are read only if a block may be lost.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.quantized._fits import QUIET, SEARCH_SHARE, rounded_rows
from lqlora.quantized._layout import piece_size

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.codebooks import Codebook
    from lqlora.quantized._fits import Choice
    from lqlora.quantized._layout import Layout
    from lqlora.quantized._source import Source

__all__ = ["lost_blocks"]


def lost_blocks(source: Source, statistic: Array, choice: Choice, levels: Array | None) -> int:
    """Return the number of nonzero blocks whose weights all decode to zero.

    Parameters
    ----------
    source : Source
        The array.
    statistic : array, shape (blocks,)
        Exact scale of each block, before it was stored.
    choice : Choice
        The scales chosen.
    levels : array, optional
        Fitted levels.

    Returns
    -------
    int
        Number of lost blocks.
    """
    # Rounding to the nearest level is monotone, and the level zero is nearest on an interval around zero. If the entry of
    # largest magnitude leaves it, the block is kept. If it stays, entries of the other sign may still leave an uneven
    # interval, so a suspicion is settled by decoding the weights.
    xp, count = namespace(statistic), 0
    if source.layout.is_trellis:
        lost = choice.decoded == 0  # the levels of a sequence are not all zero
        if not bool(xp.any(lost)):
            return 0
        kinds = [
            xp.any(rows.entries != 0, axis=1) & lost[blocks] for blocks, rows in source.pieces(piece_size(statistic))
        ]
        return sum(int(xp.count_nonzero(own)) for own in kinds)
    if not _may_lose(source.layout, statistic, choice, levels):
        return 0
    for blocks, rows in source.pieces(piece_size(statistic) // SEARCH_SHARE):
        kept = xp.any(rounded_rows(source, choice, levels, blocks, rows.entries) != 0, axis=1)
        count += int(xp.count_nonzero(xp.any(rows.entries != 0, axis=1) & ~kept))
    return count


def _may_lose(layout: Layout, statistic: Array, choice: Choice, levels: Array | None) -> bool:
    """Return whether a block may be lost. False is certain; after True, the weights decide."""
    book, is_plain = layout.codebook, levels is None and layout.widest == 1.0
    if is_plain and statistic is choice.decoded:
        return _loses_ones(layout)
    xp = namespace(statistic)
    if levels is None and _are_far_from_zero(statistic, choice.decoded, layout):
        return False
    if is_plain and bool(xp.all(statistic == choice.decoded)):
        return _loses_ones(layout)
    nonzero = statistic != 0
    if bool(xp.any(nonzero & (choice.decoded == 0))):
        return True
    if levels is not None or book.normalization == "affine":
        # Here only a scale of more than twice the statistic can round the largest weight to zero.
        return bool(xp.any(nonzero & (xp.abs(choice.decoded) / 2 > xp.abs(statistic))))
    with QUIET():
        scales, largest = xp.astype(choice.decoded, statistic.dtype), statistic * layout.widest
    return _rounds_to_zero(largest, nonzero, scales, book)


@functools.lru_cache(maxsize=256)
def _loses_ones(layout: Layout) -> bool:
    """Return whether the largest weight of a block may round to zero under a scale that equals its statistic.

    That weight is then normalized to 1 or -1. The cache is keyed by the layout, whose hash is its identity.
    """
    one = np.ones(1, dtype=np.float32)
    return layout.codebook.normalization != "affine" and _rounds_to_zero(one, one != 0, one, layout.codebook)


def _rounds_to_zero(largest: Array, nonzero: Array, scales: Array, book: Codebook) -> bool:
    """Return whether the largest weight of any nonzero block, or its negative, rounds to zero."""
    xp = namespace(largest)
    # The statistic has lost the sign of the largest weight, so both signs are tried, by the encoder itself: its rounding
    # of the quotient decides, and not that of a second formula.
    is_level = ops.table_beside(book.levels != 0, largest)
    for extreme in (largest, -largest):
        codes = ops.encode(extreme, scales, None, book.boundaries, 1)
        if bool(xp.any(nonzero & ~ops.pick(is_level, xp.astype(codes, xp.int64)))):
            return True
    return False


def _are_far_from_zero(statistic: Array, decoded: Array, layout: Layout) -> bool:
    """Return True if certainly no block is lost: scales are positive, and largest weights are outside the zero cell."""
    cell = _cell_of_zero(layout)
    if cell is None:
        return False
    xp = namespace(statistic)
    # a / s > c for all blocks, multiplied by s: no division, and one pass over two short arrays.
    # One part in a million is more than the rounding errors of the quotient of the two.
    return bool(xp.all((statistic >= 1.000001 * cell * decoded) & (decoded > 0)))


@functools.lru_cache(maxsize=256)
def _cell_of_zero(layout: Layout) -> float | None:
    """Return ``c`` of the module's docstring divided by the largest level; None unless one inner level is zero."""
    book = layout.codebook
    zeros = np.flatnonzero(book.levels == 0)
    if len(zeros) != 1 or not 0 < zeros[0] < len(book) - 1 or book.normalization != "absmax":
        return None
    return float(np.abs(book.boundaries[zeros[0] - 1 : zeros[0] + 1]).max()) / layout.widest
