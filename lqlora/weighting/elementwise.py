"""A weight for every entry: the diagonal of the Fisher information."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import is_zero, require_weights, warn_of_zeros
from lqlora.weighting.base import AbstractWeighting, LowRankStep, balanced, power_of_four, unit_of
from lqlora.weighting.diagonal import RowColumn

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Elementwise"]

#: Steps of conjugate gradients for each half of a sweep. They start from the factor at hand, so that a few are enough;
#: what is left is taken up by the next sweep.
_STEPS = 5

#: A row whose weights are below this, of the largest, stays as it is: their reciprocals are beyond the range of float32.
_NEGLIGIBLE = 2.0**-100


@dataclass(frozen=True, eq=False)
class Elementwise(AbstractWeighting):
    r"""A weight for every entry: the squared norm is :math:`\sum_{ij} F_{ij} E_{ij}^2`.

    Parameters
    ----------
    weights : array of float32 or float64, shape (m, n)
        Weights, such as the diagonal Fisher information; finite and not negative.
    sweeps : int, default 1
        Sweeps of the low-rank step: each improves the left factor for the right one at hand, then the right for the
        left. 0 stops at the rank-one surrogate, as LQ-LoRA does (arXiv 2311.12023, section 3.2).

    Raises
    ------
    InvalidArgumentError
        If a weight is negative, the array is no matrix, or the number of sweeps is negative.
    NonFiniteError
        If a weight is NaN or infinite.

    Warns
    -----
    UserWarning
        If all weights are zero; they then count the same.

    Notes
    -----
    The best low-rank approximation in this norm has no closed form, and to find it is NP-hard (Gillis and Glineur
    2011). The step starts from the best one for the surrogate :meth:`RowColumn.from_fisher`, or from the factors of the
    iterate before, and lowers the true norm: for one factor fixed, each row of the other is a least-squares problem of
    its own, and conjugate gradients (Hestenes and Stiefel 1952) work on all of them at once. An entry of weight zero
    counts nothing; a row of zeros keeps the factors of the surrogate, whose weights have a floor.

    Examples
    --------
    >>> import numpy as np
    >>> Elementwise(np.array([[1.0, 0.0]])).squared_norm(np.array([[2.0, 5.0]]))
    4.0
    """

    weights: Array
    sweeps: int = 1
    surrogate: RowColumn = field(init=False, repr=False)
    _unit: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = ops.widen(self.weights, "weights")
        xp = namespace(weights)
        require_weights(weights, "weights")
        if not isinstance(self.sweeps, int) or isinstance(self.sweeps, bool) or self.sweeps < 0:
            raise InvalidArgumentError(f"sweeps is an int of at least 0, not {self.sweeps!r}.")
        if is_zero(weights):
            warn_of_zeros("weights", stacklevel=3)
            weights = xp.ones_like(weights)
            object.__setattr__(self, "all_zero", True)
            object.__setattr__(self, "sweeps", 0)  # the surrogate is exact
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "surrogate", RowColumn.from_fisher(weights))
        object.__setattr__(self, "_unit", power_of_four(float(xp.max(weights)) if min(weights.shape) else 0.0, 2.0))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is a weight for every entry."""
        if tuple(self.weights.shape) != tuple(shape):
            raise InvalidArgumentError(f"Weights of shape {tuple(self.weights.shape)} do not fit {tuple(shape)}.")

    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares."""
        return ops.sum_of_squares(residual, self.weights)

    def element_weights(self) -> Array | None:
        """Return the weights."""
        return self.weights

    def low_rank(
        self, residual: Array, rank: int, *, previous: LowRankStep | None = None, seed: int = 0
    ) -> LowRankStep:
        """Improve the factors of the previous step, or of the surrogate, in the true norm."""
        start = previous if previous is not None and self.sweeps else None
        if start is None:
            start = self.surrogate.low_rank(residual, rank, previous=previous, seed=seed)
        left, right = start.left, start.right
        if rank and self.sweeps:
            left, right = self._swept(residual, left, right)
        return LowRankStep(left, right, start.basis, self.squared_norm(residual - left @ right))

    def _swept(self, residual: Array, left: Array, right: Array) -> tuple[Array, Array]:
        xp = namespace(residual, self.weights)
        unit = unit_of(residual)
        weights = xp.astype(self.weights / self._unit, residual.dtype)
        flipped, flipped_weights = xp.matrix_transpose(residual) / unit, xp.matrix_transpose(weights)
        residual, left = residual / unit, left / unit
        for _ in range(self.sweeps):
            rows, triangle = xp.linalg.qr(xp.matrix_transpose(right))
            left = _solved(residual, weights, left @ xp.matrix_transpose(triangle), xp.matrix_transpose(rows))
            columns, triangle = xp.linalg.qr(left)
            right = xp.matrix_transpose(triangle @ xp.matrix_transpose(rows))
            right = xp.matrix_transpose(_solved(flipped, flipped_weights, right, xp.matrix_transpose(columns)))
            left = columns
        left, right = balanced(left, right)
        return left * unit**0.5, right * unit**0.5


def _solved(target: Array, weights: Array, factor: Array, other: Array) -> Array:
    """Lower ``sum(weights * (target - factor @ other)**2)`` over the rows of a factor, each by conjugate gradients.

    The preconditioner is the diagonal of each row's normal equations.
    """
    xp = namespace(target)
    back = xp.matrix_transpose(other)
    diagonal = weights @ (back * back)
    counts = diagonal > _NEGLIGIBLE
    inverse = xp.where(counts, 1 / xp.where(counts, diagonal, xp.ones_like(diagonal)), xp.zeros_like(diagonal))
    rest = (weights * (target - factor @ other)) @ back
    direction = rest * inverse
    progress = xp.sum(rest * direction, axis=1, keepdims=True)
    for _ in range(_STEPS):
        mapped = (weights * (direction @ other)) @ back
        curvature = xp.sum(direction * mapped, axis=1, keepdims=True)
        step = _ratio(progress, curvature)
        factor, rest = factor + step * direction, rest - step * mapped
        preconditioned = rest * inverse
        former, progress = progress, xp.sum(rest * preconditioned, axis=1, keepdims=True)
        direction = preconditioned + _ratio(progress, former) * direction
    return factor


def _ratio(above: Array, below: Array) -> Array:
    """Divide; nothing is to be gained where the divisor is zero."""
    xp = namespace(above)
    return xp.where(below > 0, above / xp.where(below > 0, below, xp.ones_like(below)), xp.zeros_like(above))
