"""Rounding column by column, where each column makes up for the errors of others: the arithmetic of GPTQ.

Matrices are held transposed and in the order of the pass here, so that the columns of a weight are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError
from lqlora.quantized._encoding import decode_scales
from lqlora.quantized._fits import Source
from lqlora.quantized._layout import Layout, in_shape
from lqlora.quantized._search import Rounding

if TYPE_CHECKING:
    from lqlora._typing import Array
    from lqlora.quantized.array import QuantizedArray

__all__ = ["System", "targets"]

#: Columns whose errors reach the columns after them one by one; those further on get them by one product of matrices.
_COLUMNS = 128


@dataclass(frozen=True)
class System:
    r"""The order of the columns, and what the errors of some do to others.

    With :math:`H = M \operatorname{diag}(d) M^T` and ``M`` upper triangular of ones on the diagonal, the error
    :math:`\operatorname{tr}(E H E^T)` of ``E = W - Q`` is :math:`\sum_k d_k \|(E M)_k\|^2`. Column ``k`` of ``E M`` is a
    target less what it is rounded to, where the target is the column of ``W`` plus what the columns before it left.
    This is GPTQ: the inverse of its Cholesky factor of the inverse of ``H`` is ``M diag(sqrt(d))``.

    Parameters
    ----------
    order : array of int64, shape (n,)
        Columns in the order they are rounded in.
    feedback : array, shape (n, n)
        ``M`` without its diagonal, in that order.
    exchange : array, shape (n, n)
        What an error adds to the best value of a column when all other columns stay as they are, in that order.
    importance : array of float64, shape (n,)
        ``d`` of each column: what the squared distance from its target counts. The largest is 1.
    """

    order: Array
    feedback: Array
    exchange: Array
    importance: Array

    @classmethod
    def of(cls, damped: Array, order: Array, dtype: Array) -> System:
        """Factor a second moment, given in float64, into arrays of a dtype."""
        xp = namespace(damped)
        ordered = ops.pick(ops.pick(damped, order, axis=0), order, axis=1)
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
    """Return the upper triangular factor of ``matrix = factor @ factor.T``: that of Cholesky, from the other end."""
    xp = namespace(matrix)
    try:
        factor = xp.flip(xp.linalg.cholesky(xp.flip(matrix)))
    except (ValueError, RuntimeError):  # each library raises a class of its own that derives from one of these
        factor = xp.full_like(matrix, float("nan"))
    if not bool(xp.all(xp.isfinite(factor))):
        raise InvalidArgumentError(
            "The gram is not positive definite, even with its damping: it is no second moment, or needs more damping."
        )
    return factor


def targets(w: Array, q: QuantizedArray, system: System, dense: Array | None = None) -> Array:
    """Round columns one after another to the scales and levels of a quantized matrix.

    Parameters
    ----------
    w : array of float32 or float64, shape (m, n)
        Weights.
    q : QuantizedArray of shape (m, n)
        Where scales, zero points and levels are from.
    system : System
        How errors spread.
    dense : array of float32, shape (m, n), optional
        What ``q`` decodes to. Given, its columns are rounded anew, each to what is best while all others stay as they
        are. Not given, columns are rounded for the first time, and make up for the errors of those before them.

    Returns
    -------
    array of the same shape and dtype as ``w``
        What each column was when it was rounded to the nearest values.
    """
    xp = namespace(w)
    wanted = _ordered(w, system)
    coupling, errors = system.feedback, xp.zeros_like(wanted)
    grid, count = _Grid.of(w, q, system), wanted.shape[0]
    found: list[Array] = []
    with np.errstate(over="ignore", invalid="ignore"):  # a target that is not finite is for the caller to find
        if dense is not None:
            coupling, errors = system.exchange, wanted - _ordered(dense, system)
        for start in range(0, count, _COLUMNS):
            stop = min(start + _COLUMNS, count)
            base = wanted[start:stop, :]
            for others in (slice(0, start), slice(stop, count if dense is not None else stop)):
                base = base + xp.matrix_transpose(coupling[others, start:stop]) @ errors[others, :]
            inner = xp.matrix_transpose(coupling[start:stop, start:stop])
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
    """What each weight is rounded to, given that its scale is known.

    Parameters
    ----------
    scales : array of float32, shape (n, m)
        Decoded scales by weight, in the order of the pass.
    divisors : array of float32 or float64, shape (n, m)
        The same, infinite where a scale is zero: what is divided by it becomes zero.
    zeros : array of float32, shape (n, m), optional
        Zero points.
    rounding : Rounding
        Levels.
    sets : array of int64, shape (n, m), optional
        The set of levels of each weight, where there are several.
    """

    scales: Array
    divisors: Array
    zeros: Array | None
    rounding: Rounding
    sets: Array | None

    @classmethod
    def of(cls, w: Array, q: QuantizedArray, system: System) -> _Grid:
        layout, fmt = Layout.of(q.format, q.shape), q.format
        xp = namespace(q.packed)
        blocks = layout.block_of(slice(0, layout.count), q.packed)

        def by_weight(values: Array) -> Array:
            return _ordered(in_shape(ops.pick(values, blocks), fmt.axis, q.shape), system)

        zeros, sets, rounding = None, None, Rounding.of(fmt.codebook, q.levels, None)
        if q.zero_points is not None:
            zeros = by_weight(xp.astype(ops.unpack_codes(q.zero_points, fmt.bits, layout.blocks), xp.float32))
        if rounding.table is None:
            sets = by_weight(Source(w, None, fmt, "").sets_of(slice(0, layout.blocks)))
        scales = by_weight(decode_scales(q.scales))
        divisors = xp.astype(xp.where(scales != 0, scales, xp.full_like(scales, float("inf"))), w.dtype)
        return cls(scales, divisors, zeros, rounding, sets)

    def nearest(self, column: int, target: Array) -> Array:
        """Round a column, to the very values that its codes will decode to."""
        zeros = None if self.zeros is None else self.zeros[column, :]
        normalized = target / self.divisors[column, :]
        if self.sets is None:
            values = self.rounding.nearest(normalized, zeros)
        else:  # formats with zero points have no levels of their own
            values = replace(self.rounding, sets=self.sets[column, :]).nearest(normalized[:, None], None)[:, 0]
        return values * self.scales[column, :]
