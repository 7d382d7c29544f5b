r"""Weightings: what an entry of the residual counts.

A weighting gives three things to the solver, :func:`lqlora.decompose`: its squared norm, the scaling under which the
best low-rank approximation in (a surrogate of) that norm is a plain truncated SVD, and the way back from there.
"""

from __future__ import annotations

import abc
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import namespace
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["AbstractWeighting", "Elementwise", "RowColumn", "Uniform"]

#: Row and column weights below this fraction of the largest are raised to it. A weight of zero says that a row may
#: be anything; without a floor the low-rank factor of that row would be a division by zero.
FLOOR = 1e-6


class AbstractWeighting(abc.ABC):
    """What every weighting provides. Implementations are final: compose them, do not derive from them."""

    #: True if all weights were zero: entries then count the same, but their errors cost an allocation nothing.
    all_zero: bool = False

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
    def scale(self, residual: Array) -> Array:
        """Scale a residual so that its plain SVD is the weighted one.

        Parameters
        ----------
        residual : array of float32 or float64, shape (m, n)
            Matrix minus its quantized part.

        Returns
        -------
        array of the same shape and dtype
            The scaled residual.
        """

    @abc.abstractmethod
    def unscale(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Map factors of a scaled residual to factors of the residual itself.

        Parameters
        ----------
        left, right : array, shape (m, r) and (r, n)
            Factors of an approximation of what :meth:`scale` returned.

        Returns
        -------
        left, right : array
            Of the same shapes.
        """


@dataclass(frozen=True)
class Uniform(AbstractWeighting):
    """Every entry counts the same: the squared norm is Frobenius'.

    Examples
    --------
    >>> import numpy as np
    >>> Uniform().squared_norm(np.array([[3.0, 4.0]]))
    25.0
    """

    def check(self, shape: tuple[int, ...]) -> None:
        """Accept any matrix."""

    def squared_norm(self, residual: Array) -> float:
        """Return the squared Frobenius norm."""
        return ops.sum_of_squares(residual)

    def scale(self, residual: Array) -> Array:
        """Return the residual itself."""
        return residual

    def unscale(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Return the factors themselves."""
        return left, right


@dataclass(frozen=True, eq=False)
class RowColumn(AbstractWeighting):
    r"""Rank-one weights: the squared norm is :math:`\sum_{ij} r_i c_j E_{ij}^2`.

    Parameters
    ----------
    row : array of float32 or float64, shape (m,)
        Row weights, finite and not negative.
    col : array of the same kind, shape (n,)
        Column weights.

    Raises
    ------
    InvalidArgumentError
        If a weight is negative, or an array is not one-dimensional.
    NonFiniteError
        If a weight is NaN or infinite.

    Warns
    -----
    UserWarning
        If all rows or all columns weigh zero; they then count the same.

    Notes
    -----
    Weights below ``1e-6`` of the largest are raised to that: a row of zero Fisher information may be anything, and the
    factors of such a row would not be finite otherwise. LQ-LoRA (arXiv 2311.12023, section 3.2) approximates the Fisher
    information by such weights and solves with ``SVD(sqrt(r) E sqrt(c))``, which is exact for them.

    Examples
    --------
    >>> import numpy as np
    >>> RowColumn(np.array([1.0, 2.0]), np.array([1.0, 3.0])).squared_norm(np.ones((2, 2)))
    12.0
    """

    row: Array
    col: Array
    _roots: tuple[Array, Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        namespace(self.row, self.col)
        row, col = _checked(self.row, "row weights"), _checked(self.col, "column weights")
        xp = namespace(row)
        object.__setattr__(self, "all_zero", _is_zero(self.row) or _is_zero(self.col))
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "col", col)
        object.__setattr__(self, "_roots", (xp.sqrt(row), xp.sqrt(col)))

    @classmethod
    def from_fisher(cls, fisher: Array) -> RowColumn:
        """Approximate an elementwise Fisher information by its row and column means.

        Parameters
        ----------
        fisher : array, shape (m, n)
            Diagonal Fisher information, finite and not negative.

        Returns
        -------
        RowColumn
            Row means times column means, divided by the overall mean: exact where the Fisher information has rank one.

        Raises
        ------
        InvalidArgumentError
            If an entry is negative or the array is no matrix.
        NonFiniteError
            If an entry is NaN or infinite.

        References
        ----------
        LQ-LoRA, arXiv 2311.12023, section 3.2.

        Examples
        --------
        >>> import numpy as np
        >>> w = RowColumn.from_fisher(np.outer([1.0, 2.0], [1.0, 3.0]))
        >>> w.row.tolist(), w.col.tolist()
        ([2.0, 4.0], [0.5, 1.5])
        """
        if len(fisher.shape) != 2:
            raise InvalidArgumentError(f"Fisher information of a matrix has two dimensions, not {len(fisher.shape)}.")
        fisher = ops.widen(fisher, "Fisher information")
        _require_weights(fisher, "Fisher information")
        xp = namespace(fisher)
        row, col = xp.mean(fisher, axis=1), xp.mean(fisher, axis=0)
        total = xp.mean(row)
        return cls(row, col / xp.where(total > 0, total, xp.ones_like(total)))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is a weight for every row and every column."""
        if (self.row.shape[0], self.col.shape[0]) != tuple(shape):
            found = (self.row.shape[0], self.col.shape[0])
            raise InvalidArgumentError(f"Weights of {found[0]} rows and {found[1]} columns do not fit {tuple(shape)}.")

    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares."""
        return ops.sum_of_squares(self.scale(residual))

    def scale(self, residual: Array) -> Array:
        """Multiply rows and columns by the roots of their weights."""
        namespace(residual, *self._roots)
        return residual * self._roots[0][:, None] * self._roots[1][None, :]

    def unscale(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Divide by the roots of the weights."""
        return left / self._roots[0][:, None], right / self._roots[1][None, :]


@dataclass(frozen=True, eq=False)
class Elementwise(AbstractWeighting):
    r"""A weight for every entry: the squared norm is :math:`\sum_{ij} F_{ij} E_{ij}^2`.

    Parameters
    ----------
    weights : array of float32 or float64, shape (m, n)
        Weights, such as the diagonal Fisher information; finite and not negative.

    Raises
    ------
    InvalidArgumentError
        If a weight is negative or the array is no matrix.
    NonFiniteError
        If a weight is NaN or infinite.

    Warns
    -----
    UserWarning
        If all weights are zero; they then count the same.

    Notes
    -----
    The best low-rank approximation in this norm has no closed form (the problem is NP-hard). As in LQ-LoRA (arXiv
    2311.12023, section 3.2) the low-rank step uses the rank-one surrogate :meth:`RowColumn.from_fisher`, while errors,
    the choice of the best iterate and the costs of allocation use all the weights.

    Examples
    --------
    >>> import numpy as np
    >>> Elementwise(np.array([[1.0, 0.0]])).squared_norm(np.array([[2.0, 5.0]]))
    4.0
    """

    weights: Array
    surrogate: RowColumn = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = ops.widen(self.weights, "weights")
        xp = namespace(weights)
        _require_weights(weights, "weights")
        if not bool(xp.any(weights > 0)):
            warnings.warn("All weights are zero: all count the same.", UserWarning, stacklevel=3)
            weights = xp.ones_like(weights)
            object.__setattr__(self, "all_zero", True)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "surrogate", RowColumn.from_fisher(weights))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is a weight for every entry."""
        if tuple(self.weights.shape) != tuple(shape):
            raise InvalidArgumentError(f"Weights of shape {tuple(self.weights.shape)} do not fit {tuple(shape)}.")

    def squared_norm(self, residual: Array) -> float:
        """Return the weighted sum of squares."""
        return ops.sum_of_squares(residual, self.weights)

    def scale(self, residual: Array) -> Array:
        """Scale by the surrogate."""
        return self.surrogate.scale(residual)

    def unscale(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Undo the scaling by the surrogate."""
        return self.surrogate.unscale(left, right)


def _is_zero(weights: Array) -> bool:
    return weights.shape[0] > 0 and not bool(namespace(weights).any(weights > 0))


def _require_weights(weights: Array, what: str) -> None:
    ops.require_finite(weights, what)
    if bool(namespace(weights).any(weights < 0)):
        raise InvalidArgumentError(f"{what[0].upper()}{what[1:]} must not be negative.")


def _checked(weights: Array, what: str) -> Array:
    xp = namespace(weights)
    weights = ops.widen(weights, what)
    if len(weights.shape) != 1:
        raise InvalidArgumentError(f"{what[0].upper()}{what[1:]} have one dimension, not {len(weights.shape)}.")
    _require_weights(weights, what)
    largest = float(xp.max(weights)) if weights.shape[0] else 1.0
    if largest == 0.0:
        warnings.warn(f"All {what} are zero: all count the same.", UserWarning, stacklevel=4)
        return xp.ones_like(weights)
    return xp.where(weights > FLOOR * largest, weights, xp.full_like(weights, FLOOR * largest))
