r"""Randomized Hadamard rotations of any length: orthogonal matrices that mix all entries, and need no storage.

The rotation of ``n`` entries is :math:`R = H D`. ``D`` is a diagonal of signs, which follow from a seed. ``H`` is the Kronecker
product of one matrix for each prime factor ``p`` of ``n``:

.. math:: H^{(p)}_{jk} = \frac{1}{\sqrt p} \Bigl(\cos \frac{2 \pi j k}{p} + \sin \frac{2 \pi j k}{p}\Bigr) .

For ``p = 2`` this is the matrix of Hadamard, and for every ``p`` that of the discrete Hartley transform. Each is symmetric and
orthogonal, and so is their product. Hence :math:`R^{-1} = D H`. Prime factors above 256 get the unit matrix: parts of a line stay
apart.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._dispatch import FLOATS, array_library, device_of, dtype_name, fitting, is_on_host, namespace
from lqlora._options import require_integer
from lqlora.errors import InvalidArgumentError
from lqlora.ops.casting import widen
from lqlora.ops.tables import table_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from lqlora._typing import Array

__all__ = ["rotate", "rotate_rows", "rotated_importance", "rotated_moment"]

#: Entries that are rotated at a time: few enough for the caches of a host, and on a device enough to keep it busy.
_PIECE, _PIECE_ON_DEVICE = 1 << 16, 1 << 24

#: Larger prime factors of a length are left out: they would take as many operations, and matrices of their square. Lines are then
#: mixed in parts of the product of the other factors.
_LARGEST_PRIME = 256

#: Constants of the generator SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which signs are taken from.
_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@fitting
def rotate(array: Array, seed: int, *, axis: int = -1, inverse: bool = False, out: Array | None = None) -> Array:
    """Rotate the lines of an array along an axis; every library returns the same bytes.

    Parameters
    ----------
    array : array of float16, bfloat16, float32 or float64, one dimension or more
        Values.
    seed : int
        Seed of the signs, from 0 to 2**63 - 1.
    axis : int, default -1
        Axis of the lines.
    inverse : bool, default False
        True undoes the rotation, up to rounding.
    out : array of the dtype and shape of the result, optional
        Array to write to, which may be ``array`` itself.

    Returns
    -------
    array of float32, or of float64 for float64, same shape
        Rotated values.

    Raises
    ------
    InvalidArgumentError
        If the array does not have the axis, the seed is out of its range, or ``out`` has another dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.eye(1, 4, dtype=np.float32)
    >>> np.abs(rotate(x, 0)).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    >>> np.allclose(rotate(rotate(x, 0), 0, inverse=True), x)
    True
    """
    xp = namespace(array, out, dtypes=FLOATS)
    _require_options(array, seed, axis)
    axis, shape = axis % len(array.shape), tuple(array.shape)
    dtype = "float64" if dtype_name(array) == "float64" else "float32"
    if out is None:
        out = xp.empty(shape, dtype=getattr(xp, dtype), device=device_of(array))
    elif tuple(out.shape) != shape or dtype_name(out) != dtype:
        raise InvalidArgumentError(
            f"out must have shape {shape} and dtype {dtype}, got {tuple(out.shape)} and {out.dtype}."
        )
    signs = table_beside(_signs(shape[axis], int(seed), dtype), array)[:, None]
    # The order of the roundings is the same everywhere: signs, one factor after another, and one product with the scale of
    # all factors of two. Sums and products are separate operations, so that nothing is fused.
    with np.errstate(over="ignore", invalid="ignore"):  # sums of numbers near the end of the range: callers check
        for index in _pieces(shape, axis, _PIECE if is_on_host(array) else _PIECE_ON_DEVICE):
            piece = array[index]
            lines = _lines_first(widen(piece, "array"), axis)
            lines = _mixed(lines if inverse else lines * signs, dtype, _hartley)
            out[index] = _lines_back(lines * signs if inverse else lines, tuple(piece.shape), axis)
    return out


def _pieces(shape: tuple[int, ...], axis: int, size: int) -> Iterator[tuple[slice, ...]]:
    """Yield indices of pieces of whole lines, cut along the longest of the other axes."""
    others = [own for own in range(len(shape)) if own != axis]
    if not prod(shape):
        return
    cut = max(others, key=lambda own: shape[own], default=axis)
    step = shape[axis] if cut == axis else max(1, size * shape[cut] // prod(shape))
    for first in range(0, shape[cut], step):
        yield tuple(
            slice(first, min(first + step, shape[cut])) if own == cut else slice(None) for own in range(len(shape))
        )


@fitting
def rotated_importance(importance: Array, *, axis: int = -1) -> Array:
    r"""Return the importance of the entries of rotated lines.

    A sum of weighted squares, :math:`\sum_k w_k e_k^2`, is a quadratic form of the rotated errors. This is its diagonal:
    :math:`\sum_k R_{jk}^2 w_k`, which does not depend on the signs.

    Parameters
    ----------
    importance : array of float16, bfloat16, float32 or float64, one dimension or more
        Importance ``w``, not negative.
    axis : int, default -1
        Axis of the lines.

    Returns
    -------
    array of float32, or of float64 for float64, same shape
        Importance of the rotated entries. A line keeps its sum.

    Raises
    ------
    InvalidArgumentError
        If the array does not have the axis.

    Examples
    --------
    >>> import numpy as np
    >>> rotated_importance(np.array([4.0, 0.0, 0.0, 0.0])).round(6).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    namespace(importance, dtypes=FLOATS)
    _require_options(importance, 0, axis)
    axis = axis % len(importance.shape)
    wide = widen(importance, "importance")
    if not prod(wide.shape):
        return wide
    return _lines_back(_mixed(_lines_first(wide, axis), dtype_name(wide), _squares), tuple(wide.shape), axis)


@fitting
def rotated_moment(gram: Array, seed: int) -> Array:
    """Return the second moment of rotated vectors from that of the vectors.

    Parameters
    ----------
    gram : array of float32 or float64, shape (n, n)
        Symmetric matrix.
    seed : int
        Seed of the signs, from 0 to 2**63 - 1.

    Returns
    -------
    array of the same dtype and shape
        ``R @ gram @ R.T``, symmetric to the last bit.

    Raises
    ------
    InvalidArgumentError
        If it is not a square matrix, or the seed is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[3.0, 4.0]])
    >>> np.allclose(rotated_moment(x.T @ x, 1), rotate(x, 1).T @ rotate(x, 1))
    True
    """
    namespace(gram, dtypes=FLOATS)
    if len(gram.shape) != 2 or gram.shape[0] != gram.shape[1]:
        raise InvalidArgumentError(f"gram must be square, got shape {tuple(gram.shape)}.")
    turned = rotate(rotate(widen(gram, "gram"), seed), seed, axis=-2)
    return (turned + namespace(turned).matrix_transpose(turned)) / 2


def _mixed(lines: Array, dtype: str, matrix: Callable[[int], npt.NDArray[np.float64]]) -> Array:
    """Multiply columns by the Kronecker product of the matrices of all factors, one after another."""
    xp, shape, stride = namespace(lines), lines.shape, 1
    primes = _primes(shape[0])
    for prime in reversed(primes):
        parts = xp.reshape(lines, (-1, prime, stride * shape[1]))
        own = [parts[:, index, :] for index in range(prime)]
        if prime == 2 and matrix is _hartley:  # normalized at the end
            found = [own[0] + own[1], own[0] - own[1]]
        else:
            found = [_combined(own, row) for row in matrix(prime).astype(dtype).tolist()]
        lines, stride = xp.reshape(xp.stack(found, axis=1), shape), stride * prime
    twos = primes.count(2) if matrix is _hartley else 0
    return lines * float(np.dtype(dtype).type(0.5 ** (twos / 2))) if twos else lines


def _combined(parts: list[Array], factors: list[float]) -> Array:
    """Return a linear combination, added from the first part to the last."""
    total = parts[0] * factors[0]
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        total = total + part * factor
    return total


@fitting
def rotate_rows(x: Array, seed: int, *, inverse: bool = False) -> Array:
    """Rotate rows by two products of matrices: faster than :func:`rotate`, and equal to it up to rounding.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (..., n)
        Rows of inputs or outputs of a layer. torch can differentiate the result.
    seed : int
        Seed of the signs, from 0 to 2**63 - 1.
    inverse : bool, default False
        True undoes the rotation, up to rounding.

    Returns
    -------
    array of the dtype and shape of ``x``
        Rotated rows, computed in at least float32.

    Raises
    ------
    InvalidArgumentError
        If the array has no axis, or the seed is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(12, dtype=np.float32)
    >>> np.allclose(rotate_rows(x, 7), rotate(x, 7), atol=1e-5)
    True
    """
    xp = namespace(x, dtypes=FLOATS)
    _require_options(x, seed, -1)
    wide = (
        x if dtype_name(x) in ("float32", "float64") else xp.astype(x, xp.float32)
    )  # in the graph of x, unlike widen()
    count, dtype = wide.shape[-1], dtype_name(wide)
    if not prod(wide.shape):
        return x
    # R = H D with H = H_a (x) H_b for n = a b. With a row as a matrix X of shape (a, b), H x is H_a X H_b.
    outer, inner = (table_beside(own, wide) for own in _halves(count, dtype))
    signs = table_beside(_signs(count, int(seed), dtype), wide)
    wide = wide if inverse else wide * signs
    squares = xp.reshape(wide, (-1, outer.shape[0], inner.shape[0]))
    with _without_autocast(wide):
        found = xp.reshape(outer @ (squares @ inner), wide.shape)
    found = found * signs if inverse else found
    return found if found.dtype == x.dtype else xp.astype(found, x.dtype)


def _without_autocast(array: Array) -> AbstractContextManager[Any]:
    """Return a context in which torch multiplies in the dtype of its arguments."""
    if array_library(array) != "torch":
        return nullcontext()
    torch = importlib.import_module("torch")
    return torch.autocast(array.device.type, enabled=False)  # type: ignore[no-any-return]


def _require_options(array: Array, seed: int, axis: int) -> None:
    """Raise unless an array has an axis, and a seed is one."""
    require_integer(seed, "seed", 0, 2**63 - 1)
    if not array.shape:
        raise InvalidArgumentError("array must have an axis to rotate, got one without dimensions.")
    require_integer(axis, "axis", -len(array.shape), len(array.shape) - 1)


def _lines_first(array: Array, axis: int) -> Array:
    """Return the lines along an axis as columns: what is added then lies far apart, in runs that are contiguous."""
    xp = namespace(array)
    order = (axis, *(own for own in range(len(array.shape)) if own != axis))
    rest = prod(length for own, length in enumerate(array.shape) if own != axis)
    return xp.reshape(xp.permute_dims(array, order), (array.shape[axis], rest))


def _lines_back(lines: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Return columns as lines along an axis of an array: the inverse of :func:`_lines_first`."""
    xp = namespace(lines)
    moved = xp.reshape(lines, (shape[axis], *shape[:axis], *shape[axis + 1 :]))
    return xp.permute_dims(moved, (*range(1, axis + 1), 0, *range(axis + 1, len(shape))))


@lru_cache(maxsize=256)
def _primes(count: int) -> tuple[int, ...]:
    """Return the prime factors of a length that are mixed, in falling order, so that those of two have the shortest strides."""
    found, prime = [], 2
    while count > 1 and prime <= _LARGEST_PRIME:
        if count % prime:
            prime += 1
        else:
            found.append(prime)
            count //= prime
    return tuple(reversed(found))


@lru_cache(maxsize=64)
def _hartley(prime: int) -> npt.NDArray[np.float64]:
    """Return the matrix of a prime factor."""
    # j k is reduced modulo p in integers first, so that the angles of large factors lose no digits.
    angle = 2 * np.pi * (np.outer(np.arange(prime), np.arange(prime)) % prime) / prime
    return np.asarray((np.cos(angle) + np.sin(angle)) / np.sqrt(prime))


def _squares(prime: int) -> npt.NDArray[np.float64]:
    """Return the squared entries of the matrix of a prime factor, whose rows have the sum one."""
    return _hartley(prime) ** 2


@lru_cache(maxsize=64)
def _halves(count: int, dtype: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the Kronecker products of the first and of the last factors, whose sizes are as equal as the order allows."""
    primes = _primes(count)
    cut = min(range(len(primes) + 1), key=lambda at: prod(primes[:at]) + prod(primes[at:]))
    halves = []
    for own in (primes[:cut], primes[cut:]):
        matrix: npt.NDArray[Any] = np.ones((1, 1))
        for prime in own:
            matrix = np.kron(matrix, _hartley(prime))
        halves.append(np.asarray(matrix, dtype=dtype))
        halves[-1].flags.writeable = False
    return halves[0], halves[1]


@lru_cache(maxsize=256)
def _signs(count: int, seed: int, dtype: str) -> npt.NDArray[np.float64]:
    """Return signs, 1 or -1, that are the highest bits of a hash of seed and position."""
    first = np.uint64((seed * count + 1) % 2**64)  # positions of two seeds differ
    state = (np.arange(count, dtype=np.uint64) + first) * np.uint64(_STEP)
    for shift, factor in _MIX:
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    signs = np.where(state >> np.uint64(63), -1.0, 1.0).astype(dtype)
    signs.flags.writeable = False
    return signs
