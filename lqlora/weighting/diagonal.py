"""Diagonal weightings: uniform, and importance by row and by column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import is_zero, require_importance, require_matrix, warn_of_zeros
from lqlora.weighting.base import ScaledWeighting, power_of_four

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["RowColumn", "Uniform"]

#: Importance of rows and columns below this fraction of the largest is raised to it. The low-rank step divides by its
#: root: without a floor, the factors of a row of zero importance would not be finite.
FLOOR = 1e-6


@dataclass(frozen=True)
class Uniform(ScaledWeighting):
    """Equal importance of all entries: the Frobenius norm.

    It is the default of :func:`lqlora.decompose` and needs no statistics.

    Examples
    --------
    >>> import numpy as np
    >>> Uniform().squared_norm(np.array([[3.0, 4.0]]))
    25.0
    """

    def check(self, shape: tuple[int, ...]) -> None:
        """Accept any matrix."""

    def element_weights(self) -> Array | None:
        """Return None: all entries have the same importance."""
        return None

    def _map(self, residual: Array) -> Array:
        return residual

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:  # noqa: ARG002
        return svd.left, svd.right


@dataclass(frozen=True, eq=False)
class RowColumn(ScaledWeighting):
    r"""Importance of rows and of columns: the squared norm is :math:`\sum_{ij} r_i c_j E_{ij}^2`.

    Use it with the mean squares of the inputs as ``col``, or with Fisher information through :meth:`from_fisher`. The
    low-rank step is exact.

    Parameters
    ----------
    row : array of float32 or float64, shape (m,), optional
        Importance of each row, finite and not negative. None gives all rows the same importance.
    col : array of the same kind, shape (n,), optional
        Importance of each column, such as the mean square of each input.

    Raises
    ------
    InvalidArgumentError
        If a value is negative, an array is not one-dimensional, or both are None.
    NonFiniteError
        If a value is NaN or infinite.

    Warns
    -----
    UserWarning
        If the values of all rows, or of all columns, are zero. Equal importance is used instead.

    Notes
    -----
    Values below ``1e-6`` of the largest are raised to that, since the factors of a row of zero importance would not be
    finite. LQ-LoRA (arXiv 2311.12023, section 3.2) approximates the Fisher information by importance of this form. Its
    solution, the truncated SVD of ``sqrt(r) E sqrt(c)``, is exact for this norm. Importance of columns alone is the
    diagonal case of QERA (arXiv 2410.06040, theorem 2).

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
            raise InvalidArgumentError(
                "row or col must be given, got None for both. Use Uniform() for equal importance."
            )
        given = [importance for importance in (self.row, self.col) if importance is not None]
        namespace(*given)
        row, col = _checked(self.row, "row"), _checked(self.col, "col")
        zero = [is_zero(importance) for importance in given]
        (left, left_unit), (right, right_unit) = _normalized_root(row), _normalized_root(col)
        object.__setattr__(self, "all_zero", any(zero))
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "col", col)
        object.__setattr__(self, "_roots", (left, right))
        object.__setattr__(self, "_units", (left_unit, right_unit))
        object.__setattr__(self, "_factor", left_unit * right_unit)

    @classmethod
    def from_fisher(cls, fisher: Array) -> RowColumn:
        """Return the weighting of the row and column means of an elementwise Fisher information.

        Parameters
        ----------
        fisher : array, shape (m, n)
            Diagonal Fisher information, finite and not negative; see :func:`lqlora.nn.collect_fisher`.

        Returns
        -------
        RowColumn
            Importance ``row mean * column mean / overall mean``. It is exact if the Fisher information has rank one.

        Raises
        ------
        InvalidArgumentError
            If an entry is negative or the array is not two-dimensional.
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
        fisher = ops.widen(fisher, "fisher")
        require_matrix(fisher, "fisher")
        require_importance(fisher, "fisher")
        xp = namespace(fisher)
        if 0 in fisher.shape:
            device = device_of(fisher)
            return cls(*(xp.ones((size,), dtype=fisher.dtype, device=device) for size in fisher.shape))
        # Of all rank-one matrices r c^T this one has the same row sums and column sums as the Fisher information.
        row, col = (xp.sum(fisher, axis=axis, dtype=xp.float64) / fisher.shape[axis] for axis in (1, 0))
        total = xp.mean(row)
        col = col / xp.where(total > 0, total, xp.ones_like(total))
        return cls(xp.astype(row, fisher.dtype), xp.astype(col, fisher.dtype))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is a value for every row and every column."""
        for side, (name, own) in enumerate((("row", self.row), ("col", self.col))):
            if own is not None and (len(shape) != 2 or own.shape[0] != shape[side]):
                raise InvalidArgumentError(
                    f"{name} must hold one value for each {('row', 'column')[side]} of the matrix of shape "
                    f"{tuple(shape)}, got {own.shape[0]}."
                )

    def element_weights(self) -> Array | None:
        """Return the products of the importance of rows and columns, each divided by its unit."""
        row = None if self.row is None else self.row[:, None] / self._units[0]
        col = None if self.col is None else self.col[None, :] / self._units[1]
        if row is None or col is None:
            return col if row is None else row
        return row * col

    # A = diag(sqrt(r)) and C = diag(sqrt(c)) in the notation of ScaledWeighting; both are inverted by a division.

    def _map(self, residual: Array) -> Array:
        row, col = self._roots_like(residual)
        if row is not None:
            residual = residual * row
        return residual if col is None else residual * col

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        row, col = self._roots_like(residual)
        return svd.left if row is None else svd.left / row, svd.right if col is None else svd.right / col

    def _roots_like(self, residual: Array) -> tuple[Array | None, Array | None]:
        """Return the square roots of the importance in the dtype of a residual, as a column and as a row."""
        row, col = self._roots
        xp = namespace(residual, row, col)
        return (
            None if row is None else xp.astype(row, residual.dtype)[:, None],
            None if col is None else xp.astype(col, residual.dtype)[None, :],
        )


def _checked(importance: Array | None, name: str) -> Array | None:
    """Return checked importance in float32 or float64, raised to a floor; ones if all of it is zero."""
    if importance is None:
        return None
    xp = namespace(importance)
    importance = ops.widen(importance, name)
    if len(importance.shape) != 1:
        raise InvalidArgumentError(f"{name} must have one dimension, got shape {tuple(importance.shape)}.")
    require_importance(importance, name)
    largest = float(xp.max(importance)) if importance.shape[0] else 1.0
    if largest == 0.0:
        warn_of_zeros(name, stacklevel=4)
        return xp.ones_like(importance)
    return xp.where(importance > FLOOR * largest, importance, xp.full_like(importance, FLOOR * largest))


def _normalized_root(importance: Array | None) -> tuple[Array | None, float]:
    """Return the square roots of ``importance / unit``, and the unit: a power of four near the largest value."""
    if importance is None or not importance.shape[0]:
        return importance, 1.0
    xp = namespace(importance)
    unit = power_of_four(float(xp.max(importance)), 2.0)
    return xp.sqrt(importance / unit), unit
