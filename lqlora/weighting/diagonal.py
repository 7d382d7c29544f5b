"""Weights by row and by column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import capitalized, is_zero, require_weights, warn_of_zeros
from lqlora.weighting.base import ScaledWeighting, power_of_four

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["RowColumn", "Uniform"]

#: Row and column weights below this fraction of the largest are raised to it. A weight of zero says that a row may
#: be anything; without a floor the low-rank factor of that row would be a division by zero.
FLOOR = 1e-6


@dataclass(frozen=True)
class Uniform(ScaledWeighting):
    """Every entry counts the same: the squared norm is Frobenius'.

    Examples
    --------
    >>> import numpy as np
    >>> Uniform().squared_norm(np.array([[3.0, 4.0]]))
    25.0
    """

    def check(self, shape: tuple[int, ...]) -> None:
        """Accept any matrix."""

    def element_weights(self) -> Array | None:
        """Return None: all entries count the same."""
        return None

    def _map(self, residual: Array) -> Array:
        return residual

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:  # noqa: ARG002
        return svd.left, svd.right


@dataclass(frozen=True, eq=False)
class RowColumn(ScaledWeighting):
    r"""Rank-one weights: the squared norm is :math:`\sum_{ij} r_i c_j E_{ij}^2`.

    Parameters
    ----------
    row : array of float32 or float64, shape (m,), optional
        Row weights, finite and not negative; None if all rows count the same.
    col : array of the same kind, shape (n,), optional
        Column weights, such as the mean square of each input.

    Raises
    ------
    InvalidArgumentError
        If a weight is negative, an array is not one-dimensional, or both are None.
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
    information by such weights and solves with ``SVD(sqrt(r) E sqrt(c))``, which is exact for them. Column weights alone
    are the diagonal case of QERA (arXiv 2410.06040, theorem 2).

    Examples
    --------
    >>> import numpy as np
    >>> RowColumn(np.array([1.0, 2.0]), np.array([1.0, 3.0])).squared_norm(np.ones((2, 2)))
    12.0
    """

    row: Array | None
    col: Array | None
    _roots: tuple[Array | None, Array | None] = field(init=False, repr=False)
    _units: tuple[float, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.row is None and self.col is None:
            raise InvalidArgumentError("Give row weights, column weights or both; without any, use Uniform().")
        namespace(*(weights for weights in (self.row, self.col) if weights is not None))
        row, col = _checked(self.row, "row weights"), _checked(self.col, "column weights")
        zero = [weights is not None and is_zero(weights) for weights in (self.row, self.col)]
        (left, left_unit), (right, right_unit) = _normalized_root(row), _normalized_root(col)
        object.__setattr__(self, "all_zero", any(zero))
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "col", col)
        object.__setattr__(self, "_roots", (left, right))
        object.__setattr__(self, "_units", (left_unit, right_unit))
        object.__setattr__(self, "_factor", left_unit * right_unit)

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
        fisher = ops.widen(fisher, "Fisher information")
        if len(fisher.shape) != 2:
            raise InvalidArgumentError(f"Fisher information of a matrix has two dimensions, not {len(fisher.shape)}.")
        require_weights(fisher, "Fisher information")
        xp = namespace(fisher)
        if 0 in fisher.shape:
            device = device_of(fisher)
            return cls(*(xp.ones((size,), dtype=fisher.dtype, device=device) for size in fisher.shape))
        row, col = (xp.sum(fisher, axis=axis, dtype=xp.float64) / fisher.shape[axis] for axis in (1, 0))
        total = xp.mean(row)
        col = col / xp.where(total > 0, total, xp.ones_like(total))
        return cls(xp.astype(row, fisher.dtype), xp.astype(col, fisher.dtype))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is a weight for every row and every column."""
        found = tuple(None if weights is None else weights.shape[0] for weights in (self.row, self.col))
        if len(shape) != 2 or any(own not in (None, size) for own, size in zip(found, shape, strict=True)):
            raise InvalidArgumentError(f"Weights of {found[0]} rows and {found[1]} columns do not fit {tuple(shape)}.")

    def element_weights(self) -> Array | None:
        """Return the products of row and column weights, each near one."""
        row = None if self.row is None else self.row[:, None] / self._units[0]
        col = None if self.col is None else self.col[None, :] / self._units[1]
        if row is None or col is None:
            return col if row is None else row
        return row * col

    def _map(self, residual: Array) -> Array:
        row, col = self._roots_like(residual)
        if row is not None:
            residual = residual * row
        return residual if col is None else residual * col

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        row, col = self._roots_like(residual)
        return svd.left if row is None else svd.left / row, svd.right if col is None else svd.right / col

    def _roots_like(self, residual: Array) -> tuple[Array | None, Array | None]:
        """Return the roots of the weights in the dtype of a residual, as a column and as a row."""
        row, col = self._roots
        xp = namespace(residual, row, col)
        return (
            None if row is None else xp.astype(row, residual.dtype)[:, None],
            None if col is None else xp.astype(col, residual.dtype)[None, :],
        )


def _checked(weights: Array | None, what: str) -> Array | None:
    if weights is None:
        return None
    xp = namespace(weights)
    weights = ops.widen(weights, what)
    if len(weights.shape) != 1:
        raise InvalidArgumentError(f"{capitalized(what)} have one dimension, not {len(weights.shape)}.")
    require_weights(weights, what)
    largest = float(xp.max(weights)) if weights.shape[0] else 1.0
    if largest == 0.0:
        warn_of_zeros(what, stacklevel=4)
        return xp.ones_like(weights)
    return xp.where(weights > FLOOR * largest, weights, xp.full_like(weights, FLOOR * largest))


def _normalized_root(weights: Array | None) -> tuple[Array | None, float]:
    """Return the roots of weights divided by a power of four near the largest, and that power."""
    if weights is None or not weights.shape[0]:
        return weights, 1.0
    xp = namespace(weights)
    unit = power_of_four(float(xp.max(weights)), 2.0)
    return xp.sqrt(weights / unit), unit
