r"""Choice of zero points: from the minimum of a block, or by least squares together with its scale.

A code decodes to ``s (l - z)``, with ``l`` one of the equally spaced levels of an affine codebook. With the minimum
``m = -s z`` in place of the zero point, a value is ``m + s l``. For fixed codes that is a line through the points ``(l, x)``, so the scale and
the minimum of least error solve two linear equations. Rounding again to the nearest level cannot raise the error, and so on in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.codebooks import Codebook

__all__ = ["fit_lines", "from_minima"]

#: Parts of the range of a block that the search starts from. Fewer bits gain from cutting off more of the tails.
_SHRUNK = (1.0, 0.9, 0.8, 0.7, 0.6)
_SHRUNK_AGAIN = (0.9, 0.7)

#: Rounds of nearest codes and least squares, and refinements of the scale under the rounded zero point.
_ROUNDS = 8
_REFINEMENTS = 2


def from_minima(low: Array, decoded: Array, book: Codebook) -> Array:
    """Return the zero point of each block, chosen so that code 0 decodes to the smallest weight ``low``.

    A code decodes to ``(level - z) * s``. Code 0 decodes to ``low`` if ``z = -low / s``, rounded to an integer.
    """
    # Statistics of affine blocks include zero, so low <= 0 <= high and 0 <= -low / s <= L for the largest level L: zero lies
    # within the range. Rounding z moves all values by up to s / 2. The clip acts only where the stored scale came out smaller
    # than asked.
    xp = namespace(low)
    usable = decoded > 0
    with np.errstate(over="ignore"):  # an infinite quotient is clipped to the last level, like any other large one
        steps = -low / xp.astype(xp.where(usable, decoded, xp.ones_like(decoded)), low.dtype)
    steps = xp.where(usable, xp.round(steps), xp.zeros_like(steps))
    return xp.astype(xp.clip(steps, 0, book.widest), xp.uint8)


def fit_lines(rows: Array, importance: Array | None, book: Codebook, *, again: bool) -> tuple[Array, Array]:
    """Return the ratio of each scale to its statistic, and the zero point, that leave least error together.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, k)
        Blocks divided by their statistic, which maps their range to that of the levels.
    importance : array of the same shape, optional
        Factor of each squared error, not all zero in a row.
    book : Codebook
        Affine codebook.
    again : bool
        True for a shorter search, when a similar array was fitted before.

    Returns
    -------
    ratios : array of float64, shape (m,)
        Ratios above zero.
    zero_points : array of uint8, shape (m,)
        Zero points.
    """
    xp = namespace(rows)
    wide = xp.astype(rows, xp.float64)
    shares = xp.ones_like(wide) if importance is None else xp.astype(importance, xp.float64)
    low = xp.min(wide, axis=1)  # the padding of short blocks is zero
    low = xp.where(low > 0, xp.zeros_like(low), low)
    total, first = ops.row_sums(shares), ops.row_sums(shares * wide)
    best = None
    for part in _SHRUNK_AGAIN if again else _SHRUNK:
        scales, minima = xp.full_like(low, part), low * part
        before = None
        for _ in range(_ROUNDS):
            levels = _levels(book, (wide - minima[:, None]) / scales[:, None])
            if before is not None and not bool(xp.any(levels != before)):
                break
            scales, minima = _line(wide, shares, levels, total, first, scales)
            before = levels
        points = xp.clip(xp.round(-minima / scales), 0, book.widest)
        for _ in range(_REFINEMENTS):
            values = _levels(book, wide / scales[:, None] + points[:, None]) - points[:, None]
            below = ops.row_sums(shares * values * values)
            wanted = ops.row_sums(shares * values * wide) / xp.where(below > 0, below, xp.ones_like(below))
            scales = xp.where((below > 0) & (wanted > 0), wanted, scales)
        values = _levels(book, wide / scales[:, None] + points[:, None]) - points[:, None]
        gaps = wide - values * scales[:, None]
        error = ops.row_sums(shares * gaps * gaps)
        if best is None:
            best = error, scales, points
            continue
        wins = error < best[0]
        best = tuple(xp.where(wins, own, other) for own, other in zip((error, scales, points), best, strict=True))
    assert best is not None
    return best[1], xp.astype(best[2], xp.uint8)


def _levels(book: Codebook, positions: Array) -> Array:
    """Return the levels nearest to positions, in float64."""
    # Levels are multiples of a step, so a quotient rounds to the nearest. It needs no table, and ties fall as in `round`.
    xp, step = namespace(positions), float(book.levels[1])
    return xp.clip(xp.round(positions / step), 0, len(book) - 1) * step


def _line(rows: Array, shares: Array, levels: Array, total: Array, first: Array, scales: Array) -> tuple[Array, Array]:
    """Return scale and minimum of least squares for given levels. A scale that is not above zero stays as it was."""
    # With weighted sums [a] over a row, the normal equations of x = m + s l are
    #     m [1] + s [l] = [x] ,   m [l] + s [l l] = [l x] .
    # Their determinant [1][l l] - [l]^2 is not negative, and zero if all levels are equal.
    xp = namespace(rows)
    by_level = shares * levels
    once, twice, cross = (ops.row_sums(own) for own in (by_level, by_level * levels, by_level * rows))
    determinant = total * twice - once * once
    above = total * cross - once * first
    usable = (determinant > 0) & (above > 0)
    slopes = above / xp.where(usable, determinant, xp.ones_like(determinant))
    usable = usable & xp.isfinite(slopes) & (slopes > 0)
    scales = xp.where(usable, slopes, scales)
    minima = (first - scales * once) / xp.where(total > 0, total, xp.ones_like(total))
    # A zero point cannot be negative, so a minimum cannot be positive. The refinements fit the scale to what is left.
    return scales, xp.where(minima > 0, xp.zeros_like(minima), minima)
