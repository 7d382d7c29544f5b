"""Weightings by Gram matrices: second moments of the inputs (InputGram), and of gradients too (Kronecker)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import FLOATS, device_of, namespace, plain_array
from lqlora._options import require_number
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import is_zero, warn_of_zeros
from lqlora.weighting.base import ScaledWeighting, exponent_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora._typing import Array

__all__ = ["InputGram", "Kronecker"]

#: Directions without inputs have the importance of the damping alone. Its root, in float32, times a residual must not
#: underflow: an error in such a direction would count as none.
_LEAST_DAMPING = 1e-30


def _rotated_diagonal(root: _Root, seeds: Mapping[int, int], axis: int) -> Array:
    """Return the diagonal of a rotated Gram matrix, damped and divided by its unit."""
    if axis not in seeds:
        return root.diagonal
    # The matrix is C C^T, and a rotation makes R C (R C)^T of it, whose diagonal are the squared norms of the rows of R C.
    turned = ops.rotate(root.lower, seeds[axis], axis=-2)
    return namespace(turned).sum(turned * turned, axis=1)


class _Root(NamedTuple):
    """Cholesky factor and diagonal of a damped Gram matrix divided by ``2**exponent``, so that both are about one."""

    lower: Array
    diagonal: Array
    exponent: int


@dataclass(frozen=True, eq=False)
class InputGram(ScaledWeighting):
    r"""Second moment of the inputs: the squared norm is :math:`\operatorname{tr}(E R E^\top)`.

    This is the mean squared error at the outputs of a layer, :math:`\mathbb{E} \lVert E x \rVert^2`, over the inputs
    that ``R`` was collected from. :func:`lqlora.nn.collect_gram` collects it, with forward passes only.

    Parameters
    ----------
    gram : array of float32 or float64, shape (n, n)
        Second moment :math:`R = \mathbb{E}[x x^\top]` of the inputs, or any positive multiple.
    damping : float, default 1e-2
        Fraction of the mean of the diagonal that is added to the diagonal. It gives some importance to directions that
        the calibration inputs do not contain.

    Raises
    ------
    InvalidArgumentError
        If the array is not square, not symmetric or not positive semidefinite, or the damping is below 1e-30 or not finite.
    NonFiniteError
        If an entry is NaN or infinite.

    Warns
    -----
    UserWarning
        If all entries are zero. Equal importance is used instead.

    Notes
    -----
    The low-rank step is exact. With :math:`R = C C^\top`, and :math:`U` the leading left singular vectors of
    :math:`E C`, the best approximation is :math:`U U^\top E`. QERA (arXiv 2410.06040, theorem 1) writes the same
    optimum with the symmetric root of :math:`R` and its inverse, which are not needed. CLoQ (arXiv 2501.18475) and EoRA
    (arXiv 2410.21271) have the same optimum.

    Examples
    --------
    >>> import numpy as np
    >>> round(InputGram(np.diag([1.0, 3.0]), damping=1e-9).squared_norm(np.ones((2, 2))), 6)
    8.0
    """

    gram: Array
    damping: float = 1e-2
    _root: _Root = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = plain_array(self.gram, "gram", FLOATS)
        gram, root = _checked(given, self.damping, "gram")
        object.__setattr__(self, "all_zero", is_zero(given))
        object.__setattr__(self, "gram", gram)
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_exponent", root.exponent)

    @property
    def feedback_gram(self) -> Array | None:
        """Second moment of the inputs, without damping."""
        return self.gram

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless the Gram matrix has a row for every column of the matrix."""
        _check_side(self.gram, shape, 1, "gram")

    def element_weights(self) -> Array | None:
        """Return the mean square of each input, as one row, divided by a unit."""
        return self._root.diagonal[None, :]

    def rotated_element_weights(self, seeds: Mapping[int, int]) -> Array | None:
        """Return the mean square of each rotated input, as one row, divided by a unit."""
        return _rotated_diagonal(self._root, seeds, -1)[None, :]

    # tr(E R E^T) = || E C ||_F**2 with R = C C^T. The best X has X C = U U^T E C, so X = U (U^T E).

    def _map(self, residual: Array) -> Array:
        namespace(residual, self._root.lower)
        return residual @ namespace(residual).astype(self._root.lower, residual.dtype)

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        return svd.left, namespace(residual).matrix_transpose(svd.left) @ residual


@dataclass(frozen=True, eq=False)
class Kronecker(ScaledWeighting):
    r"""Second moments of inputs and of output gradients: the squared norm is :math:`\operatorname{tr}(G E R E^\top)`.

    ``G`` is the second moment of the gradients at the outputs of a layer. The Kronecker product of ``G`` and ``R``
    approximates the whole Fisher information of the weight matrix, not only its diagonal (K-FAC).
    :func:`lqlora.nn.collect_kronecker` collects both. Estimating ``G`` needs many gradients.

    Parameters
    ----------
    output_gram : array of float32 or float64, shape (m, m)
        Second moment :math:`G = \mathbb{E}[g g^\top]` of the gradients at the outputs.
    input_gram : array of the same kind, shape (n, n)
        Second moment :math:`R = \mathbb{E}[x x^\top]` of the inputs.
    damping : float, default 1e-2
        Fraction of the mean of each diagonal that is added to that diagonal.

    Raises
    ------
    InvalidArgumentError
        If an array is not square, not symmetric or not positive semidefinite, or the damping is below 1e-30 or not finite.
    NonFiniteError
        If an entry is NaN or infinite.

    Warns
    -----
    UserWarning
        If all entries of an array are zero. Equal importance of its inputs, or outputs, is used instead.

    References
    ----------
    Martens and Grosse: Optimizing neural networks with Kronecker-factored approximate curvature, arXiv 1503.05671.

    Examples
    --------
    >>> import numpy as np
    >>> round(Kronecker(2 * np.eye(2), np.eye(3), damping=1e-9).squared_norm(np.ones((2, 3))), 6)
    12.0
    """

    output_gram: Array
    input_gram: Array
    damping: float = 1e-2
    _roots: tuple[_Root, _Root] = field(init=False, repr=False)
    _inverse: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = plain_array(self.output_gram, "output_gram", FLOATS), plain_array(self.input_gram, "input_gram", FLOATS)
        xp = namespace(*given)
        outputs, left = _checked(given[0], self.damping, "output_gram")
        inputs, right = _checked(given[1], self.damping, "input_gram")
        object.__setattr__(self, "all_zero", any(map(is_zero, given)))
        object.__setattr__(self, "output_gram", outputs)
        object.__setattr__(self, "input_gram", inputs)
        object.__setattr__(self, "_roots", (left, right))
        # L**-T, once and in float64: the array API has no triangular solve, so that solving in each low-rank step would
        # factor L again.
        inverse = xp.linalg.inv(xp.astype(left.lower, xp.float64))
        object.__setattr__(self, "_inverse", xp.astype(xp.matrix_transpose(inverse), left.lower.dtype))
        object.__setattr__(self, "_exponent", left.exponent + right.exponent)

    @property
    def feedback_gram(self) -> Array | None:
        """Second moment of the inputs, without damping."""
        return self.input_gram

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless the Gram matrices have the sides of the matrix."""
        _check_side(self.output_gram, shape, 0, "output_gram")
        _check_side(self.input_gram, shape, 1, "input_gram")

    def element_weights(self) -> Array | None:
        """Return the products of the two diagonals, each divided by its unit."""
        left, right = (root.diagonal for root in self._roots)
        return left[:, None] * right[None, :]

    def rotated_element_weights(self, seeds: Mapping[int, int]) -> Array | None:
        """Return the products of the diagonals of both rotated second moments, each divided by its unit."""
        left, right = (_rotated_diagonal(root, seeds, axis) for root, axis in zip(self._roots, (-2, -1), strict=True))
        return left[:, None] * right[None, :]

    # With G = L L^T and R = C C^T, tr(G E R E^T) = || L^T E C ||_F**2. With U the leading left singular vectors of
    # L^T E C, the best approximation X has L^T X C = U U^T L^T E C, so X = (L**-T U) (U^T L^T E). C needs no inverse.

    def _map(self, residual: Array) -> Array:
        xp = namespace(residual, self._roots[0].lower)
        left, right = (xp.astype(root.lower, residual.dtype) for root in self._roots)
        return xp.matrix_transpose(left) @ (residual @ right)

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        xp = namespace(residual)
        upper = xp.matrix_transpose(xp.astype(self._roots[0].lower, residual.dtype))
        left = xp.astype(self._inverse, residual.dtype) @ svd.left
        return left, (xp.matrix_transpose(svd.left) @ upper) @ residual


def _check_side(gram: Array, shape: tuple[int, ...], side: int, name: str) -> None:
    """Raise unless a Gram matrix has as many rows as the matrix has rows (side 0) or columns (side 1)."""
    if len(shape) != 2 or gram.shape[0] != shape[side]:
        raise InvalidArgumentError(
            f"{name} must have one row and column for each {('row', 'column')[side]} of the matrix of shape "
            f"{tuple(shape)}, got shape {tuple(gram.shape)}."
        )


def _checked(gram: Array, damping: float, name: str) -> tuple[Array, _Root]:
    """Return a Gram matrix, symmetric to the last bit, and the Cholesky factor of the damped matrix."""
    require_number(
        damping, "damping", f"at least {_LEAST_DAMPING} and finite", lambda own: _LEAST_DAMPING <= own < math.inf
    )
    wide, dtype = ops.symmetric_moment(gram, name), ops.widen(gram, name).dtype
    xp = namespace(wide)
    if is_zero(wide):
        warn_of_zeros(name)
        wide = xp.eye(wide.shape[0], dtype=xp.float64, device=device_of(wide))
    if not wide.shape[0]:
        empty = xp.astype(wide, dtype)
        return empty, _Root(empty, xp.sum(empty, axis=0), 0)
    return xp.astype(wide, dtype), _root_of(wide, damping, name, dtype)


def _root_of(gram: Array, damping: float, name: str, dtype: object) -> _Root:
    """Return the Cholesky factor of a damped Gram matrix in float64, divided by a unit so that entries are near one."""
    # R + damping * mean(diag R) * I = unit * C C^T, with a power of four as unit: its root is exact, and C keeps
    # entries of about one in float32 however large the inputs or the damping were. A semidefinite R becomes definite by
    # the damping; an eigenvalue below -damping * mean(diag R) makes the factorization fail.
    xp = namespace(gram)
    # A first unit, one for ordinary sizes, keeps the sum of the diagonal in float64.
    first = ops.power_of_four(float(xp.max(xp.abs(xp.linalg.diagonal(gram)))), 2.0**40, "float64")
    gram = gram / first
    diagonal = xp.linalg.diagonal(gram)
    mean = float(xp.mean(diagonal))
    unit = ops.power_of_four(mean * min(max(damping, 1.0), 1e300), 2.0, "float64") if mean > 0 else 1.0
    added = damping / unit * mean
    try:
        lower = xp.linalg.cholesky(
            gram / unit + xp.eye(gram.shape[0], dtype=gram.dtype, device=device_of(gram)) * added
        )
    except (ValueError, RuntimeError):  # LinAlgError of NumPy, of torch; other libraries return NaN or infinity
        lower = xp.full_like(gram, float("nan"))
    if mean <= 0 or not bool(xp.all(xp.isfinite(lower))):
        raise InvalidArgumentError(
            f"{name} must be positive semidefinite; with damping={damping!r} it has no Cholesky factor. Pass a mean of "
            "x @ x.T over real inputs, or more damping."
        )
    exponent = exponent_of(first) + exponent_of(unit)
    return _Root(xp.astype(lower, dtype), xp.astype(diagonal / unit + added, dtype), exponent)
