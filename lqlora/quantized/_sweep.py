"""Passes of error feedback and coordinate descent, which round a weight matrix column by column.

Each column compensates the errors of the others. Matrices are held transposed and in the order of the pass, so that a
column of the weight is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError
from lqlora.quantized._decoding import decode_scales, zero_point_codes
from lqlora.quantized._layout import in_shape, layout_of
from lqlora.quantized._search import Rounding
from lqlora.quantized._source import Source
from lqlora.quantized._trellis import column_values

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.quantized.array import QuantizedArray

__all__ = ["System", "targets"]

#: Columns of a group. Within it, errors reach the next column one by one; the columns after it get the errors of the whole
#: group by one product of matrices.
_COLUMNS = 128


@dataclass(frozen=True)
class System:
    r"""Order of the columns, and the coupling of their errors by a second moment ``H``.

    Factor :math:`H = M \operatorname{diag}(d) M^T` with ``M`` upper triangular and ones on its diagonal. With the errors
    ``E = W - Q``, column ``k`` of ``E M`` holds the error of column ``k`` plus multiples of those of the columns before it:

    .. math:: \operatorname{tr}(E H E^T) = \sum_k d_k \, \|(E M)_k\|^2 , \qquad
              (E M)_k = \Bigl(W_k + \sum_{j < k} M_{jk} E_j\Bigr) - Q_k .

    The bracket is the *target* of column ``k``. Its errors ``E_j`` are known when column ``k`` is rounded, so rounding the
    target to nearest minimizes the term of column ``k``. This is GPTQ: its Cholesky factor of the inverse of ``H`` is the
    inverse of ``M diag(sqrt(d))``.

    For coordinate descent, set the derivative by column ``k`` to zero with all other columns fixed. The best value is

    .. math:: W_k + \sum_{j \ne k} \frac{H_{jk}}{H_{kk}} E_j .

    Parameters
    ----------
    order : array of int64, shape (n,)
        Columns in the order in which they are rounded.
    feedback : array, shape (n, n)
        ``M`` without its diagonal, in that order.
    exchange : array, shape (n, n)
        ``H[j, k] / H[k, k]`` without the diagonal, in that order.
    importance : array of float64, shape (n,)
        ``d`` of each column in the order of the weight, the factor of the squared distance from its target. The largest
        is 1.
    """

    order: Array
    feedback: Array
    exchange: Array
    importance: Array

    @classmethod
    def of(cls, damped: Array, order: Array, dtype: Array) -> System:
        """Return the system of a second moment, given in float64, with arrays of a dtype."""
        xp = namespace(damped)
        ordered = ops.pick(ops.pick(damped, order, axis=0), order, axis=1)
        # H = U U^T with U = M diag(sqrt d) upper triangular, so the diagonal of U is sqrt d, and M = U with unit diagonal.
        # With T the targets, (E M)_k = T_k - Q_k, hence
        #     tr(E H E^T) = ||E U||^2 = sum_k d_k ||T_k - Q_k||^2 .
        # So d_k is what the squared distance of column k from its target counts. It is the Schur complement
        #     d_k = H_kk - H_kR H_RR^{-1} H_Rk ,   R = columns after k ,
        # the part of the error of column k that no change of the later columns can undo.
        factor = _upper_factor(ordered)
        roots, diagonal = xp.linalg.diagonal(factor), xp.linalg.diagonal(ordered)
        relative = ordered / diagonal[None, :]
        importance = ops.pick(roots * roots, xp.argsort(order))
        return cls(
            order,
            xp.astype(xp.triu(factor / roots[None, :], k=1), dtype),
            xp.astype(xp.triu(relative, k=1) + xp.tril(relative, k=-1), dtype),
            importance / xp.max(importance),
        )


def _upper_factor(matrix: Array) -> Array:
    """Return the upper triangular factor of ``matrix = factor @ factor.T``.

    Cholesky's factor is lower triangular. Reversing rows and columns before and after turns it into an upper one.
    """
    xp = namespace(matrix)
    try:
        factor = xp.flip(xp.linalg.cholesky(xp.flip(matrix)))
    except (ValueError, RuntimeError):  # each library raises a class of its own that derives from one of these
        factor = xp.full_like(matrix, float("nan"))
    if not bool(xp.all(xp.isfinite(factor))):
        raise InvalidArgumentError(
            "gram must be positive definite once it is damped. Check that it is a second moment, or increase damping."
        )
    return factor


def targets(w: Array, q: QuantizedArray, system: System, dense: Array | None = None) -> Array:
    """Return the targets of columns that are rounded one after another to the values of a quantized matrix.

    Parameters
    ----------
    w : array of float32 or float64, shape (m, n)
        Weights.
    q : QuantizedArray of shape (m, n)
        Quantized matrix whose scales, zero points and levels are used.
    system : System
        Coupling of the columns.
    dense : array of float32, shape (m, n), optional
        Dense values of ``q``, for a sweep of coordinate descent: each column is rounded to its best value while all
        others stay as they are. If not given, this is a pass of error feedback: columns make up for the errors of the
        columns before them.

    Returns
    -------
    array of the same shape and dtype as ``w``
        Target of each column: its weights plus the errors of other columns that it compensates. Rounding it to nearest
        gives the codes.
    """
    xp = namespace(w)
    # Feedback: T_k = W_k + sum_{j < k} M_jk E_j, of columns that are rounded already. Rounding T_k to nearest minimizes the
    # term of column k, though not the sum, since E_k enters later targets.
    # Descent: in E_k the objective is H_kk ||Q_k - T_k||^2 + const with T_k = W_k + sum_{j != k} (H_jk / H_kk) E_j. Values of
    # column k are free of each other, so rounding T_k to nearest is the exact minimum and no step raises the error.
    wanted = _ordered(w, system)
    coupling, errors = system.feedback, xp.zeros_like(wanted)
    grid, count = _Grid.of(w, q, system), wanted.shape[0]
    found: list[Array] = []
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses targets that are not finite
        if dense is not None:
            coupling, errors = system.exchange, wanted - _ordered(dense, system)
        for start in range(0, count, _COLUMNS):
            stop = min(start + _COLUMNS, count)
            # Errors of other groups by products of matrices; later groups have errors only in a sweep.
            base = wanted[start:stop, :]
            for others in (slice(0, start), slice(stop, count if dense is not None else stop)):
                base = base + xp.matrix_transpose(coupling[others, start:stop]) @ errors[others, :]
            inner = xp.matrix_transpose(coupling[start:stop, start:stop])
            # Errors of later columns of the group are zero or have no coupling in a pass, and are the present ones in a sweep.
            for column in range(start, stop):
                target = base[column - start, :] + inner[column - start, :] @ errors[start:stop, :]
                found.append(target)
                errors[column, :] = wanted[column, :] - grid.nearest(column, target)
    return ops.pick(xp.stack(found, axis=1), xp.argsort(system.order), axis=1)


def _ordered(matrix: Array, system: System) -> Array:
    """Return the columns of a matrix as rows, in the order of the pass."""
    xp = namespace(matrix)
    return ops.pick(xp.matrix_transpose(matrix), system.order, axis=0)


@dataclass(frozen=True)
class _Grid:
    """Values that each weight may be rounded to under known scales.

    Parameters
    ----------
    scales : array of float32, shape (n, m)
        Decoded scales by weight, in the order of the pass.
    divisors : array of float32 or float64, shape (n, m)
        The same, but infinite where a scale is zero, so that the quotient is zero.
    zeros : array of float32, shape (n, m), optional
        Zero points.
    rounding : Rounding
        Levels.
    sets : array of int64, shape (n, m), optional
        Set of levels of each weight, where there are several.
    block_size : int
        Weights of a block, along the columns in a trellis format.
    """

    scales: Array
    divisors: Array
    zeros: Array | None
    rounding: Rounding
    sets: Array | None
    block_size: int

    @classmethod
    def of(cls, w: Array, q: QuantizedArray, system: System) -> _Grid:
        layout, fmt = layout_of(q.format, q.shape), q.format
        xp = namespace(q.packed)
        blocks = layout.block_of(slice(0, layout.count), q.packed)

        def by_weight(values: Array) -> Array:
            return _ordered(in_shape(ops.pick(values, blocks), fmt.axis, q.shape), system)

        if layout.is_trellis and fmt.axis not in (0, -2):
            raise InvalidArgumentError(
                f"fmt must have its blocks along the columns for error feedback with trellis codes, got {fmt}. Write the block "
                f"size as {fmt.block_size}@0."
            )
        zeros, sets, rounding = zero_point_codes(q), None, Rounding.of(fmt.codebook, q.levels, None)
        if zeros is not None:
            zeros = by_weight(xp.astype(zeros, xp.float32))
        if rounding.table is None and rounding.trellis is None:
            sets = by_weight(Source(w, None, fmt, "").sets_of(slice(0, layout.blocks)))
        scales = by_weight(decode_scales(q.scales, fmt.scales))
        # x / inf = 0: all weights of a block without a scale get the code nearest to zero, and decode to zero.
        divisors = xp.astype(xp.where(scales != 0, scales, xp.full_like(scales, float("inf"))), w.dtype)
        return cls(scales, divisors, zeros, rounding, sets, layout.block_size)

    def nearest(self, column: int, target: Array) -> Array:
        """Return a column rounded to exactly the values that its codes will decode to."""
        if self.rounding.trellis is not None:
            return column_values(target, self.scales[column, :], self.rounding.trellis, self.block_size)
        zeros = None if self.zeros is None else self.zeros[column, :]
        normalized = target / self.divisors[column, :]
        if self.sets is None:
            values = self.rounding.nearest(normalized, zeros)
        else:  # formats with zero points have no fitted levels
            values = replace(self.rounding, sets=self.sets[column, :]).nearest(normalized[:, None], None)[:, 0]
        return values * self.scales[column, :]
