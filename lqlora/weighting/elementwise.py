"""Elementwise weighting: an importance for every entry, such as the diagonal of the Fisher information."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lqlora import ops
from lqlora._dispatch import FLOATS, dtype_name, namespace, plain_array
from lqlora._options import require_integer
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import is_zero, require_importance, require_matrix, warn_of_zeros
from lqlora.weighting.base import (
    AbstractWeighting,
    LowRankStep,
    MeasuredNorm,
    balanced,
    checked_residual,
    exponent_of,
    in_float64,
    largest_magnitude,
    normalized_at,
    unit_of,
)
from lqlora.weighting.diagonal import RowColumn

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Elementwise"]

#: Steps of conjugate gradients for each half of a sweep. They start from the current factor, so a few are enough; the
#: next sweep continues where they stopped.
_STEPS = 5

#: A component whose diagonal of the normal equations is below this, relative to the largest importance, is not changed:
#: its reciprocal would leave the range of float32.
_NEGLIGIBLE = 2.0**-100

#: A low-rank part that exceeds the residual by more than this factor is not used.
_FREE = 2.0**20

#: Between these sums of weighted squares no term overflowed, and terms that underflowed are too small to count.
_SMALLEST, _LARGEST = 2.0**-600, 2.0**1000


@dataclass(frozen=True, eq=False)
class Elementwise(AbstractWeighting):
    r"""Importance of every entry: the squared norm is :math:`\sum_{ij} F_{ij} E_{ij}^2`.

    Use it with the Fisher information of each weight, from :func:`lqlora.nn.collect_fisher`. Its low-rank step is
    iterative and takes longer than those of the other norms; ``sweeps=0`` avoids that.

    Parameters
    ----------
    weights : array of float32 or float64, shape (m, n)
        Importance of each entry, finite and not negative, such as the diagonal Fisher information.
    sweeps : int, default 1
        Sweeps of the low-rank step. A sweep improves the left factor with the right one fixed, then the right factor
        with the left one fixed. 0 uses the rank-one surrogate only, as LQ-LoRA does (arXiv 2311.12023, section 3.2).

    Raises
    ------
    InvalidArgumentError
        If a value is negative, the array is not two-dimensional, or ``sweeps`` is not an integer of at least 0.
    NonFiniteError
        If a value is NaN or infinite.

    Warns
    -----
    UserWarning
        If all values are zero. Equal importance is used instead.

    Notes
    -----
    The best low-rank approximation in this norm has no closed form, and finding it is NP-hard (Gillis and Glineur
    2011). The step starts from the best approximation for the surrogate :meth:`RowColumn.from_fisher`, or from the
    factors of the previous iterate, and lowers the true norm. With one factor fixed, each row of the other is a
    separate least-squares problem; conjugate gradients (Hestenes and Stiefel 1952) work on all of them at once. Errors
    of entries of zero importance are ignored. A row of zeros keeps the factors of the surrogate, whose importance has a
    floor.

    Examples
    --------
    >>> import numpy as np
    >>> Elementwise(np.array([[1.0, 0.0]])).squared_norm(np.array([[2.0, 5.0]]))
    4.0
    """

    weights: Array
    sweeps: int = 1
    surrogate: RowColumn = field(init=False, repr=False)
    _largest: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        importance = ops.widen(plain_array(self.weights, "weights", FLOATS), "weights")
        xp = namespace(importance)
        require_importance(importance, "weights")
        require_integer(self.sweeps, "sweeps")
        require_matrix(importance, "weights")
        if is_zero(importance):
            warn_of_zeros("weights")
            importance = xp.ones_like(importance)
            object.__setattr__(self, "all_zero", True)
            object.__setattr__(self, "sweeps", 0)  # the surrogate is exact for equal importance
        largest = float(xp.max(importance)) if min(importance.shape) else 0.0
        object.__setattr__(self, "weights", importance)
        object.__setattr__(self, "surrogate", RowColumn.from_fisher(importance))
        object.__setattr__(self, "_largest", largest)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is a value for every entry."""
        if tuple(self.weights.shape) != tuple(shape):
            raise InvalidArgumentError(
                f"weights must have the shape of the matrix, {tuple(shape)}, got {tuple(self.weights.shape)}."
            )

    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares."""
        return in_float64(*self._parts(checked_residual(self, residual)))

    def measured(self, matrix: Array) -> MeasuredNorm:
        """Return the norm in a unit in which the squared norm of the matrix is about one."""
        if type(self).squared_norm is not Elementwise.squared_norm:  # a subclass measures otherwise
            return super().measured(matrix)
        return normalized_at(self, *self._parts(checked_residual(self, matrix)))

    def _parts(self, residual: Array) -> tuple[float, int]:
        """Return a squared norm as a number and the exponent of the power of two that it is multiplied by."""
        importance, own = self._near_one(2.0**40)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is computed again below
            total = ops.sum_of_squares(residual, importance)
        if _SMALLEST < total < _LARGEST or 0 in residual.shape:
            return total, self._exponent + exponent_of(own)
        # sqrt(F) |E| is between the roots of the smallest and the largest number of float64 where E is near one.
        xp, unit = namespace(residual, self.weights), unit_of(residual)
        terms = xp.sqrt(xp.astype(self.weights, xp.float64)) * xp.astype(residual / unit, xp.float64)
        size = unit_of(terms)
        return ops.sum_of_squares(terms / size), self._exponent + 2 * (exponent_of(unit) + exponent_of(size))

    def element_weights(self) -> Array | None:
        """Return the importance of each entry, divided by a unit if the largest is far from one."""
        return self._near_one(2.0**40)[0]

    def _near_one(self, tolerance: float) -> tuple[Array, float]:
        """Return the importance divided by a unit, and the unit: the power of four near the largest, unless that is near 1."""
        unit = ops.power_of_four(self._largest, tolerance, dtype_name(self.weights))
        return (self.weights if unit == 1.0 else self.weights / unit), unit

    def low_rank(
        self, residual: Array, rank: int, *, previous: LowRankStep | None = None, seed: int = 0
    ) -> LowRankStep:
        """Return the factors of the previous step, or of the surrogate, improved in the true norm."""
        residual = checked_residual(self, residual)
        start = previous if previous is not None and self.sweeps else None
        if start is None:
            start = self.surrogate.low_rank(residual, rank, previous=previous, seed=seed)
        if rank and self.sweeps:
            # Entries without importance are free. If they grow beyond the digits of float32, the others lose theirs. They may
            # even overflow, and such factors are not used either.
            with np.errstate(over="ignore", invalid="ignore"):
                left, right = self._swept(residual, start.left, start.right)
                rest = residual - left @ right
            if largest_magnitude(rest) <= _FREE * largest_magnitude(residual):
                return LowRankStep(left, right, start.basis, self.squared_norm(rest))
            start = self.surrogate.low_rank(residual, rank, previous=previous, seed=seed)
        return start._replace(squared_error=self.squared_norm(residual - start.left @ start.right))

    def _swept(self, residual: Array, left: Array, right: Array) -> tuple[Array, Array]:
        """Return the factors after the sweeps, balanced, in the units of the residual."""
        # The factor that is fixed is made orthonormal first: right = T^T Q^T by QR, so left @ right = (left @ T^T) @
        # Q^T. The normal equations of row i are then Q^T diag(F_i) Q, whose eigenvalues lie between the smallest and
        # the largest importance of the row: their condition does not depend on the singular values of the factors.
        xp = namespace(residual, self.weights)
        unit = unit_of(residual)
        importance = xp.astype(self._near_one(2.0)[0], residual.dtype)
        flipped, flipped_importance = xp.matrix_transpose(residual) / unit, xp.matrix_transpose(importance)
        residual, left = residual / unit, left / unit
        for _ in range(self.sweeps):
            rows, triangle = xp.linalg.qr(xp.matrix_transpose(right))
            left = _solved(residual, importance, left @ xp.matrix_transpose(triangle), xp.matrix_transpose(rows))
            columns, triangle = xp.linalg.qr(left)
            right = xp.matrix_transpose(triangle @ xp.matrix_transpose(rows))
            right = xp.matrix_transpose(_solved(flipped, flipped_importance, right, xp.matrix_transpose(columns)))
            left = columns
        left, right = balanced(left, right)
        return left * unit**0.5, right * unit**0.5


def _solved(target: Array, importance: Array, factor: Array, other: Array) -> Array:
    """Improve a factor: lower ``sum(importance * (target - factor @ other)**2)`` with ``other`` held fixed."""
    # Row f of the factor solves the normal equations  f N = t diag(F) A^T  with N = A diag(F) A^T, A = other, and t and
    # F the rows of target and importance. N is never formed: f N is ((F * (f A)) A^T), two products for all rows
    # together. Each row runs its own preconditioned conjugate gradients (step, progress and ratio are columns, one
    # number for each row), with the diagonal of N as preconditioner. Every step lowers the error of every row, or
    # leaves it.
    xp = namespace(target)
    back = xp.matrix_transpose(other)
    diagonal = importance @ (back * back)
    counts = diagonal > _NEGLIGIBLE
    inverse = xp.where(counts, 1 / xp.where(counts, diagonal, xp.ones_like(diagonal)), xp.zeros_like(diagonal))
    rest = (importance * (target - factor @ other)) @ back
    direction = rest * inverse
    progress = xp.sum(rest * direction, axis=1, keepdims=True)
    for _ in range(_STEPS):
        mapped = (importance * (direction @ other)) @ back
        curvature = xp.sum(direction * mapped, axis=1, keepdims=True)
        step = _ratio(progress, curvature)
        factor, rest = factor + step * direction, rest - step * mapped
        preconditioned = rest * inverse
        former, progress = progress, xp.sum(rest * preconditioned, axis=1, keepdims=True)
        direction = preconditioned + _ratio(progress, former) * direction
    return factor


def _ratio(above: Array, below: Array) -> Array:
    """Return the quotient, or zero where the divisor is zero: such a row has converged and takes no more steps."""
    xp = namespace(above)
    return xp.where(below > 0, above / xp.where(below > 0, below, xp.ones_like(below)), xp.zeros_like(above))
