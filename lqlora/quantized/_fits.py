r"""Choice of scales and levels: absolute maximum of each block, or least squared error.

A fit minimizes the squared error of the decoded array, each square times its importance ``w``. Each block has its own scale
``s``, so the sum splits into one problem per block:

.. math:: \min_s \sum_i w_i \, (x_i - \hat s \, Q(x_i / \hat s))^2 ,

with the decoded scale :math:`\hat s` in place of ``s``. The search (:mod:`lqlora.quantized._search`) proposes a scale.
It is then stored, decoded, and compared with the scale of the absolute maximum *as decoded*. So no block is worse than
under its absolute maximum, however storage rounds the scales.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import NonFiniteError
from lqlora.quantized._decoding import decode_scales, unpacked
from lqlora.quantized._encoding import encode_by_absmax, encode_codes
from lqlora.quantized._layout import piece_size
from lqlora.quantized._scales import code_neighbors, require_in_range, store_scales, with_codes
from lqlora.quantized._search import Rounding, best_ratios, fit_levels, ratio_grid
from lqlora.quantized._statistics import block_statistics
from lqlora.quantized._trellis import decode_piece, encode_sequences, scale_ratios, values_of_rows
from lqlora.quantized._zero_points import fit_lines, from_minima
from lqlora.quantized.array import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lqlora._typing import Array
    from lqlora.codebooks import Codebook
    from lqlora.quantized._layout import Layout
    from lqlora.quantized._source import Source

__all__ = ["QUIET", "SEARCH_SHARE", "Choice", "Fit", "assemble", "by_absmax", "choose", "rounded_rows"]

Fit: TypeAlias = Literal["absmax", "scale", "levels+scale"]

#: The names of all fits.
FITS: tuple[Fit, ...] = get_args(Fit)

#: Weights that one set of levels for a whole array is fitted to, spread evenly over it. At 8 bits that is a thousand
#: for each level. The sampling error of a level is then about 3 % of its cell, and the squared error rises by 0.1 %.
_SAMPLE = 1 << 18
_SAMPLE_PIECE = 1 << 13

#: Context in which overflow is expected: a candidate that overflows has an error that compares as not better.
QUIET = functools.partial(np.errstate, over="ignore", invalid="ignore")

#: A search holds several arrays of float64 for each weight of its piece, so its pieces are smaller by this factor.
SEARCH_SHARE = 4


class Choice(NamedTuple):
    """Scales of all blocks, as stored and as decoded, with the zero points of an affine format and codes if known."""

    stored: Array | QuantizedArray
    decoded: Array
    zero_points: Array | None
    packed: Array | None = None


def choose(source: Source, fit: Fit, *, check_finite: bool) -> tuple[Array, Choice, Array | None]:
    """Return the statistic of each block, the scales that a fit chooses, and fitted levels if the fit has any."""
    encoded = encode_by_absmax(source.dense, source.layout) if fit == "absmax" else None
    statistic, low = block_statistics(source) if encoded is None else (encoded[0], None)
    try:
        if encoded is not None:
            require_in_range(statistic, "float32", source.name)
            return statistic, Choice(statistic, statistic, None, encoded[1]), None
        first = by_absmax(source, statistic, low)
    except NonFiniteError as error:
        # NaN and infinity show in the scale of their block. The array is read again only to say where they are.
        if check_finite:
            _say_where(source)
        raise error from None
    if fit == "levels+scale":
        return statistic, *_by_levels(source, statistic, first)
    return statistic, _by_scale(source, statistic, first) if fit == "scale" else first, None


def _say_where(source: Source) -> None:
    try:
        ops.require_finite(ops.widen(source.array), source.name)
    except NonFiniteError as error:
        raise error from None  # not "during handling of" the error about a scale


def by_absmax(source: Source, statistic: Array, low: Array | None) -> Choice:
    """Return absmax scales, under which the largest weight of each block becomes the largest level."""
    stored, decoded = store_scales(statistic, source.fmt.scales, source.name)
    return Choice(stored, decoded, None if low is None else from_minima(low, decoded, source.fmt.codebook))


def assemble(source: Source, choice: Choice, levels: Array | None = None) -> QuantizedArray:
    """Return the quantized array of a choice; encode the weights unless the choice has their codes."""
    fmt, zeros = source.fmt, choice.zero_points
    if choice.packed is not None:  # scales are absolute maxima: no zero points, no fitted levels
        return QuantizedArray(choice.packed, choice.stored, fmt, tuple(source.array.shape))
    if fmt.levels != "codebook" and levels is None:
        levels = _codebook_levels(source)
    if source.layout.is_trellis:
        packed = encode_sequences(source.dense, source.layout, choice.decoded, source.importance_in_block_order)
    else:
        packed = encode_codes(source.dense, source.layout, choice.decoded, zeros, levels)
    packed_zeros = None if zeros is None else ops.pack_codes(zeros, fmt.codebook.zero_point_bits)
    return QuantizedArray(packed, choice.stored, fmt, tuple(source.array.shape), None, packed_zeros, levels)


def _codebook_levels(source: Source) -> Array:
    """Return the levels of the codebook as if they were fitted: one copy for each set."""
    table = np.tile(source.fmt.codebook.levels, (source.fmt.level_sets(source.array.shape), 1))
    return namespace(source.array).asarray(table, device=device_of(source.array))


def _by_scale(source: Source, statistic: Array, first: Choice) -> Choice:
    """Choose for each block the best of its absmax scale and the scales that a search finds."""
    if source.layout.is_trellis:
        return _by_least_squares(source, first)
    book, gap = source.fmt.codebook, int(source.fmt.codebook.levels[1])
    points = _on_levels(first.zero_points, book)
    wanted = _search(source, statistic, first._replace(zero_points=points), None)
    choices = _candidates(source, first, wanted, _shifts(points, gap, book))
    if book.zero_point_bits > book.bits:
        # Zero points between levels are fitted together with the scale. Those on levels stay candidates: a block with many zeros is
        # best with a level at zero.
        wanted, points = _search_lines(source, statistic)
        choices += _candidates(source, first, wanted, _shifts(points, 1, book))
    return _best(source, [first, *choices], None)


def _candidates(source: Source, first: Choice, wanted: Array, points: list[Array | None]) -> list[Choice]:
    """Return the scales that may be stored for some wanted ones, each with every choice of zero points."""
    if isinstance(first.stored, QuantizedArray):
        # With second-level scale t and offset o fixed, each scale is one of the values t l + o, whatever the other blocks
        # choose. So blocks can be compared one by one. A new t would change the scales of all blocks that share it.
        # Second-level scales stay those of the absolute maximum, so that its own codes are among the candidates.
        others = code_neighbors(first.stored, wanted)
    else:
        others = [ops.storage_cast(wanted, str(source.fmt.scales))]  # a scale that overflows there is not taken
    scales = source.fmt.scales
    return [Choice(own, decode_scales(own, scales), zeros) for own in others for zeros in points]


def _by_least_squares(source: Source, first: Choice) -> Choice:
    """Choose for each block the better of two scales: the first, and the one of least squares for the codes under it."""
    # A search over a grid of scales would encode each block as often, and encoding is nearly all of the work. The first
    # scale is close: for normal weights the least-squares scale lowers the error by about a hundredth.
    fmt, layout, importance = source.fmt, source.layout, source.importance_in_block_order
    xp = namespace(first.decoded)
    packed, wanted, errors = _measured(source, first.decoded, importance)
    if importance is not None:
        # The search closes a sequence by a rule of thumb. So codes that ignore importance may be better by chance.
        plain, _, other = _measured(source, first.decoded, None)
        packed, errors = _taken(layout, other < errors, plain, packed), xp.where(other < errors, other, errors)
    stored = (
        code_neighbors(first.stored, wanted)[0]
        if isinstance(first.stored, QuantizedArray)
        else ops.storage_cast(wanted, str(fmt.scales))
    )
    second = Choice(stored, decode_scales(stored, fmt.scales), None)
    usable = xp.where(xp.isfinite(second.decoded) & (second.decoded >= 0), second.decoded, first.decoded)
    refined, _, other = _measured(source, usable, importance)
    wins = other < errors
    codes = xp.where(wins, _codes(second), _codes(first))
    chosen = with_codes(first.stored, codes) if isinstance(first.stored, QuantizedArray) else codes
    return Choice(chosen, xp.where(wins, second.decoded, first.decoded), None, _taken(layout, wins, refined, packed))


def _taken(layout: Layout, wins: Array, packed: Array, other: Array) -> Array:
    """Return the packed codes of some blocks, and those of another array for the rest."""
    xp = namespace(packed)
    by_weight = ops.pick(xp.astype(wins, xp.uint8), layout.block_of(slice(0, layout.count), packed))
    pair = [ops.unpack_codes(own, layout.bits, layout.count) for own in (packed, other)]
    return ops.pack_codes(xp.where(by_weight == 1, *pair), layout.bits)


def _measured(source: Source, scales: Array, importance: Array | None) -> tuple[Array, Array, Array]:
    """Return the codes under some scales, the least-squares scale of each block for these codes, and its squared error."""
    xp, layout = namespace(scales), source.layout
    packed = encode_sequences(source.dense, layout, scales, importance)
    ones, wanted, errors = xp.ones_like(scales), [], []
    for weights, blocks in layout.aligned_blocks(piece_size(scales) // SEARCH_SHARE):
        flat = xp.empty((weights.stop - weights.start,), dtype=xp.float32, device=device_of(scales))
        decode_piece(layout, packed, ones, (weights, blocks), flat)
        rows, values = source.read(weights), layout.as_blocks(flat)
        own = rows.exact_importance()
        wanted.append(scale_ratios(rows.entries, values, own))
        with QUIET():
            errors.append(ops.wide_errors(rows.entries, own, values * scales[blocks][:, None]))
    if not wanted:
        return packed, scales, scales
    return packed, xp.concat(wanted), xp.concat(errors)


def _on_levels(zeros: Array | None, book: Codebook) -> Array | None:
    """Return the levels nearest to zero points, which are the zero points themselves if these have as many bits as codes."""
    if zeros is None or book.zero_point_bits == book.bits:
        return zeros
    xp, step = namespace(zeros), int(book.levels[1])
    steps = (xp.astype(zeros, xp.int32) + step // 2) // step
    return xp.astype(xp.clip(steps * step, 0, int(book.widest)), xp.uint8)


def _shifts(zeros: Array | None, step: int, book: Codebook) -> list[Array | None]:
    """Return the zero points to try: those given, a step lower, and a step higher."""
    if zeros is None:
        return [None]
    xp = namespace(zeros)
    below = zeros - step * xp.astype(zeros >= step, xp.uint8)
    above = zeros + step * xp.astype(zeros <= int(book.widest) - step, xp.uint8)
    return [zeros, below, above]


def _by_levels(source: Source, statistic: Array, first: Choice) -> tuple[Choice, Array | None]:
    """Fit levels and scales together; fall back to the levels of the codebook if they leave less error.

    A fit from a start is not compared with the codebook: its caller wants a result near the start, quickly.
    """
    # The total is not above that of fit="scale" because that fit is computed too, and the smaller total wins. No weaker
    # argument holds: the alternation starts from other ratios, a level fitted to a sample may harm other blocks, and storing
    # rounds the scales again. Both totals are of values as they will decode, added in float64.
    plain = _by_scale(source, statistic, first) if source.start is None else None
    with QUIET():
        statistic = statistic * source.layout.widest  # the largest fitted level is 1
    levels = _fitted_levels(source, statistic)
    wanted = _not_above(_search(source, statistic, first, levels), statistic)
    try:
        stored, _ = store_scales(wanted, source.fmt.scales, source.name)
    except NonFiniteError:  # fitted scales may spread further than the absolute maxima, which the format could hold
        return plain or _by_scale(source, statistic, first), None
    others = [stored, *(code_neighbors(stored, wanted)[1:] if isinstance(stored, QuantizedArray) else [])]
    choices = [Choice(own, decode_scales(own, source.fmt.scales), None) for own in others]
    choice = _best(source, choices, levels)
    if plain is not None and _total(source, choice, levels) > _total(source, plain, None):
        return plain, None
    return choice, levels


def _not_above(wanted: Array, statistic: Array) -> Array:
    """Clip scales to the largest statistic, which is known to be storable."""
    xp = namespace(wanted)
    if not wanted.shape[0]:
        return wanted
    # A ratio above 1 may push the largest scale beyond float16 or a second-level range. Clipping costs one block some error.
    limit = xp.max(xp.abs(statistic))
    return xp.clip(wanted, -limit, limit)


def _search(source: Source, statistic: Array, first: Choice, levels: Array | None) -> Array:
    """Return the scale of least error of each block, before storing rounds it.

    Blocks are divided by their statistic, so that the search works on numbers near 1 whatever the unit of the weights, and
    its grid of ratios serves all blocks. Importance is divided by the largest of its block for the same reason: a common
    factor does not change which scale is best.
    """
    xp = namespace(statistic)
    book = source.fmt.codebook
    grid = ratio_grid(book.bits, signed=book.normalization == "signed", coarse=source.start is not None)
    found = []
    for blocks, rows in source.pieces(piece_size(statistic) // SEARCH_SHARE):
        normalized = xp.astype(ops.normalize(rows.entries, statistic[blocks]), xp.float32)
        importance, _ = rows.relative_importance()
        own = None if importance is None else xp.astype(importance, xp.float32)
        zeros = None if first.zero_points is None else xp.astype(first.zero_points[blocks], xp.float32)[:, None]
        rounding = Rounding.of(book, levels, source.sets_of(blocks))
        with QUIET():
            ratios = best_ratios(normalized, own, rounding, zeros, grid)
            found.append(statistic[blocks] * xp.astype(ratios, statistic.dtype))
    return xp.concat(found) if found else statistic


def _search_lines(source: Source, statistic: Array) -> tuple[Array, Array]:
    """Return the scale of each block and its zero point that leave least error together, before storing rounds the scale."""
    xp, scales, points = namespace(statistic), [], []
    for blocks, rows in source.pieces(piece_size(statistic) // SEARCH_SHARE):
        normalized = ops.normalize(rows.entries, statistic[blocks])
        importance, _ = rows.relative_importance()
        with QUIET():
            ratios, own = fit_lines(normalized, importance, source.fmt.codebook, again=source.start is not None)
            scales.append(statistic[blocks] * xp.astype(ratios, statistic.dtype))
        points.append(own)
    if not scales:
        return statistic, xp.zeros_like(statistic, dtype=xp.uint8)
    return xp.concat(scales), xp.concat(points)


def _fitted_levels(source: Source, statistic: Array) -> Array:
    """Return fitted levels: one set for the array, or one for each group of its lines."""
    layout, fmt = source.layout, source.fmt
    if not layout.count:
        return _codebook_levels(source)
    if not isinstance(fmt.levels, int):
        pieces = list(layout.whole_blocks(_SAMPLE_PIECE))
        return _levels_of(source, statistic, pieces[:: max(1, layout.count // _SAMPLE)], slice(0, 1))
    sets = fmt.level_sets(source.array.shape)
    per_step, whole = max(1, _SAMPLE // (fmt.levels * layout.length)), layout.lines // fmt.levels
    # The last group may have fewer lines. It is fitted by itself, because a step takes groups of one size.
    cuts = [*range(0, whole, per_step), whole, sets]
    ranges = [(first, last) for first, last in pairwise(cuts) if first < last]
    return namespace(statistic).concat(
        [_levels_of(source, statistic, _group(source, first, last), slice(first, last)) for first, last in ranges]
    )


def _group(source: Source, first: int, last: int) -> list[tuple[slice, slice]]:
    """Return the ranges of weights and blocks of some sets, or a sample of the lines if there is one large set."""
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
    """Fit levels to some pieces, whose rows belong to a range of sets in equal parts.

    Rows are normalized, but the fit minimizes the error of the weights. The importance of a row restores what the division
    took away: the square of the scale, and the largest importance of :meth:`Rows.relative_importance`.
    """
    xp, sets = namespace(statistic), which.stop - which.start
    parts = [source.read(entries) for entries, _ in pieces]
    # With scale s and largest importance p of a block, v = s x and u = p w:
    #     sum_i u_i (v_i - s r l)^2 = p s^2 sum_i w_i (x_i - r l)^2 .
    # So a row has the importance a = p s^2. It is kept as its root s sqrt(p) until it is relative to the largest of its set,
    # since squares of small scales underflow even where the scales do not.
    scales = xp.concat([statistic[blocks] for _, blocks in pieces])
    rows = ops.normalize(xp.concat([part.entries for part in parts]), scales)
    members = xp.arange(rows.shape[0], dtype=xp.int64, device=device_of(rows)) // (rows.shape[0] // sets)
    importance = xp.astype(scales, xp.float64)
    within = None
    shares = [part.relative_importance() for part in parts]
    if any(own is not None for own, _ in shares):
        ones = [xp.ones_like(part.entries) for part in parts]
        own = [one if share is None else share for (share, _), one in zip(shares, ones, strict=True)]
        largest = [one[:, 0] if peak is None else peak for (_, peak), one in zip(shares, ones, strict=True)]
        within = xp.concat([xp.astype(share, xp.float32) for share in own])
        importance = importance * xp.sqrt(xp.concat([xp.astype(peak, xp.float64) for peak in largest]))
    # Each set is scaled by its own largest value: next to a set of large weights, the sums of another would be rounded
    # away.
    by_set = xp.abs(xp.reshape(importance, (sets, -1)))
    peak = xp.max(by_set, axis=1, keepdims=True)
    relative = xp.reshape(by_set / xp.where(peak > 0, peak, xp.ones_like(peak)), (-1,))
    importance = relative * relative  # CUDA does not promise that a power is rounded correctly
    near = None if source.start is None else source.start.levels
    start = None if near is None else near[which, :]
    with QUIET():
        return fit_levels(xp.astype(rows, xp.float32), within, importance, members, sets, source.fmt.codebook, start)


def _best(source: Source, choices: list[Choice], levels: Array | None) -> Choice:
    """Combine choices: each block takes the choice of least error. The first one wins a tie."""
    xp, first = namespace(choices[0].decoded), choices[0]
    # The error is a sum over blocks, and a block depends on its own scale and zero point only. Choosing block by block
    # therefore minimizes the total over all combinations of the choices.
    winners = _winners(source, choices, levels)
    codes, decoded, zeros = _codes(first), first.decoded, first.zero_points
    for index, other in enumerate(choices[1:], 1):
        wins = winners == index
        codes, decoded = xp.where(wins, _codes(other), codes), xp.where(wins, other.decoded, decoded)
        zeros = None if zeros is None else xp.where(wins, other.zero_points, zeros)
    stored = with_codes(first.stored, codes) if isinstance(first.stored, QuantizedArray) else codes
    return Choice(stored, decoded, zeros)


def _codes(choice: Choice) -> Array:
    """Return the stored scales: floats, or the unpacked codes of quantized scales."""
    return unpacked(choice.stored) if isinstance(choice.stored, QuantizedArray) else choice.stored


def _winners(source: Source, choices: list[Choice], levels: Array | None) -> Array:
    """Return for each block the index of the choice of least error. The first one wins a tie."""
    xp, found = namespace(choices[0].decoded), []
    for blocks, errors in _piece_errors(source, choices, levels):
        best, error = xp.zeros_like(errors[0], dtype=xp.uint8), errors[0]
        for index in range(1, len(choices)):
            scales, own = choices[index].decoded[blocks], errors[index]
            # A strict comparison keeps the earlier choice in a tie, and drops NaN, the error of a scale that overflowed.
            better = (own < error) & xp.isfinite(scales)
            # A scale below zero may leave less error, but files with one are refused unless the codebook is signed.
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
    """Yield ranges of blocks, and for each choice the weighted squared errors of these blocks in float64."""
    for blocks, rows in source.pieces(piece_size(choices[0].decoded) // SEARCH_SHARE):
        rounding = Rounding.of(source.fmt.codebook, levels, source.sets_of(blocks))
        # Errors of several blocks are added here, so their importance must not be relative to each block, as in a search.
        importance = rows.exact_importance()
        with QUIET():
            errors = [_block_errors(rows.entries, importance, rounding, choice, blocks) for choice in choices]
        yield blocks, errors


def _block_errors(rows: Array, importance: Array | None, rounding: Rounding, choice: Choice, blocks: slice) -> Array:
    if rounding.table is None or rounding.boundaries is None:
        return ops.wide_errors(rows, importance, _rounded(rows, rounding, choice, blocks))
    zeros = None if choice.zero_points is None else choice.zero_points[blocks]
    return ops.rounding_errors(rows, importance, choice.decoded[blocks], zeros, rounding.table, rounding.boundaries)


def rounded_rows(source: Source, choice: Choice, levels: Array | None, blocks: slice, rows: Array) -> Array:
    """Return the values that a range of blocks decodes to under some scales."""
    rounding = Rounding.of(source.fmt.codebook, levels, source.sets_of(blocks))
    with QUIET():
        return _rounded(rows, rounding, choice, blocks)


def _rounded(rows: Array, rounding: Rounding, choice: Choice, blocks: slice) -> Array:
    # float32(level * scale), in this order, is what decoding computes. The error is of exactly these values.
    xp, scales = namespace(rows), choice.decoded[blocks]
    if rounding.trellis is not None:
        normalized = ops.normalize(rows, xp.astype(scales, rows.dtype))
        return values_of_rows(normalized, rounding.trellis.levels, rounding.trellis.bits) * scales[:, None]
    zeros = None if choice.zero_points is None else xp.astype(choice.zero_points[blocks], xp.float32)[:, None]
    return rounding.nearest(ops.normalize(rows, xp.astype(scales, rows.dtype)), zeros) * scales[:, None]
