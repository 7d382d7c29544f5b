"""What every weighting provides."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import namespace

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["AbstractWeighting", "LowRankStep", "ScaledWeighting", "balanced", "unit_of"]

#: Below this share of the whole, what a truncated SVD leaves is measured and not computed as a difference of squares,
#: which is exact to 2e-7 of the whole in float32. In a large matrix roundings cancel: 2**18 entries leave 1e-8.
_CANCELLED, _CANCELLED_IN_LARGE, _LARGE = 0.1, 1e-3, 2**18


class LowRankStep(NamedTuple):
    """A low-rank approximation of a residual.

    Parameters
    ----------
    left : array, shape (m, r)
        Left factor.
    right : array, shape (r, n)
        Right factor; ``left @ right`` is the approximation.
    basis : array, optional
        What the next step, on a similar residual, starts from.
    squared_error : float
        Squared norm of what is left.
    """

    left: Array
    right: Array
    basis: Array | None
    squared_error: float


class AbstractWeighting(abc.ABC):
    """A norm of residuals. Implementations are final: compose them, do not derive from them."""

    #: True if all weights were zero: entries then count the same, but their errors cost an allocation nothing.
    all_zero: bool = False

    @property
    def input_gram(self) -> Array | None:
        """Second moment of the inputs, of shape (n, n), if the weighting has one: what error feedback needs."""
        return None

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless the weighting fits a matrix.

        Parameters
        ----------
        shape : tuple of int
            Shape of the matrix.

        Raises
        ------
        InvalidArgumentError
            If it does not fit.
        """

    @abc.abstractmethod
    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares of a residual.

        Parameters
        ----------
        residual : array of float32 or float64, shape (m, n)
            Matrix minus its approximation.

        Returns
        -------
        float
            The sum, accumulated in float64.
        """

    @abc.abstractmethod
    def element_weights(self) -> Array | None:
        """Return what single entries count, for a quantizer that weighs squares one by one.

        Returns
        -------
        array that broadcasts to (m, n), optional
            The diagonal of the quadratic form that the norm is; None if all entries count the same.
        """

    @abc.abstractmethod
    def low_rank(
        self, residual: Array, rank: int, *, previous: LowRankStep | None = None, seed: int = 0
    ) -> LowRankStep:
        """Return the low-rank matrix nearest to a residual.

        Parameters
        ----------
        residual : array of float32 or float64, shape (m, n)
            Matrix minus its quantized part.
        rank : int
            0 to ``min(m, n)``.
        previous : LowRankStep, optional
            Result for a similar residual, of the same rank: makes the step cheaper.
        seed : int, default 0
            Of the randomized start where there is no previous step.

        Returns
        -------
        LowRankStep
            Factors of equal norms, component by component.
        """


class ScaledWeighting(AbstractWeighting):
    r"""A norm that is Frobenius' after a linear map: :math:`\lVert A E C \rVert`.

    The best approximation then is a truncated SVD of the mapped residual, mapped back (Eckart and Young 1936). What is
    left to an implementation is the map, with weights of about one, and the factor that makes up for that.
    """

    #: Factor of the squared norm.
    _factor: float = 1.0

    @abc.abstractmethod
    def _map(self, residual: Array) -> Array:
        """Return the mapped residual."""

    @abc.abstractmethod
    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        """Return factors of the approximation of the residual, given those of the mapped residual."""

    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares."""
        unit = unit_of(residual)
        return ops.sum_of_squares(self._map(residual if unit == 1.0 else residual / unit)) * self._factor * unit * unit

    def low_rank(
        self, residual: Array, rank: int, *, previous: LowRankStep | None = None, seed: int = 0
    ) -> LowRankStep:
        """Return the truncated SVD of the mapped residual, mapped back; from a previous step, two passes suffice."""
        unit = unit_of(residual)
        residual = residual if unit == 1.0 else residual / unit
        mapped = self._map(residual)
        svd = ops.subspace_svd(mapped, rank, seed=seed, start=None if previous is None else previous.basis)
        left, right = balanced(*self._factors(svd, residual))
        total = ops.sum_of_squares(mapped)
        rest = total - ops.sum_of_squares(svd.right)
        if rest < (_CANCELLED if math.prod(mapped.shape) < _LARGE else _CANCELLED_IN_LARGE) * total:
            rest = ops.sum_of_squares(mapped - svd.left @ svd.right)
        share = unit**0.5
        if unit != 1.0:
            left, right = left * share, right * share
        return LowRankStep(left, right, svd.basis, rest * self._factor * unit * unit)


def unit_of(residual: Array) -> float:
    """Return a power of four near the largest entry if squares of entries might leave the range of float32, else 1.

    Parameters
    ----------
    residual : array
        Finite values.

    Returns
    -------
    float
        What to divide by. Its root is a power of two, so that both factors can carry it without rounding.
    """
    if not min(residual.shape):
        return 1.0
    xp = namespace(residual)
    return power_of_four(max(float(xp.max(residual)), -float(xp.min(residual))), 2.0**40)


def power_of_four(size: float, tolerance: float) -> float:
    """Return the power of four near a size, or 1 if the size is zero or within a factor of 1.

    Parameters
    ----------
    size : float
        Not negative.
    tolerance : float
        The factor.

    Returns
    -------
    float
        A power of four.
    """
    if size == 0.0 or 1 / tolerance < size < tolerance:
        return 1.0
    return 4.0 ** min(max(round(math.log(size, 4)), -63), 63)  # what float32 can be divided by


def balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Give both factors of each component the same norm.

    Weights stretch one side more than the other, by orders of magnitude for Fisher information. The product does not
    care, but an optimizer that moves every entry by the same step would destroy the shorter factor.

    Parameters
    ----------
    left, right : array, shape (m, r) and (r, n)
        Factors.

    Returns
    -------
    left, right : array
        Factors of the same product.
    """
    xp = namespace(left, right)
    norms = xp.sqrt(xp.sum(left * left, axis=0)), xp.sqrt(xp.sum(right * right, axis=1))
    positive = (norms[0] > 0) & (norms[1] > 0)
    ones = xp.ones_like(norms[0])
    ratio = xp.sqrt(xp.where(positive, norms[1], ones) / xp.where(positive, norms[0], ones))
    return left * ratio[None, :], right / ratio[:, None]
