"""Low-rank approximation: the truncated SVD, and randomized subspace iteration in a few passes over the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lqlora._dispatch import FLOATS, device_of, fitting, namespace
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["LowRank", "exact_svd", "low_rank_product", "subspace_svd"]

#: Columns of the sketch beyond the rank (Halko, Martinsson and Tropp 2011, section 4.2, advise 5 to 10).
OVERSAMPLING = 10


class LowRank(NamedTuple):
    """A truncated singular value decomposition ``left @ right``.

    Parameters
    ----------
    left : array, shape (m, rank)
        Orthonormal columns.
    right : array, shape (rank, n)
        ``left.T @ matrix``: orthogonal rows whose norms are the singular values.
    values : array, shape (rank,)
        Singular values, largest first, not negative.
    basis : array, shape (n, k)
        Right subspace, oversampling included. The next call on a similar matrix can start from it.
    """

    left: Array
    right: Array
    values: Array
    basis: Array


@fitting
def exact_svd(matrix: Array, rank: int) -> LowRank:
    """Return the truncated singular value decomposition, computed in full.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        Finite values.
    rank : int
        Rank of the approximation, 0 to ``min(m, n)``.

    Returns
    -------
    LowRank
        The best approximation of that rank in every unitarily invariant norm (Eckart and Young 1936).

    Raises
    ------
    InvalidArgumentError
        If the rank is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> exact_svd(np.diag([3.0, 2.0, 1.0]), 2).values.tolist()
    [3.0, 2.0]
    """
    _check_rank(matrix, rank)
    xp = namespace(matrix, dtypes=FLOATS)
    left, values, right = xp.linalg.svd(matrix, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank, :]
    return LowRank(left, values[:, None] * right, values, xp.matrix_transpose(right))


@fitting
def subspace_svd(
    matrix: Array, rank: int, *, seed: int = 0, start: Array | None = None, power_iterations: int | None = None
) -> LowRank:
    """Return an approximate truncated singular value decomposition, by randomized subspace iteration.

    Parameters
    ----------
    matrix : array of float32 or float64, shape (m, n)
        Finite values.
    rank : int
        Rank of the approximation, 0 to ``min(m, n)``.
    seed : int, default 0
        Seed of the Gaussian sketch. NumPy draws it on the host, so that every library gets the same one.
    start : array, shape (n, k), optional
        Basis to start from instead of the sketch, such as ``basis`` of an earlier result.
    power_iterations : int, optional
        Additional pairs of passes over the matrix, which help where singular values decay slowly. 2 by default, and 0
        with a start: if the matrix has changed little, two passes are as good as six passes from scratch.

    Returns
    -------
    LowRank
        Close to the result of :func:`exact_svd`, and equal to it if the sketch would span the smaller side.

    Raises
    ------
    InvalidArgumentError
        If the rank is out of range.

    Notes
    -----
    The last step factors a Gram matrix in float64, as wide as the rank. Its eigenvalues are exact to 1e-16 of the largest,
    so the singular values are exact to 1e-8 of the largest.

    References
    ----------
    Halko, Martinsson, Tropp: Finding structure with randomness, SIAM Review 53 (2011), algorithms 4.4 and 5.1.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = np.outer(np.arange(1.0, 40.0), np.ones(30))
    >>> round(float(subspace_svd(matrix, 1).values[0] / np.linalg.norm(matrix)), 6)
    1.0
    """
    _check_rank(matrix, rank)
    xp = namespace(matrix, start, dtypes=FLOATS)
    rows, columns = matrix.shape
    width = rank + OVERSAMPLING
    # A sketch as wide as the smaller side saves no work over the full decomposition, which is exact.
    if rank == 0 or width >= min(rows, columns):
        return exact_svd(matrix, rank)
    # A basis from an earlier call already spans nearly the leading right subspace, if the matrix has changed little
    # since. One product and the projection then suffice.
    if power_iterations is None:
        power_iterations = 2 if start is None else 0
    if start is None:
        # A Gaussian sketch has a component along every right singular vector with probability one, so no leading
        # direction is missed. The oversampling makes small components unlikely.
        sketch = np.random.default_rng(seed).standard_normal((columns, width))
        start = xp.asarray(sketch, dtype=matrix.dtype, device=device_of(matrix))
    left, _ = xp.linalg.qr(matrix @ start)
    # With q pairs of passes the columns span (A A^T)**q A S, in which singular direction i counts by s_i**(2 q + 1). In
    # corollary 10.10 of the reference the expected error is at most the (2 q + 1)-th root of a bound on the error for
    # the singular values s_i**(2 q + 1): factors above the optimal s_(rank + 1) shrink toward 1. The columns are
    # orthogonalized after every product (algorithm 4.4). Else all would turn toward the first singular vector, and
    # directions with s_i < s_1 * eps**(1 / (2 q + 1)) would drown in rounding errors.
    for _ in range(power_iterations):
        start, _ = xp.linalg.qr(xp.matrix_transpose(matrix) @ left)
        left, _ = xp.linalg.qr(matrix @ start)
    return _within(matrix, left, rank, start)


def _within(matrix: Array, left: Array, rank: int, start: Array) -> LowRank:
    """Return the best approximation whose columns are in a subspace: the method of Rayleigh and Ritz.

    With an orthonormal ``left``, the nearest matrix with columns in its span is ``left @ small``, ``small = left.T @ matrix``.
    If ``small @ small.T = R @ diag(squares) @ R.T``, then ``small = R @ (R.T @ small)``, and the rows of ``R.T @ small``
    are orthogonal with norms ``sqrt(squares)``. So ``(left @ R) @ (R.T @ small)`` is a singular value decomposition.
    """
    xp = namespace(matrix, dtypes=FLOATS)
    small = xp.matrix_transpose(left) @ matrix
    wide = xp.astype(small, xp.float64)
    # eigh sorts upwards, hence the flips, and rounding may give eigenvalues slightly below zero, hence the clip.
    # Squaring halves the digits that small singular values have: 1e-8 of the largest remains, which float32 would not
    # resolve either.
    squares, rotation = xp.linalg.eigh(wide @ xp.matrix_transpose(wide))
    values = xp.astype(xp.sqrt(xp.clip(xp.flip(squares), 0.0)), matrix.dtype)
    rotation = xp.astype(xp.flip(rotation, axis=1), matrix.dtype)
    right = xp.matrix_transpose(rotation) @ small
    # Directions that the matrix maps to zero keep their old basis vector, so that a later matrix can find them again.
    lost = (values == 0)[:, None]
    basis = xp.where(lost, xp.matrix_transpose(start), right / xp.where(lost, xp.ones_like(right), values[:, None]))
    return LowRank(left @ rotation[:, :rank], right[:rank, :], values[:rank], xp.matrix_transpose(basis))


@fitting
def low_rank_product(lora_B: Array, lora_A: Array, scaling: float = 1.0) -> Array:
    """Return the product of two low-rank factors.

    Parameters
    ----------
    lora_B : array, shape (m, rank)
        Left factor.
    lora_A : array, shape (rank, n)
        Right factor.
    scaling : float, default 1.0
        Factor of the product, ``lora_alpha / rank`` in PEFT.

    Returns
    -------
    array, shape (m, n)
        ``scaling * lora_B @ lora_A``; zeros if the rank is 0.

    Examples
    --------
    >>> import numpy as np
    >>> low_rank_product(np.ones((2, 1)), np.ones((1, 2)), 3.0).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    namespace(lora_B, lora_A, dtypes=FLOATS)
    product = lora_B @ lora_A
    return product if scaling == 1.0 else product * scaling


def _check_rank(matrix: Array, rank: int) -> None:
    namespace(matrix, dtypes=FLOATS)
    if not 0 <= rank <= min(matrix.shape):
        raise InvalidArgumentError(
            f"rank must be between 0 and {min(matrix.shape)}, the smaller side of the matrix, got {rank}."
        )
