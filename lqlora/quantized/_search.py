r"""Fit of levels together with scales, and the grids of the search for scales, whose arithmetic is ``lqlora.ops.search``.

A row is a block divided by the scale that its absolute maximum gives it. The functions work on such *normalized* rows
``x`` and return ratios ``r`` to that first scale. With importance ``w`` and levels ``l``, the error of a row is

.. math:: E(r) = \sum_i w_i \, (x_i - r \, l_{c_i})^2 , \qquad c_i = \text{code of the level nearest to } x_i / r .

``E`` has many local minima, since codes jump as ``r`` moves. The search therefore tries a grid of ratios first. For fixed
codes ``E`` is a parabola in ``r``, with its minimum at

.. math:: r = \frac{\sum_i w_i x_i l_{c_i}}{\sum_i w_i l_{c_i}^2} .

Taking this ratio, and then the nearest codes again, never increases ``E``. A few such steps follow the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.codebooks import Trellis
from lqlora.codebooks.codebook import cell_boundaries
from lqlora.ops.search import nearest_values
from lqlora.quantized._decoding import host_levels, read_only

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._typing import Array
    from lqlora.codebooks import Codebook

__all__ = ["Rounding", "best_ratios", "fit_levels", "ratio_grid"]

#: Smallest and largest ratio of the grid, by bits. Fewer bits gain from cutting off more of the tail: on normal weights half
#: the scale of the absolute maximum is best for two bits.
_LOWEST_RATIO = {1: 0.15, 2: 0.25, 3: 0.45, 4: 0.6, 5: 0.75, 6: 0.85, 7: 0.92, 8: 0.955}
_HIGHEST_RATIO = {1: 1.0, 2: 1.05, 3: 1.1, 4: 1.1, 5: 1.1, 6: 1.1, 7: 1.08, 8: 1.06}
_GRID = 12

#: Least-squares steps after the grid. A third one gains nothing measurable.
_REFINEMENTS = 2

#: Rounds of the joint fit, and the rounds that search the ratios again instead of refining them. A search leaves the local
#: minimum that the alternation has reached.
_ROUNDS = 20
_SEARCHES = (3, 8, 14)

#: Rounds that adapt levels fitted to a similar array; the first of them searches.
_ROUNDS_AGAIN = 2


@dataclass(frozen=True)
class Rounding:
    """Rounding of normalized rows to the nearest level, from one table for all rows or from several sets of levels.

    Parameters
    ----------
    table : ndarray of float32, shape (n,), optional
        The levels of all rows.
    boundaries : ndarray of float32, shape (n - 1,), optional
        Boundaries between the cells of the table.
    levels : array of float32, shape (number of sets, n), optional
        Levels by set, where there is no table.
    cells : array of float32, shape (number of sets, n - 1), optional
        Boundaries by set.
    sets : array of int64, shape (m,), optional
        The set of each row.
    trellis : Trellis, optional
        Codebook of a trellis format, which has neither table nor sets: rows are searched, not rounded.
    """

    table: npt.NDArray[np.float32] | None
    boundaries: npt.NDArray[np.float32] | None = None
    levels: Array | None = None
    cells: Array | None = None
    sets: Array | None = None
    trellis: Trellis | None = None

    @classmethod
    def of(cls, codebook: Codebook, levels: Array | None, sets: Array | None) -> Rounding:
        """Return the rounding to fitted levels, or to those of the codebook if there are none."""
        if isinstance(codebook, Trellis):
            return cls(None, trellis=codebook)
        table = host_levels(levels, codebook)
        if table is None:
            return cls(None, None, levels, ops.boundaries_by_set(levels), sets)
        return cls(table, codebook.boundaries if levels is None else read_only(cell_boundaries(table)))

    def codes(self, rows: Array) -> Array:
        """Return the codes of the nearest levels."""
        if self.boundaries is not None:
            return ops.nearest_codes(rows, self.boundaries)
        return ops.nearest_codes_by_row(rows, self.cells, self.sets)

    def values(self, codes: Array) -> Array:
        """Return the levels of codes."""
        if self.table is None:
            return ops.values_by_row(codes, self.levels, self.sets)
        xp = namespace(codes)
        table = ops.table_beside(self.table, codes)
        return xp.reshape(ops.pick(table, xp.astype(xp.reshape(codes, (-1,)), xp.int64)), codes.shape)

    def nearest(self, rows: Array, zeros: Array | None) -> Array:
        """Return the nearest values; zero points of an affine format are added before and subtracted after.

        Formats with zero points have no fitted levels, so they always have a table.
        """
        if self.table is None or self.boundaries is None:
            return self.values(self.codes(rows))
        return nearest_values(rows, self.table, self.boundaries, zeros)


def ratio_grid(bits: int, *, signed: bool, coarse: bool = False) -> list[float]:
    """Return the grid of ratios that a search tries first, which is coarser if the search has a start."""
    # E(r) = sum_i w_i min_l (x_i - r l)^2 is continuous, but not convex. A ratio r moves the boundary b between two cells
    # to r b, so entry i changes its code where r = x_i / b. Between two such ratios E is one parabola. An exact search would
    # visit every x_i / b, up to k (2^b - 1) of them in a block of k entries. One grid serves all blocks at once, since rows
    # are normalized, and the least-squares step after it finds the minimum of the parabola that the grid point lies on.
    grid = np.linspace(_LOWEST_RATIO[bits], _HIGHEST_RATIO[bits], _GRID, dtype=np.float32).tolist()
    # 1.0 comes first: a later ratio must leave less error than it, so that ties keep the scale of the absolute maximum.
    grid = grid[1::3] if coarse else [1.0, *grid]
    # The levels of a signed codebook are not symmetric, so -r offers other values than r. Unsigned scales cannot store it.
    return [*grid, *(-ratio for ratio in grid if signed)]


def best_ratios(
    rows: Array, importance: Array | None, rounding: Rounding, zeros: Array | None, grid: list[float]
) -> Array:
    """Return the ratio of least squared error of each row, among the grid and the least-squares steps after it."""
    # A refinement cannot raise the error. Let c be the codes under r, and r' = <x, l_c> / <l_c, l_c> in the inner product
    # weighted by w. For fixed codes the error is a parabola in r with leading coefficient <l_c, l_c> > 0 and minimum r', and
    # rounding again under r' minimizes each term by itself:
    #     E(r') <= sum_i w_i (x_i - r' l_{c_i})^2 <= sum_i w_i (x_i - r l_{c_i})^2 = E(r) .
    # Sums in float32 may break this in the last digits, so a step is kept only if its computed error is smaller. A step to
    # zero or to the other sign is dropped: r = 0 has no codes, and the format may not hold the sign.
    if rounding.table is not None and rounding.boundaries is not None:
        return ops.best_ratios(rows, importance, rounding.table, rounding.boundaries, zeros, grid, _REFINEMENTS)
    return ops.search_ratios(rows, importance, partial(rounding.nearest, zeros=zeros), grid, _REFINEMENTS)


def fit_levels(
    rows: Array,
    within: Array | None,
    importance: Array,
    sets: Array,
    count: int,
    codebook: Codebook,
    start: Array | None = None,
) -> Array:
    r"""Fit levels and ratios together: Lloyd's algorithm, with the scales as further unknowns.

    With the importance :math:`a_b` of row ``b``, the error of a set of levels is

    .. math:: \sum_b a_b \sum_i w_{bi} \, (x_{bi} - r_b \, l_{c_{bi}})^2 .

    Each round minimizes it in one group of unknowns after the other: the codes (nearest level), the ratios (least squares by
    row), and the levels. A level ``k`` becomes the centroid of the entries with its code,

    .. math:: l_k = \frac{\sum a_b r_b w_{bi} x_{bi}}{\sum a_b r_b^2 w_{bi}} \quad \text{over } c_{bi} = k .

    A level without entries keeps its value. Common factors of levels and ratios cancel, so levels are scaled at the end.

    Parameters
    ----------
    rows : array of float32, shape (m, k)
        Normalized blocks.
    within : array of float32, shape (m, k), optional
        Importance of the entries of a row, relative to each other.
    importance : array of float64, shape (m,)
        Importance of a row: the square of its scale, since errors of the weights count and not errors of the rows.
    sets : array of int64, shape (m,)
        Set of levels of each row.
    count : int
        Number of sets.
    codebook : Codebook
        Starting point of a first attempt; a second one starts from quantiles of a normal distribution.
    start : array of float32, shape (count, n), optional
        Levels fitted to similar rows. If given, they are the only starting point, and a few rounds are made from there.

    Returns
    -------
    array of float32, shape (count, n)
        Ascending levels, the largest of each set 1 in absolute value.

    References
    ----------
    BOF4, arXiv 2505.06653, for the importance in the centroids; Lloyd (1982). The joint update of scales is ours.
    """
    xp = namespace(rows)
    device = device_of(rows)
    known = xp.asarray(np.tile(codebook.levels, (count, 1)), device=device)
    if start is not None:
        levels = _alternate(rows, within, importance, sets, start, codebook, again=True)[0]
    else:
        starts = [known, _spread_levels(rows, importance, sets, count, len(codebook))]
        tried = [_alternate(rows, within, importance, sets, one, codebook, again=False) for one in starts]
        (first, error), (second, other) = tried
        levels = xp.where((other < error)[:, None], second, first)
    # (f r) (l / f) = r l: the error determines levels up to a factor, which the search for scales will absorb.
    largest = xp.max(xp.abs(levels), axis=1)
    usable = (largest > 0)[:, None]
    scaled = levels / xp.where(usable, largest[:, None], xp.ones_like(levels))
    return xp.where(usable, scaled, known)


def _spread_levels(rows: Array, importance: Array, sets: Array, count: int, size: int) -> Array:
    """Return the levels that are asymptotically best for many bits if the rows are normally distributed.

    The best density of levels is proportional to the cube root of the density of the rows (Panter and Dite, 1951). For a
    normal distribution that is a normal density of three times the variance.
    """
    xp = namespace(rows)
    squares = importance * xp.astype(ops.row_sums(rows * rows), xp.float64)
    total = ops.bin_sums(importance, sets, count) * rows.shape[1]
    # Levels are placed at the quantiles (k + 1/2) / n of N(0, 3 v), with v the mean square of the rows: for p of N(0, v),
    # p^(1/3) is proportional to exp(-x^2 / (6 v)).
    mean = ops.bin_sums(squares, sets, count) / xp.where(total > 0, total, xp.ones_like(total))
    quantiles: npt.NDArray[np.float64] = np.array(
        [NormalDist(sigma=3**0.5).inv_cdf((index + 0.5) / size) for index in range(size)]
    )
    shape = xp.asarray(quantiles, device=device_of(rows))
    return xp.astype(xp.sqrt(mean)[:, None] * shape[None, :], xp.float32)


def _alternate(
    rows: Array,
    within: Array | None,
    importance: Array,
    sets: Array,
    levels: Array,
    codebook: Codebook,
    *,
    again: bool,
) -> tuple[Array, Array]:
    """Return the levels after the rounds of :func:`fit_levels`, and the error that they leave in each set."""
    xp = namespace(rows)
    count, size = levels.shape
    grid = ratio_grid(codebook.bits, signed=codebook.normalization == "signed", coarse=again)
    ratios = xp.ones((rows.shape[0],), dtype=xp.float32, device=device_of(rows))
    for step in range(_ROUNDS_AGAIN if again else _ROUNDS):
        rounding = Rounding.of(codebook, levels, sets)
        # A search starts from the grid and not from the present ratios. It is the only step that may raise the error.
        if step in _SEARCHES or (again and step == 0):
            ratios = best_ratios(rows, within, rounding, None, grid)
        codes = rounding.codes(rows / ratios[:, None])
        ratios = ops.least_squares(rows, within, rounding.values(codes), ratios)
        # Lloyd step with importance. For fixed codes and ratios the error of a set is quadratic in its levels. Each entry
        # has one code, so the normal equations are diagonal, one scalar equation for each level:
        #     sum a_b r_b w_bi (x_bi - r_b l_k) = 0   over c_bi = k ,   or   below_k * l_k = above_k .
        # The centroid is taken of x / r with importance a r^2 w, not of x: a block of large ratio counts more.
        # An empty cell has below_k = 0, no equation, and keeps its level.
        above, below = ops.level_sums(rows, within, importance, ratios, codes, sets, size, count)
        centers = xp.astype(above / xp.where(below > 0, below, xp.ones_like(below)), xp.float32)
        levels = xp.reshape(xp.where(below > 0, centers, xp.reshape(levels, (-1,))), (count, size))
        # A centroid lies in its cell only while the ratios are those of the codes. Sorting keeps the set of levels, and so
        # the error, and restores the order that boundaries need.
        levels = xp.sort(levels, axis=1)
    rounding = Rounding.of(codebook, levels, sets)
    errors = ops.squared_errors(rows, within, ratios, rounding.nearest(rows / ratios[:, None], None))
    return levels, ops.bin_sums(importance * xp.astype(errors, xp.float64), sets, count)
