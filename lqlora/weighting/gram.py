"""Norms of outputs: weightings by second moments of inputs and of gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lqlora import ops
from lqlora._dispatch import device_of, namespace
from lqlora.errors import InvalidArgumentError
from lqlora.weighting._checks import is_zero, warn_of_zeros
from lqlora.weighting.base import ScaledWeighting, power_of_four

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["InputGram", "Kronecker"]


class _Root(NamedTuple):
    """A damped Gram matrix ``unit * lower @ lower.T`` and its diagonal."""

    lower: Array
    diagonal: Array
    unit: float


@dataclass(frozen=True, eq=False)
class InputGram(ScaledWeighting):
    r"""Second moments of the inputs: the squared norm is :math:`\operatorname{tr}(E R E^\top)`.

    That is the mean square of the error at the output of a layer, over the inputs that ``R`` was collected from.

    Parameters
    ----------
    gram : array of float32 or float64, shape (n, n)
        Second moment :math:`R = \mathbb{E}[x x^\top]` of the inputs, or any positive multiple.
    damping : float, default 1e-2
        Added to the diagonal, as a fraction of its mean. Inputs that were never seen may come.

    Raises
    ------
    InvalidArgumentError
        If the array is not square, not symmetric or not positive semidefinite, or the damping is not positive.
    NonFiniteError
        If an entry is NaN or infinite.

    Warns
    -----
    UserWarning
        If the array is zero; all inputs then count the same.

    Notes
    -----
    The best low-rank approximation is exact: with :math:`R = C C^\top`, and :math:`U` the leading left singular vectors
    of :math:`E C`, it is :math:`U U^\top E`. This is what QERA (arXiv 2410.06040, theorem 1) writes with the symmetric
    root and its inverse; neither is needed. CLoQ (arXiv 2501.18475) and EoRA (arXiv 2410.21271) have the same optimum.

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
        gram, root = _checked(self.gram, self.damping, "input Gram matrix")
        object.__setattr__(self, "all_zero", is_zero(self.gram))
        object.__setattr__(self, "gram", gram)
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_factor", root.unit)

    @property
    def feedback_gram(self) -> Array | None:
        """The second moment, not damped."""
        return self.gram

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is an input for every column."""
        _check_side(self.gram, shape, 1, "input Gram matrix", "columns")

    def element_weights(self) -> Array | None:
        """Return the mean square of each input, as one row."""
        return self._root.diagonal[None, :]

    def _map(self, residual: Array) -> Array:
        namespace(residual, self._root.lower)
        return residual @ namespace(residual).astype(self._root.lower, residual.dtype)

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        return svd.left, namespace(residual).matrix_transpose(svd.left) @ residual


@dataclass(frozen=True, eq=False)
class Kronecker(ScaledWeighting):
    r"""Second moments of inputs and of output gradients: :math:`\operatorname{tr}(G E R E^\top)`.

    With ``G`` the second moment of the gradients at the output of a layer, the Kronecker product of the two
    approximates the Fisher information of its weight matrix, entries off the diagonal included (K-FAC).

    Parameters
    ----------
    output_gram : array of float32 or float64, shape (m, m)
        Second moment :math:`G = \mathbb{E}[g g^\top]` of the gradients at the outputs.
    input_gram : array of the same kind, shape (n, n)
        Second moment :math:`R = \mathbb{E}[x x^\top]` of the inputs.
    damping : float, default 1e-2
        Added to both diagonals, as a fraction of their means.

    Raises
    ------
    InvalidArgumentError
        If an array is not square, not symmetric or not positive semidefinite, or the damping is not positive.
    NonFiniteError
        If an entry is NaN or infinite.

    Warns
    -----
    UserWarning
        If an array is zero; all inputs, or outputs, then count the same.

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
        xp = namespace(self.output_gram, self.input_gram)
        outputs, left = _checked(self.output_gram, self.damping, "output Gram matrix")
        inputs, right = _checked(self.input_gram, self.damping, "input Gram matrix")
        object.__setattr__(self, "all_zero", is_zero(self.output_gram) or is_zero(self.input_gram))
        object.__setattr__(self, "output_gram", outputs)
        object.__setattr__(self, "input_gram", inputs)
        object.__setattr__(self, "_roots", (left, right))
        # Once, in float64, where solving in each low-rank step would factor the triangle again.
        inverse = xp.linalg.inv(xp.astype(left.lower, xp.float64))
        object.__setattr__(self, "_inverse", xp.astype(xp.matrix_transpose(inverse), left.lower.dtype))
        object.__setattr__(self, "_factor", left.unit * right.unit)

    @property
    def feedback_gram(self) -> Array | None:
        """The second moment of the inputs, not damped."""
        return self.input_gram

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise unless there is an output for every row and an input for every column."""
        _check_side(self.output_gram, shape, 0, "output Gram matrix", "rows")
        _check_side(self.input_gram, shape, 1, "input Gram matrix", "columns")

    def element_weights(self) -> Array | None:
        """Return the products of the two diagonals, each near one."""
        left, right = (root.diagonal / root.unit for root in self._roots)
        return left[:, None] * right[None, :]

    def _map(self, residual: Array) -> Array:
        xp = namespace(residual, self._roots[0].lower)
        left, right = (xp.astype(root.lower, residual.dtype) for root in self._roots)
        return xp.matrix_transpose(left) @ (residual @ right)

    def _factors(self, svd: ops.LowRank, residual: Array) -> tuple[Array, Array]:
        xp = namespace(residual)
        upper = xp.matrix_transpose(xp.astype(self._roots[0].lower, residual.dtype))
        left = xp.astype(self._inverse, residual.dtype) @ svd.left
        return left, (xp.matrix_transpose(svd.left) @ upper) @ residual


def _check_side(gram: Array, shape: tuple[int, ...], side: int, what: str, of: str) -> None:
    if len(shape) != 2 or gram.shape[0] != shape[side]:
        size = f"{gram.shape[0]}x{gram.shape[0]}"
        raise InvalidArgumentError(f"An {what} of {size} does not fit the {of} of {tuple(shape)}.")


def _checked(gram: Array, damping: float, what: str) -> tuple[Array, _Root]:
    """Return a Gram matrix, symmetric to the last bit, and the root of what it is damped to."""
    if not 0 < damping < float("inf"):
        raise InvalidArgumentError(f"damping is positive and finite, not {damping!r}.")
    wide, dtype = ops.symmetric_moment(gram, f"the {what}"), ops.widen(gram, what).dtype
    xp = namespace(wide)
    if is_zero(wide):
        warn_of_zeros(f"entries of the {what}", stacklevel=4)
        wide = xp.eye(wide.shape[0], dtype=xp.float64, device=device_of(wide))
    if not wide.shape[0]:
        empty = xp.astype(wide, dtype)
        return empty, _Root(empty, xp.sum(empty, axis=0), 1.0)
    return xp.astype(wide, dtype), _root_of(wide, damping, what, dtype)


def _root_of(gram: Array, damping: float, what: str, dtype: object) -> _Root:
    """Return the Cholesky factor of a Gram matrix of float64, whose entries are brought to about one."""
    xp = namespace(gram)
    diagonal = xp.linalg.diagonal(gram)
    mean = float(xp.mean(diagonal))
    unit = power_of_four(mean, 2.0) if mean > 0 else 1.0
    added = xp.eye(gram.shape[0], dtype=gram.dtype, device=device_of(gram)) * (damping * mean / unit)
    try:
        lower = xp.linalg.cholesky(gram / unit + added)
    except (ValueError, RuntimeError):  # NumPy's LinAlgError and torch's; others return what is not finite
        lower = xp.full_like(gram, float("nan"))
    if mean <= 0 or not bool(xp.all(xp.isfinite(lower))):
        raise InvalidArgumentError(f"The {what} is not positive semidefinite.")
    return _Root(xp.astype(lower, dtype), xp.astype(diagonal + damping * mean, dtype), unit)
