"""Choosing the scales, and the levels, of an array: by the absolute maximum, or by the error they leave."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import NonFiniteError
from lqlora.quantized._encoding import decode_scales, encode_array, unpacked
from lqlora.quantized._layout import Layout, blocks_last, piece_size
from lqlora.quantized._scales import code_neighbors, store_scales, with_codes
from lqlora.quantized._search import Rounding, best_ratios, fit_levels, ratio_grid
from lqlora.quantized.array import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora._typing import Array
    from lqlora.codebooks import Codebook
    from lqlora.formats import BlockFormat

__all__ = ["Choice", "Source", "assemble", "by_absmax", "by_levels", "by_scale", "lost_blocks", "rounded_rows"]

#: Weights that one set of levels for a whole array is fitted to, spread evenly over it. At 8 bits that is a thousand
#: for each level, which then is off by 3 % of its cell, and the error by 0.1 %.
_SAMPLE = 1 << 18
_SAMPLE_PIECE = 1 << 13

#: Of what is tried some overflows. It compares as no better, and is not taken.
_QUIET = functools.partial(np.errstate, over="ignore", invalid="ignore")

#: A search holds several arrays of float64 for each weight at hand: its pieces are so many times smaller.
_WIDE = 4


@dataclass(frozen=True)
class Source:
    """An array to quantize, with the weights of its squared errors.

    Parameters
    ----------
    array : array of a floating-point dtype
        The weights.
    weights : array of the same shape, optional
        Importance of each entry.
    fmt : BlockFormat
        The format.
    name : str
        What the array is, for errors.
    start : QuantizedArray, optional
        A similar array in this format, whose levels a search starts from.
    """

    array: Array
    weights: Array | None
    fmt: BlockFormat
    name: str
    start: QuantizedArray | None = None

    @property
    def layout(self) -> Layout:
        """How the array is cut."""
        return Layout.of(self.fmt, self.array.shape)

    def pieces(self, limit: int) -> Iterator[tuple[slice, Rows]]:
        """Yield the range of the blocks of each piece, and these."""
        for entries, blocks in self.layout.whole_blocks(limit):
            yield blocks, self.read(entries)

    def read(self, entries: slice) -> Rows:
        """Return a range of whole blocks, one per row."""
        layout, dense = self.layout, blocks_last(self.array, self.fmt.axis)
        flat = ops.widen(ops.take_flat(dense, entries.start, entries.stop))
        rows = layout.as_blocks(flat)
        is_whole = layout.is_even and flat.shape[0] % layout.block_size == 0
        there = None if is_whole else layout.as_blocks(namespace(flat).ones_like(flat))
        if self.weights is None:
            return Rows(rows, None, there)
        dense = blocks_last(self.weights, self.fmt.axis)
        return Rows(rows, layout.as_blocks(ops.widen(ops.take_flat(dense, entries.start, entries.stop))), there)

    def sets_of(self, blocks: slice) -> Array | None:
        """Return the set of levels that each of a range of blocks has."""
        if self.fmt.levels == "codebook":
            return None
        xp, layout = namespace(self.array), self.layout
        numbers = xp.arange(blocks.start, blocks.stop, dtype=xp.int64, device=device_of(self.array))
        blocks_per_set = layout.blocks_per_line * self.fmt.levels if isinstance(self.fmt.levels, int) else layout.blocks
        return numbers // blocks_per_set


class Rows(NamedTuple):
    """Blocks as rows; their weights; one for each entry that is there and zero for what short blocks are padded with.

    In a block that nothing weighs every entry counts the same.
    """

    entries: Array
    weights: Array | None
    there: Array | None

    def exact_weights(self) -> Array | None:
        """Return the weights of squares."""
        if self.weights is None:
            return self.there
        positive, _, equal = self._largest(self.weights)
        return namespace(self.weights).where(positive, self.weights, equal)

    def relative_weights(self) -> tuple[Array | None, Array | None]:
        """Return weights divided by the largest of each row, and these largest weights."""
        if self.weights is None:
            return self.there, None if self.there is None else self.there[:, 0]
        positive, largest, equal = self._largest(self.weights)
        xp = namespace(largest)
        relative = xp.where(positive, self.weights / xp.where(positive, largest, xp.ones_like(largest)), equal)
        return relative, largest[:, 0]

    def _largest(self, weights: Array) -> tuple[Array, Array, Array]:
        """Tell which rows anything weighs, their largest weights, and the weights where nothing does."""
        xp = namespace(weights)
        largest = xp.max(weights, axis=1, keepdims=True)
        equal = xp.ones_like(largest) if self.there is None else xp.astype(self.there, weights.dtype)
        return largest > 0, largest, equal


class Choice(NamedTuple):
    """Scales for all blocks: as they are stored, as they decode, the zero points of an affine format, codes if known."""

    stored: Array | QuantizedArray
    decoded: Array
    zero_points: Array | None
    packed: Array | None = None


def by_absmax(source: Source, statistic: Array, low: Array | None) -> Choice:
    """Return the scales under which the largest weight of each block is the largest level."""
    stored, decoded = store_scales(statistic, source.fmt.scales, source.name)
    return Choice(stored, decoded, None if low is None else _zero_points(low, decoded, len(source.fmt.codebook)))


def _zero_points(low: Array, decoded: Array, levels: int) -> Array:
    """Return the codes nearest to zero when the lowest level stands for the smallest weight of a block."""
    xp = namespace(low)
    usable = decoded > 0
    with np.errstate(over="ignore"):  # the outermost code, as where it is merely too large
        steps = -low / xp.astype(xp.where(usable, decoded, xp.ones_like(decoded)), low.dtype)
    steps = xp.where(usable, xp.round(steps), xp.zeros_like(steps))
    return xp.astype(xp.clip(steps, 0, levels - 1), xp.uint8)


def assemble(source: Source, choice: Choice, levels: Array | None = None) -> QuantizedArray:
    """Encode the array under the scales chosen, unless it is."""
    fmt, zeros = source.fmt, choice.zero_points
    if fmt.levels != "codebook" and levels is None:
        levels = _codebook_levels(source)
    packed = choice.packed
    if packed is None:
        packed = encode_array(source.array, fmt, choice.decoded, zeros, levels)
    packed_zeros = None if zeros is None else ops.pack_codes(zeros, fmt.bits)
    return QuantizedArray(packed, choice.stored, fmt, tuple(source.array.shape), None, packed_zeros, levels)


def _codebook_levels(source: Source) -> Array:
    table = np.tile(source.fmt.codebook.levels, (source.fmt.level_sets(source.array.shape), 1))
    return namespace(source.array).asarray(table, device=device_of(source.array))


def by_scale(source: Source, statistic: Array, first: Choice) -> Choice:
    """Choose for each block between the scale of its absolute maximum and those that a search finds."""
    wanted = _search(source, statistic, first, None)
    if isinstance(first.stored, QuantizedArray):
        # Of the codes that the second-level scales made for the first choice allow, so that this one is among them.
        others = code_neighbors(first.stored, wanted)
    else:
        others = [ops.storage_cast(wanted, str(source.fmt.scales))]  # what is infinite there is not taken
    choices = [Choice(own, decode_scales(own), zeros) for own in others for zeros in _shifts(first, source.fmt)]
    return _best(source, [first, *choices], None)


def _shifts(first: Choice, fmt: BlockFormat) -> list[Array | None]:
    """Return the zero points to try: those of the first choice and their neighbors."""
    zeros = first.zero_points
    if zeros is None:
        return [None]
    xp = namespace(zeros)
    below = zeros - xp.astype(zeros > 0, xp.uint8)
    above = zeros + xp.astype(zeros < len(fmt.codebook) - 1, xp.uint8)
    return [zeros, below, above]


def by_levels(source: Source, statistic: Array, first: Choice) -> tuple[Choice, Array | None]:
    """Fit levels and scales together; fall back to the levels of the codebook if these leave less error.

    From a start there is nothing to compare with: whoever starts somewhere wants to end up near it, soon.
    """
    plain = by_scale(source, statistic, first) if source.start is None else None
    with _QUIET():
        statistic = statistic * source.fmt.codebook.widest  # fitted levels end at 1
    levels = _fitted_levels(source, statistic)
    wanted = _not_above(_search(source, statistic, first, levels), statistic)
    try:
        stored, _ = store_scales(wanted, source.fmt.scales, source.name)
    except NonFiniteError:  # fitted scales may spread further than those the format was able to hold
        return plain or by_scale(source, statistic, first), None
    others = [stored, *(code_neighbors(stored, wanted)[1:] if isinstance(stored, QuantizedArray) else [])]
    choice = _best(source, [Choice(own, decode_scales(own), None) for own in others], levels)
    if plain is not None and _total(source, choice, levels) > _total(source, plain, None):
        return plain, None
    return choice, levels


def _not_above(wanted: Array, statistic: Array) -> Array:
    """Keep scales within the largest that is known to be storable."""
    xp = namespace(wanted)
    if not wanted.shape[0]:
        return wanted
    limit = xp.max(xp.abs(statistic))
    return xp.clip(wanted, -limit, limit)


def _search(source: Source, statistic: Array, first: Choice, levels: Array | None) -> Array:
    """Return the scale of least error of each block, as it is before it is stored."""
    xp = namespace(statistic)
    book = source.fmt.codebook
    grid = ratio_grid(book.bits, signed=book.normalization == "signed", coarse=source.start is not None)
    found = []
    for blocks, rows in source.pieces(piece_size(statistic) // _WIDE):
        normalized = xp.astype(ops.normalize(rows.entries, statistic[blocks]), xp.float32)
        weights, _ = rows.relative_weights()
        own = None if weights is None else xp.astype(weights, xp.float32)
        zeros = None if first.zero_points is None else xp.astype(first.zero_points[blocks], xp.float32)[:, None]
        rounding = Rounding.of(book, levels, source.sets_of(blocks))
        with _QUIET():
            ratios = best_ratios(normalized, own, rounding, zeros, grid)
            found.append(statistic[blocks] * xp.astype(ratios, statistic.dtype))
    return xp.concat(found) if found else statistic


def _fitted_levels(source: Source, statistic: Array) -> Array:
    """Return one set of levels for the array, or one for each group of its lines."""
    layout, fmt = source.layout, source.fmt
    if not layout.count:
        return _codebook_levels(source)
    if not isinstance(fmt.levels, int):
        pieces = list(layout.whole_blocks(_SAMPLE_PIECE))
        return _levels_of(source, statistic, pieces[:: max(1, layout.count // _SAMPLE)], slice(0, 1))
    sets = fmt.level_sets(source.array.shape)
    per_step, whole = max(1, _SAMPLE // (fmt.levels * layout.length)), layout.lines // fmt.levels
    # A last group of fewer lines is fitted by itself: a step takes groups of one size.
    cuts = [*range(0, whole, per_step), whole, sets]
    ranges = [(first, last) for first, last in pairwise(cuts) if first < last]
    return namespace(statistic).concat(
        [_levels_of(source, statistic, _group(source, first, last), slice(first, last)) for first, last in ranges]
    )


def _group(source: Source, first: int, last: int) -> list[tuple[slice, slice]]:
    """Return the weights and the blocks of a range of sets; of one large set some lines, spread evenly over it."""
    layout, lines = source.layout, int(source.fmt.levels)
    start, stop = first * lines, min(last * lines, layout.lines)
    every = max(1, (stop - start) * layout.length // _SAMPLE) if last == first + 1 else 1
    pairs = [(start, stop)] if every == 1 else [(line, line + 1) for line in range(start, stop, every)]
    return [
        (
            slice(begin * layout.length, end * layout.length),
            slice(begin * layout.blocks_per_line, end * layout.blocks_per_line),
        )
        for begin, end in pairs
    ]


def _levels_of(source: Source, statistic: Array, pieces: list[tuple[slice, slice]], which: slice) -> Array:
    """Fit levels to some pieces, which are dealt out evenly to a range of sets."""
    xp, sets = namespace(statistic), which.stop - which.start
    parts = [source.read(entries) for entries, _ in pieces]
    scales = xp.concat([statistic[blocks] for _, blocks in pieces])
    rows = ops.normalize(xp.concat([part.entries for part in parts]), scales)
    members = xp.arange(rows.shape[0], dtype=xp.int64, device=device_of(rows)) // (rows.shape[0] // sets)
    importance = xp.astype(scales, xp.float64)
    weights = None
    shares = [part.relative_weights() for part in parts]
    if any(own is not None for own, _ in shares):
        ones = [xp.ones_like(part.entries) for part in parts]
        own = [one if share is None else share for (share, _), one in zip(shares, ones, strict=True)]
        largest = [one[:, 0] if peak is None else peak for (_, peak), one in zip(shares, ones, strict=True)]
        weights = xp.concat([xp.astype(weight, xp.float32) for weight in own])
        importance = importance * xp.sqrt(xp.concat([xp.astype(weight, xp.float64) for weight in largest]))
    # Each set by itself: next to a set of large weights the sums of another would be rounded away.
    by_set = xp.abs(xp.reshape(importance, (sets, -1)))
    peak = xp.max(by_set, axis=1, keepdims=True)
    relative = xp.reshape(by_set / xp.where(peak > 0, peak, xp.ones_like(peak)), (-1,))
    importance = relative * relative  # CUDA does not promise that a power is rounded correctly
    near = None if source.start is None else source.start.levels
    start = None if near is None else near[which, :]
    with _QUIET():
        return fit_levels(xp.astype(rows, xp.float32), weights, importance, members, sets, source.fmt.codebook, start)


def _best(source: Source, choices: list[Choice], levels: Array | None) -> Choice:
    """Return the best of several choices block by block; of equals the first."""
    xp, first = namespace(choices[0].decoded), choices[0]
    winners = _winners(source, choices, levels)
    codes, decoded, zeros = _codes(first), first.decoded, first.zero_points
    for index, other in enumerate(choices[1:], 1):
        wins = winners == index
        codes, decoded = xp.where(wins, _codes(other), codes), xp.where(wins, other.decoded, decoded)
        zeros = None if zeros is None else xp.where(wins, other.zero_points, zeros)
    stored = with_codes(first.stored, codes) if isinstance(first.stored, QuantizedArray) else codes
    return Choice(stored, decoded, zeros)


def _codes(choice: Choice) -> Array:
    """Return the scales as they are stored, or their codes."""
    return unpacked(choice.stored) if isinstance(choice.stored, QuantizedArray) else choice.stored


def _winners(source: Source, choices: list[Choice], levels: Array | None) -> Array:
    """Return for each block which choice leaves the least error; of equals the first."""
    xp, found = namespace(choices[0].decoded), []
    for blocks, errors in _piece_errors(source, choices, levels):
        best, error = xp.zeros_like(errors[0], dtype=xp.uint8), errors[0]
        for index in range(1, len(choices)):
            scales, own = choices[index].decoded[blocks], errors[index]
            better = (own < error) & xp.isfinite(scales)
            if source.fmt.codebook.normalization != "signed":
                better &= scales >= 0
            best, error = xp.where(better, xp.full_like(best, index), best), xp.where(better, own, error)
        found.append(best)
    return xp.concat(found) if found else xp.zeros_like(choices[0].decoded, dtype=xp.uint8)


def _total(source: Source, choice: Choice, levels: Array | None) -> float:
    """Return the weighted squared error of the whole array."""
    pieces = _piece_errors(source, [choice], levels)
    return math.fsum(float(ops.row_sums(errors[None, :])[0]) for _, (errors,) in pieces)


def _piece_errors(source: Source, choices: list[Choice], levels: Array | None) -> Iterator[tuple[slice, list[Array]]]:
    """Yield ranges of blocks, and the weighted squared error of each block in float64 under each choice."""
    for blocks, rows in source.pieces(piece_size(choices[0].decoded) // _WIDE):
        rounding = Rounding.of(source.fmt.codebook, levels, source.sets_of(blocks))
        weights = rows.exact_weights()
        with _QUIET():
            errors = [_block_errors(rows.entries, weights, rounding, choice, blocks) for choice in choices]
        yield blocks, errors


def _block_errors(rows: Array, weights: Array | None, rounding: Rounding, choice: Choice, blocks: slice) -> Array:
    if rounding.table is None or rounding.boundaries is None:
        return ops.wide_errors(rows, weights, _rounded(rows, rounding, choice, blocks))
    zeros = None if choice.zero_points is None else choice.zero_points[blocks]
    return ops.rounding_errors(rows, weights, choice.decoded[blocks], zeros, rounding.table, rounding.boundaries)


def rounded_rows(source: Source, choice: Choice, levels: Array | None, blocks: slice, rows: Array) -> Array:
    """Return what a range of blocks comes back as under some scales."""
    rounding = Rounding.of(source.fmt.codebook, levels, source.sets_of(blocks))
    with _QUIET():
        return _rounded(rows, rounding, choice, blocks)


def _rounded(rows: Array, rounding: Rounding, choice: Choice, blocks: slice) -> Array:
    xp, scales = namespace(rows), choice.decoded[blocks]
    zeros = None if choice.zero_points is None else xp.astype(choice.zero_points[blocks], xp.float32)[:, None]
    return rounding.nearest(ops.normalize(rows, xp.astype(scales, rows.dtype)), zeros) * scales[:, None]


def lost_blocks(source: Source, statistic: Array, choice: Choice, levels: Array | None) -> int:
    """Count the blocks that are not zero but decode to nothing but zeros."""
    if not _may_lose(source, statistic, choice, levels):
        return 0
    xp, count = namespace(statistic), 0
    for blocks, (rows, _, _) in source.pieces(piece_size(statistic) // _WIDE):
        kept = xp.any(rounded_rows(source, choice, levels, blocks, rows) != 0, axis=1)
        count += int(xp.count_nonzero(xp.any(rows != 0, axis=1) & ~kept))
    return count


def _may_lose(source: Source, statistic: Array, choice: Choice, levels: Array | None) -> bool:
    """Tell whether there may be such blocks: where a scale is much too large, or is zero."""
    xp, book = namespace(statistic), source.fmt.codebook
    is_plain = levels is None and book.widest == 1.0
    if is_plain and statistic is choice.decoded:
        return _loses_ones(book, ops.dtype_name(statistic))
    if levels is None and _are_far_from_zero(statistic, choice.decoded, book):
        return False
    if is_plain and bool(xp.all(statistic == choice.decoded)):
        return _loses_ones(book, ops.dtype_name(statistic))
    nonzero = statistic != 0
    if bool(xp.any(nonzero & (choice.decoded == 0))):
        return True
    if levels is not None or book.normalization == "affine":
        return bool(xp.any(nonzero & (xp.abs(choice.decoded) / 2 > xp.abs(statistic))))
    with _QUIET():
        scales, largest = xp.astype(choice.decoded, statistic.dtype), statistic * book.widest
    return _rounds_to_zero(largest, nonzero, scales, book)


@functools.lru_cache(maxsize=256)
def _loses_ones(book: Codebook, dtype: str) -> bool:
    """Tell it of scales that are decoded as they were: what they were made of is rounded as one or minus one are."""
    one = np.ones(1, dtype=dtype)
    return book.normalization != "affine" and _rounds_to_zero(one, one != 0, one, book)


def _rounds_to_zero(largest: Array, nonzero: Array, scales: Array, book: Codebook) -> bool:
    """Tell whether the largest weight of a block that is not zero, or its negative, is rounded to zero."""
    xp = namespace(largest)
    is_level = ops.table_beside(book.levels != 0, largest)
    for extreme in (largest, -largest):
        codes = ops.encode(extreme, scales, None, book.boundaries, 1)
        if bool(xp.any(nonzero & ~ops.pick(is_level, xp.astype(codes, xp.int64)))):
            return True
    return False


def _are_far_from_zero(statistic: Array, decoded: Array, book: Codebook) -> bool:
    """Tell quickly that no scale is zero and no largest weight rounds to zero; if it cannot tell, the codes will."""
    cell = _cell_of_zero(book)
    if cell is None:
        return False
    xp = namespace(statistic)
    # One part in a million is more than what rounding does to the quotient of the two.
    return bool(xp.all((statistic >= 1.000001 * cell * decoded) & (decoded > 0)))


@functools.lru_cache(maxsize=256)
def _cell_of_zero(book: Codebook) -> float | None:
    """Return up to where normalized weights round to zero, if that is simple to tell."""
    zeros = np.flatnonzero(book.levels == 0)
    if len(zeros) != 1 or not 0 < zeros[0] < len(book) - 1 or book.normalization != "absmax":
        return None
    return float(np.abs(book.boundaries[zeros[0] - 1 : zeros[0] + 1]).max()) / book.widest
