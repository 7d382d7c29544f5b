"""Diagonal weightings: uniform, and importance by row and by column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lqlora import ops
from lqlora._dispatch import FLOATS, device_of, dtype_name, namespace, plain_array
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import is_zero, require_importance, require_matrix, warn_of_zeros
from lqlora.weighting.base import ScaledWeighting, exponent_of

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
    _shares: tuple[Array | None, Array | None] = field(init=False, repr=False)
    _roots: tuple[Array | None, Array | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.row is None and self.col is None:
            raise InvalidArgumentError(
                "row or col must be given, got None for both. Use Uniform() for equal importance."
            )
        row, col = (
            None if own is None else plain_array(own, name, FLOATS)
            for name, own in (("row", self.row), ("col", self.col))
        )
        given = [importance for importance in (row, col) if importance is not None]
        namespace(*given)
        (row, row_unit), (col, col_unit) = _checked(row, "row"), _checked(col, "col")
        zero = [is_zero(importance) for importance in given]
        object.__setattr__(self, "all_zero", any(zero))
        object.__setattr__(self, "row", None if row is None else row * row_unit)
        object.__setattr__(self, "col", None if col is None else col * col_unit)
        object.__setattr__(self, "_shares", (row, col))
        object.__setattr__(
            self, "_roots", tuple(None if own is None else namespace(own).sqrt(own) for own in (row, col))
        )
        object.__setattr__(self, "_exponent", exponent_of(row_unit) + exponent_of(col_unit))

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
        fisher = ops.widen(plain_array(fisher, "fisher", FLOATS), "fisher")
        require_matrix(fisher, "fisher")
        require_importance(fisher, "fisher")
        xp = namespace(fisher)
        if 0 in fisher.shape:
            device = device_of(fisher)
            return cls(*(xp.ones((size,), dtype=fisher.dtype, device=device) for size in fisher.shape))
        # Of all rank-one matrices r c^T this one has the same row sums and column sums as the Fisher information. Sums
        # are formed in a unit in which they neither overflow nor underflow.
        unit = ops.power_of_four(float(xp.max(fisher)), 2.0**40, dtype_name(fisher))
        near_one = fisher if unit == 1.0 else fisher / unit
        row, col = (xp.sum(near_one, axis=axis, dtype=xp.float64) / fisher.shape[axis] for axis in (1, 0))
        total = xp.mean(row)
        col = col / xp.where(total > 0, total, xp.ones_like(total))
        own = cls(xp.astype(row, fisher.dtype), xp.astype(col, fisher.dtype))
        if unit != 1.0:
            assert own.row is not None  # given above
            object.__setattr__(own, "row", own.row * unit)
            object.__setattr__(own, "_exponent", own._exponent + exponent_of(unit))
        return own

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
        row, col = self._shares
        row, col = None if row is None else row[:, None], None if col is None else col[None, :]
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


def _checked(importance: Array | None, name: str) -> tuple[Array | None, float]:
    """Return checked importance in float32 or float64 divided by a unit, and the unit: a power of four near the largest.

    The importance is raised to a floor; it is ones if all of it is zero.
    """
    if importance is None:
        return None, 1.0
    xp = namespace(importance)
    importance = ops.widen(importance, name)
    if len(importance.shape) != 1:
        raise InvalidArgumentError(f"{name} must have one dimension, got shape {tuple(importance.shape)}.")
    require_importance(importance, name)
    largest = float(xp.max(importance)) if importance.shape[0] else 1.0
    if largest == 0.0:
        warn_of_zeros(name)
        return xp.ones_like(importance), 1.0
    unit = ops.power_of_four(largest, 2.0, dtype_name(importance))
    # Divided first: the floor of a subnormal importance would be zero.
    importance, floor = importance / unit, FLOOR * (largest / unit)
    return xp.where(importance > floor, importance, xp.full_like(importance, floor)), unit
