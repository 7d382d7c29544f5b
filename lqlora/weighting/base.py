"""Base classes of weightings, and the numerical helpers they share: units, balanced factors."""

from __future__ import annotations

import abc
import copy
import math
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import FLOATS, dtype_name, namespace, plain_array
from lqlora._messages import given, shown
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.weighting._checks import require_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lqlora._typing import Array

__all__ = [
    "AbstractWeighting",
    "LowRankStep",
    "MeasuredNorm",
    "ScaledWeighting",
    "balanced",
    "checked_residual",
    "exponent_of",
    "in_float64",
    "largest_magnitude",
    "loaded_norm",
    "normalized_at",
    "unit_of",
]

#: A truncated SVD leaves ``||M||**2 - sum(s**2)``. In float32 this difference is exact to 2e-7 of ``||M||**2``, which
#: leaves a small rest without a correct digit. Below this share of the whole the residual is formed and measured instead. In a matrix
#: of 2**18 entries or more rounding errors average out, and the difference is exact to 1e-8.
_CANCELLED, _CANCELLED_IN_LARGE, _LARGE = 0.1, 1e-3, 2**18


class LowRankStep(NamedTuple):
    """Low-rank approximation of a residual, as a weighting returns it.

    Parameters
    ----------
    left : array, shape (m, r)
        Left factor.
    right : array, shape (r, n)
        Right factor; ``left @ right`` is the approximation.
    basis : array, optional
        Right subspace that the next step, on a similar residual, starts from.
    squared_error : float
        Weighted squared norm of the residual minus the approximation.
    """

    left: Array
    right: Array
    basis: Array | None
    squared_error: float


class MeasuredNorm(NamedTuple):
    """Norm in a unit in which the squared norm of one matrix is about one, and that squared norm.

    Parameters
    ----------
    weighting : AbstractWeighting
        The norm in the new unit.
    squared_norm : float
        Squared norm of the matrix in the new unit.
    exponent : int
        A squared norm in the old unit is ``2**exponent`` times the one in the new unit.
    """

    weighting: AbstractWeighting
    squared_norm: float
    exponent: int


class AbstractWeighting(abc.ABC):
    """Norm in which :func:`lqlora.decompose` measures errors.

    Derive from this class, or from :class:`ScaledWeighting`, to add a norm. The norms of this package are final.
    """

    #: True if all importance was zero. Entries then have equal importance, but an allocation counts no error for them.
    all_zero: bool = False

    #: Binary exponent of the unit of the squared norm, for the norms of this package: see :meth:`measured`. An exponent,
    #: because the unit may be beyond float64: that of a row and a column importance of 1e300 each is 1e600.
    _exponent: int = 0

    @property
    def feedback_gram(self) -> Array | None:
        """Second moment of the inputs, shape (n, n), or None. Error feedback (GPTQ) needs it."""
        return None

    @abc.abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless the weighting has the sizes that a matrix needs.

        Parameters
        ----------
        shape : tuple of int
            Shape of the matrix.

        Raises
        ------
        InvalidArgumentError
            If a size differs.
        """

    @abc.abstractmethod
    def squared_norm(self, residual: Array) -> float:
        """Return the squared norm of a residual.

        Parameters
        ----------
        residual : array of float32 or float64, shape (m, n)
            Matrix minus its approximation.

        Returns
        -------
        float
            Weighted sum of squares, accumulated in float64.
        """

    def measured(self, matrix: Array) -> MeasuredNorm:
        """Return the norm in a unit that suits a matrix, so that neither squared norms nor their ratios leave float64.

        Parameters
        ----------
        matrix : array of float32 or float64, shape (m, n)
            Matrix of finite entries.

        Returns
        -------
        MeasuredNorm
            The norms of this package are divided by a power of two. This method of the base class keeps the unit.
        """
        return MeasuredNorm(self, self.squared_norm(matrix), 0)

    @abc.abstractmethod
    def element_weights(self) -> Array | None:
        """Return the importance of single entries, for a quantizer that sums weighted squares.

        Returns
        -------
        array that broadcasts to (m, n), optional
            Diagonal of the quadratic form of the norm, up to one common factor that keeps products of small numbers
            from underflowing. None if all entries have the same importance.
        """

    def rotated_element_weights(self, seeds: Mapping[int, int]) -> Array | None:
        """Return the importance of the entries of a rotated matrix: the diagonal of the rotated quadratic form.

        Parameters
        ----------
        seeds : mapping of int to int
            Seed of each axis that is rotated, -1 or -2: see :func:`lqlora.ops.rotate`.

        Returns
        -------
        array that broadcasts to (m, n), optional
            As :meth:`element_weights`. This method of the base class takes the quadratic form for a diagonal one.
        """
        weights = self.element_weights()
        for axis in seeds:
            if weights is not None and len(weights.shape) >= -axis:  # else it does not depend on that axis
                weights = ops.rotated_importance(weights, axis=axis)
        return weights

    @abc.abstractmethod
    def low_rank(
        self, residual: Array, rank: int, *, previous: LowRankStep | None = None, seed: int = 0
    ) -> LowRankStep:
        """Return a low-rank approximation of a residual: the best one in this norm, if that has a closed form.

        Parameters
        ----------
        residual : array of float32 or float64, shape (m, n)
            Matrix minus its quantized part.
        rank : int
            0 to ``min(m, n)``.
        previous : LowRankStep, optional
            Result of the same rank for a similar residual. Starting from it makes the step cheaper.
        seed : int, default 0
            Seed of the randomized SVD, used where there is no previous step.

        Returns
        -------
        LowRankStep
            Factors and their error. Both factors of each component have the same norm.
        """


class ScaledWeighting(AbstractWeighting):
    r"""Norm of the form :math:`\lVert A E C \rVert_F` with invertible matrices A and C.

    The best low-rank approximation has a closed form: the truncated SVD of the mapped residual, mapped back (Eckart and
    Young 1936). A subclass defines the map, scaled so that its entries are about one. The squared norm is
    ``2**_exponent`` times the squared Frobenius norm of the mapped residual.
    """

    # With Y = A X C,  || A (E - X) C ||_F = || A E C - Y ||_F,  and X has the rank of Y because A and C are invertible.
    # By Eckart and Young the best Y is SVD_r(A E C), so the best X is A**-1 SVD_r(A E C) C**-1. It leaves
    # || A E C ||**2 - sum_{i <= r} s_i**2. With Y = U U^T (A E C), U the leading left singular vectors, C cancels:
    # X = A**-1 U U^T A E. Only A has to be inverted, and not even that where A is the identity (InputGram).

    @abc.abstractmethod
    def _map(self, residual: Array) -> Array:
        """Return the mapped residual ``A @ residual @ C``."""

    @abc.abstractmethod
    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        """Return the factors of the approximation, from the truncated SVD of the mapped residual."""

    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares."""
        return in_float64(*self._parts(checked_residual(self, residual)))

    def measured(self, matrix: Array) -> MeasuredNorm:
        """Return the norm in a unit in which the squared norm of the matrix is about one."""
        if type(self).squared_norm is not ScaledWeighting.squared_norm:  # a subclass measures otherwise
            return super().measured(matrix)
        return normalized_at(self, *self._parts(checked_residual(self, matrix)))

    def _parts(self, residual: Array) -> tuple[float, int]:
        """Return a squared norm as a number and the exponent of the power of two that it is multiplied by."""
        unit = unit_of(residual)
        mapped = self._map(residual if unit == 1.0 else residual / unit)
        return ops.sum_of_squares(mapped), self._exponent + 2 * exponent_of(unit)

    def low_rank(
        self, residual: Array, rank: int, *, previous: LowRankStep | None = None, seed: int = 0
    ) -> LowRankStep:
        """Return the truncated SVD of the mapped residual, mapped back.

        From a previous step two passes over the residual suffice, instead of six.
        """
        residual = checked_residual(self, residual)
        unit = unit_of(residual)
        residual = residual if unit == 1.0 else residual / unit
        mapped = self._map(residual)
        svd = ops.subspace_svd(mapped, rank, seed=seed, start=None if previous is None else previous.basis)
        left, right = balanced(*self._factors(svd, residual))
        # The rows of svd.right are orthogonal and have the singular values as norms, so that
        # ||M - M_r||**2 = ||M||**2 - ||right||**2.
        total = ops.sum_of_squares(mapped)
        rest = total - ops.sum_of_squares(svd.right)
        if rest < (_CANCELLED if math.prod(mapped.shape) < _LARGE else _CANCELLED_IN_LARGE) * total:
            rest = ops.sum_of_squares(mapped - svd.left @ svd.right)
        share = unit**0.5
        if unit != 1.0:
            left, right = left * share, right * share
        return LowRankStep(left, right, svd.basis, in_float64(rest, self._exponent + 2 * exponent_of(unit)))


def normalized_at(weighting: AbstractWeighting, value: float, exponent: int) -> MeasuredNorm:
    """Return a norm in a unit in which a squared norm is about one.

    Parameters
    ----------
    weighting : AbstractWeighting
        Norm with the attribute ``_exponent``.
    value, exponent : float and int
        Its squared norm of a matrix is ``value * 2**exponent``.

    Returns
    -------
    MeasuredNorm
        A copy that shares the arrays of the weighting.
    """
    own = copy.copy(weighting)
    unit = weighting._exponent  # noqa: SLF001 - shared by the weightings of this package
    shift = exponent + math.frexp(value)[1] if value else unit  # a zero has no size
    object.__setattr__(own, "_exponent", unit - shift)  # weightings are frozen
    return MeasuredNorm(own, in_float64(value, exponent - shift), shift)


def loaded_norm(
    weighting: AbstractWeighting | Callable[[], AbstractWeighting] | None, name: str
) -> AbstractWeighting | None:
    """Return a norm, or the one that a function returns.

    Parameters
    ----------
    weighting : AbstractWeighting, callable, or None
        The norm, or a function without arguments.
    name : str
        Name of the matrix, for errors.

    Returns
    -------
    AbstractWeighting or None
        None if it was given.

    Raises
    ------
    InvalidArgumentError
        If the function returns something else.
    """
    if weighting is None or isinstance(weighting, AbstractWeighting):
        return weighting
    found = weighting()
    if not isinstance(found, AbstractWeighting):
        raise InvalidArgumentError(
            f"weighting must return a norm of lqlora.weighting for {shown(name)}, got {given(found)}."
        )
    return found


def in_float64(value: float, exponent: int) -> float:
    """Return a squared norm ``value * 2**exponent``.

    Parameters
    ----------
    value : float
        Squared norm in some unit.
    exponent : int
        Binary exponent of the unit.

    Returns
    -------
    float
        The product, rounded once: to zero if it is below the smallest number of float64.

    Raises
    ------
    NonFiniteError
        If it is above the largest number of float64, or the value is not finite.
    """
    if not value < math.inf:  # NaN included
        raise NonFiniteError(
            f"squared norm must be finite, got {value!r}: the residual overflows its dtype. Scale it down."
        )
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        size = math.log10(value) + exponent * math.log10(2)
        raise NonFiniteError(
            f"squared norm must be at most 1.8e+308, the largest number of float64, got about 1e+{size:.0f}. Multiply "
            "the importance or the residual by a small number."
        ) from None


def unit_of(residual: Array) -> float:
    """Return a power of four to divide a residual by, so that squares of its entries stay in the range of float32.

    Parameters
    ----------
    residual : array of float32 or float64
        Array of finite values.

    Returns
    -------
    float
        Power of four near the largest magnitude; 1 if that is between ``2**-40`` and ``2**40``.
    """
    # If E / 4**k = L R, then E = (2**k L) (2**k R): the root of a power of four is a power of two, so both factors
    # carry their half of the unit without rounding. Scaling a residual by 4**k then changes no digit of the result.
    return ops.power_of_four(largest_magnitude(residual), 2.0**40, dtype_name(residual))


def largest_magnitude(array: Array) -> float:
    """Return the largest magnitude of the entries of an array.

    Parameters
    ----------
    array : array
        Values.

    Returns
    -------
    float
        Zero if there are no entries, NaN if one is NaN.
    """
    if 0 in array.shape:
        return 0.0
    xp = namespace(array)
    return max(float(xp.max(array)), -float(xp.min(array)))


def checked_residual(weighting: AbstractWeighting, residual: Array) -> Array:
    """Return a residual as a plain array of float32 or float64, after checking it.

    Parameters
    ----------
    weighting : AbstractWeighting
        Weighting that the residual is measured in.
    residual : array, shape (m, n)
        Matrix minus its approximation.

    Returns
    -------
    array of float32 or float64, shape (m, n)
        The same entries.

    Raises
    ------
    InvalidArgumentError
        If it is not a matrix of the sizes of the weighting.
    UnsupportedArrayError
        If it is not an array of floating-point numbers.
    """
    plain = ops.widen(plain_array(residual, "residual", FLOATS), "residual")
    require_matrix(plain, "residual")
    weighting.check(tuple(plain.shape))
    return plain


def exponent_of(unit: float) -> int:
    """Return the exponent of a power of two.

    Parameters
    ----------
    unit : float
        Power of two.

    Returns
    -------
    int
        ``log2(unit)``.
    """
    return math.frexp(unit)[1] - 1


def balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Return factors of the same product in which both factors of each component have the same norm.

    Weightings stretch one side more than the other, by orders of magnitude for Fisher information. The product is the
    same, but an optimizer such as Adam moves all entries by similar steps, which would destroy the shorter factor.

    Parameters
    ----------
    left, right : array, shape (m, r) and (r, n)
        Factors, one component for each column of ``left`` and row of ``right``.

    Returns
    -------
    left, right : array
        Balanced factors. A component with a factor of zeros is returned unchanged.
    """
    # b_i a_i = (t b_i) (a_i / t) for any t > 0. The norms are equal at t = sqrt(|a_i| / |b_i|): both become
    # sqrt(|a_i| |b_i|), which also minimizes |t b_i|**2 + |a_i / t|**2.
    xp = namespace(left, right)
    norms = xp.sqrt(xp.sum(left * left, axis=0)), xp.sqrt(xp.sum(right * right, axis=1))
    positive = (norms[0] > 0) & (norms[1] > 0)
    ones = xp.ones_like(norms[0])
    ratio = xp.sqrt(xp.where(positive, norms[1], ones) / xp.where(positive, norms[0], ones))
    return left * ratio[None, :], right / ratio[:, None]
