"""Encoding and decoding under given scales: weights to codes, and codes to weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lqlora._dispatch import FLOATS, device_of, dtype_name, fitting, is_on_host, namespace, op, require_writable
from lqlora.errors import InvalidArgumentError
from lqlora.ops.blocks import block_absmax, from_blocks, to_blocks
from lqlora.ops.casting import storage_cast, widen
from lqlora.ops.packing import pack_codes, unpack_codes
from lqlora.ops.tables import pick, table_beside

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._dispatch.examples import BlocksProblem, ProductProblem
    from lqlora._typing import Array

__all__ = [
    "boundaries_by_set",
    "decode",
    "encode",
    "encode_by_absmax",
    "encode_packed",
    "nearest_codes",
    "nearest_codes_by_row",
    "normalize",
    "values_by_row",
]

#: Up to this many boundaries, counting those below a value was faster than a binary search on every library measured, in
#: host memory. On a device each step of the counting is a kernel of its own.
FEW = 15

_TINY = 2.0**-126  # the smallest normal float32


@op(examples=lambda problem: (problem.normalized, problem.codebook.boundaries))
def nearest_codes(values: Array, boundaries: npt.NDArray[np.float32]) -> Array:
    """Return the code of each value: the index of the cell between two boundaries that it falls into.

    Parameters
    ----------
    values : array of float32 or float64
        Normalized weights of any shape. Infinite values get the first or the last code.
    boundaries : ndarray of float32, shape (n - 1,)
        Sorted boundaries between the cells.

    Returns
    -------
    array of uint8, same shape as ``values``
        The number of boundaries strictly below the value, so that a value on a boundary gets the lower code.

    Examples
    --------
    >>> import numpy as np
    >>> nearest_codes(np.array([-2.0, 0.5, 0.6]), np.array([-0.5, 0.5], dtype=np.float32)).tolist()
    [0, 1, 2]
    """
    xp = namespace(values, dtypes=FLOATS)
    # Let b_i be the midpoint of the sorted levels l_i and l_(i + 1). Then l_i is nearest to x if b_(i - 1) < x <= b_i,
    # and i is the number of boundaries below x. Counting comparisons and bisection (side="left" is that number) compute
    # nothing but comparisons, so both give the same codes. They may differ only at NaN, for which codes are
    # unspecified. On a tie x = b_i the comparison x > b_i is false, and the lower level wins.
    if len(boundaries) > FEW or not is_on_host(values):
        cells = table_beside(boundaries.astype(dtype_name(values), copy=False), values)
        # Flat, since torch warns of strided values.
        codes = xp.searchsorted(cells, xp.reshape(values, (-1,)), side="left")
        return xp.reshape(xp.astype(codes, xp.uint8), values.shape)
    codes = xp.zeros(values.shape, dtype=xp.uint8, device=device_of(values))
    for boundary in boundaries.tolist():
        codes += xp.astype(values > boundary, xp.uint8)
    return codes


@fitting
def boundaries_by_set(levels: Array) -> Array:
    """Return the boundaries between the levels of several sets.

    Parameters
    ----------
    levels : array of float32, shape (number of sets, n)
        Sorted levels.

    Returns
    -------
    array of float32, shape (number of sets, n - 1)
        Midpoints of neighbors, rounded to float32.

    Examples
    --------
    >>> import numpy as np
    >>> boundaries_by_set(np.array([[-1, 1], [0, 8]], dtype=np.float32)).tolist()
    [[0.0], [4.0]]
    """
    xp = namespace(levels, dtypes=FLOATS)
    wide = xp.astype(levels, xp.float64)
    # In float64 the sum of two float32 levels cannot overflow, and the midpoint is rounded to float32 once.
    midpoints = xp.astype((wide[:, 1:] + wide[:, :-1]) / 2, xp.float32)
    zeros = (levels[:, 1:] == 0) & (levels[:, :-1] == 0)  # a codebook encodes 0.0 as the upper of two zeros
    return xp.where(zeros, xp.full_like(midpoints, -_TINY), midpoints)


@fitting
def nearest_codes_by_row(values: Array, boundaries: Array, sets: Array) -> Array:
    """Return the codes of the nearest levels, where each row has a set of levels of its own.

    Parameters
    ----------
    values : array of float32 or float64, shape (m, k)
        Normalized weights.
    boundaries : array of float32, shape (number of sets, n - 1)
        Boundaries from :func:`boundaries_by_set`.
    sets : array of int64, shape (m,)
        Index of the set of each row.

    Returns
    -------
    array of uint8, shape (m, k)
        Codes; a value on a boundary gets the lower one.

    Examples
    --------
    >>> import numpy as np
    >>> boundaries = boundaries_by_set(np.array([[-1, 1], [0, 8]], dtype=np.float32))
    >>> nearest_codes_by_row(np.array([[0.5], [3.0]]), boundaries, np.array([0, 1])).tolist()
    [[1], [0]]
    """
    xp = namespace(values, boundaries, sets)
    boundaries = xp.astype(pick(boundaries, sets, axis=0), values.dtype, copy=False)
    if values.shape[1] == 1:  # with more columns the comparison would make an array of (m, k, n - 1) entries
        above = xp.astype(values > boundaries, xp.uint8)
        return xp.sum(above, axis=1, keepdims=True, dtype=xp.uint8)
    codes = xp.zeros(values.shape, dtype=xp.uint8, device=device_of(values))
    for index in range(boundaries.shape[1]):
        codes += xp.astype(values > boundaries[:, index : index + 1], xp.uint8)
    return codes


@fitting
def values_by_row(codes: Array, levels: Array, sets: Array) -> Array:
    """Return the levels of codes, where each row has a set of levels of its own.

    Parameters
    ----------
    codes : array of uint8, shape (m, k)
        Codes.
    levels : array of float32, shape (number of sets, n)
        Levels.
    sets : array of int64, shape (m,)
        Index of the set of each row.

    Returns
    -------
    array of float32, shape (m, k)
        ``levels[sets[i], codes[i, j]]``.

    Raises
    ------
    InvalidArgumentError
        If a code or a set is out of range. On a device they are not checked.

    Examples
    --------
    >>> import numpy as np
    >>> levels = np.array([[-1, 1], [0, 8]], dtype=np.float32)
    >>> values_by_row(np.array([[0, 1]], dtype=np.uint8), levels, np.array([1])).tolist()
    [[0.0, 8.0]]
    """
    xp = namespace(codes, levels, sets)
    if is_on_host(codes) and 0 not in codes.shape and int(xp.max(codes)) >= levels.shape[1]:
        raise InvalidArgumentError(
            f"codes must be below {levels.shape[1]}, the levels of a set, got {int(xp.max(codes))}."
        )
    # Sets lie one after another in the flat table: level c of set s is entry s * n + c. One gather reads all.
    indices = xp.astype(codes, xp.int64) + sets[:, None] * levels.shape[1]
    return xp.reshape(pick(xp.reshape(levels, (-1,)), xp.reshape(indices, (-1,))), codes.shape)


@fitting
def normalize(blocks: Array, scales: Array, zero_points: Array | None = None) -> Array:
    """Divide each block by its scale.

    Parameters
    ----------
    blocks : array of float32 or float64, shape (m, k)
        One block per row.
    scales : array of the same dtype, shape (m,)
        Scales of either sign. The result is zero where the scale is zero.
    zero_points : array of uint8, shape (m,), optional
        Added after the division.

    Returns
    -------
    array of the same dtype, shape (m, k)
        Normalized weights, which are rounded to the nearest level next.

    Examples
    --------
    >>> import numpy as np
    >>> normalize(np.array([[1.0, -2.0], [1.0, 1.0]]), np.array([2.0, 0.0])).tolist()
    [[0.5, -1.0], [0.0, 0.0]]
    """
    xp = namespace(blocks, scales, zero_points)
    column = scales[:, None]
    # Dividing by infinity gives the zeros of a block without scale, and no 0 / 0. The quotient is never a product with a
    # reciprocal: that would round twice, and could land on the other side of a boundary.
    divisors = xp.where(column != 0, column, xp.full_like(column, math.inf))
    with np.errstate(over="ignore"):  # a weight far above its decoded scale rounds to the outermost level
        normalized = blocks / divisors
    # An affine format decodes (l - z) * s with integer levels l and the code z of zero. Solving for l gives x / s + z.
    # The sum is rounded in the dtype of the blocks before it meets the boundaries: kernels must add in the same dtype.
    return normalized if zero_points is None else normalized + xp.astype(zero_points, blocks.dtype)[:, None]


def _encoding(problem: BlocksProblem) -> tuple[Any, ...]:
    """Return the arguments that :func:`encode` and :func:`encode_packed` share; scales are of the wide dtype."""
    return problem.scales.astype(problem.wide.dtype), problem.zeros, problem.codebook.boundaries


@op(examples=lambda problem: (problem.wide, *_encoding(problem), problem.block_size))
def encode(
    flat: Array, scales: Array, zero_points: Array | None, boundaries: npt.NDArray[np.float32], block_size: int
) -> Array:
    """Divide each block by its scale and return the codes of the nearest levels.

    Parameters
    ----------
    flat : array of float32 or float64, shape (n,)
        Weights.
    scales : array of the same dtype, shape (ceil(n / block_size),)
        Decoded scales. A block whose scale is zero is encoded as zeros.
    zero_points : array of uint8, shape (ceil(n / block_size),), or None
        Zero points of an affine format: what decodes to zero in each block.
    boundaries : ndarray of float32
        Boundaries between the levels of the codebook.
    block_size : int
        Weights per scale.

    Returns
    -------
    array of uint8, shape (n,)
        Codes.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 2.2. Encoding divides by the decoded scale, as its published code does.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> encode(np.array([-2.0, 2.0]), np.array([2.0]), None, lq.NF4.boundaries, 64).tolist()
    [0, 15]
    """
    # Decoding multiplies by the decoded scale, so encoding divides by it too. Under the exact scale some codes would
    # not be nearest to what decoding returns.
    namespace(flat, scales, dtypes=FLOATS)
    normalized = normalize(to_blocks(flat, block_size), scales, zero_points)
    return from_blocks(nearest_codes(normalized, boundaries), flat.shape[0])


@op(examples=lambda problem: (problem.weights, *_encoding(problem), problem.bits, problem.block_size))
def encode_packed(
    flat: Array,
    scales: Array,
    zero_points: Array | None,
    boundaries: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
) -> Array:
    """Return the packed codes of an array under given scales.

    Parameters
    ----------
    flat : array of float16, bfloat16, float32 or float64, shape (n,)
        Weights.
    scales : array of float32, or float64 for float64, shape (ceil(n / block_size),)
        Decoded scales. A block whose scale is zero is encoded as zeros.
    zero_points : array of uint8, shape (ceil(n / block_size),), or None
        Zero points of an affine format: what decodes to zero in each block.
    boundaries : ndarray of float32
        Boundaries between the levels of the codebook, fewer than ``2**bits``.
    bits : int
        Bits per code, 1 to 8.
    block_size : int
        Weights per scale.

    Returns
    -------
    array of uint8, shape (ceil(n * bits / 8),)
        The codes of :func:`encode` as :func:`lqlora.ops.pack_codes` packs them.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> encode_packed(np.array([-2.0, 2.0]), np.array([2.0]), None, lq.NF4.boundaries, 4, 64).tolist()
    [240]
    """
    return pack_codes(encode(widen(flat, "flat"), scales, zero_points, boundaries, block_size), bits)


@op(examples=lambda problem: (problem.weights, problem.codebook.boundaries, problem.bits, problem.block_size))
def encode_by_absmax(
    flat: Array, boundaries: npt.NDArray[np.float32], bits: int, block_size: int
) -> tuple[Array, Array]:
    """Return the absolute maxima of blocks, and the packed codes of the array with these as scales.

    Parameters
    ----------
    flat : array of float16, bfloat16, float32 or float64, shape (n,)
        Weights.
    boundaries : ndarray of float32
        Boundaries between the levels of the codebook, fewer than ``2**bits``.
    bits : int
        Bits per code, 1 to 8.
    block_size : int
        Weights per scale.

    Returns
    -------
    tuple of array of float32, or float64 for float64, shape (ceil(n / block_size),), and array of uint8
        The maxima of :func:`lqlora.ops.block_absmax`, and the codes of :func:`encode_packed`. The codes of a block
        whose maximum is not finite are unspecified.

    References
    ----------
    QLoRA, arXiv 2305.14314, section 3, equation 1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> scales, packed = encode_by_absmax(np.array([-2.0, 2.0]), lq.NF4.boundaries, 4, 64)
    >>> scales.tolist(), packed.tolist()
    ([2.0], [240])
    """
    scales = block_absmax(flat, block_size)
    with np.errstate(invalid="ignore"):  # callers check that the scales are finite
        return scales, encode_packed(flat, scales, None, boundaries, bits, block_size)


class PackedBlocks(NamedTuple):
    """Weights in blocks: packed codes, decoded scales, and the levels that the codes stand for.

    Parameters
    ----------
    packed : array of uint8, shape (ceil(n * bits / 8),)
        Packed codes.
    scales : array of float32, shape (ceil(n / block_size),)
        Decoded scales.
    zero_points : array of uint8, shape (ceil(n / block_size),), or None
        Zero points of an affine format: what decodes to zero in each block.
    levels : ndarray of float32
        Levels of the codebook. A code that is not below their number decodes to NaN.
    bits : int
        Bits per code.
    block_size : int
        Weights per scale.
    """

    packed: Array
    scales: Array
    zero_points: Array | None
    levels: npt.NDArray[np.float32]
    bits: int
    block_size: int

    def fits(self, count: int) -> bool:
        """Return whether the arrays hold as much as a number of weights takes: kernels read them without checks.

        Parameters
        ----------
        count : int
            Number of weights.

        Returns
        -------
        bool
            False for other numbers of bytes, scales or zero points, for more levels than codes, and for empty blocks.
        """
        packed, scales, zero_points, levels, bits, block_size = self
        if block_size < 1 or len(levels) > 2**bits or packed.shape != (-(-count * bits // 8),):
            return False
        blocks = (-(-count // block_size),)
        return bool(scales.shape == blocks and (zero_points is None or zero_points.shape == blocks))

    def require_fit(self, count: int) -> None:
        """Raise unless the arrays hold as much as a number of weights takes.

        Parameters
        ----------
        count : int
            Number of weights.

        Raises
        ------
        InvalidArgumentError
            If :meth:`fits` is false.
        """
        if not self.fits(count):
            packed, scales, zeros, levels, bits, block_size = self
            shapes = [None if array is None else tuple(array.shape) for array in (packed, scales, zeros, levels)]
            raise InvalidArgumentError(
                f"stored must hold {count} codes of {bits} bits, which are {-(-count * bits // 8)} bytes, a scale for each block "
                f"of {block_size}, and at most {2**bits} levels, got packed, scales, zero_points and levels of shapes {shapes}."
            )

    def table(self) -> npt.NDArray[np.float32]:
        """Return the level of each number that a code can be.

        Returns
        -------
        ndarray of float32, shape (2**bits,)
            The levels, then NaN for codes without a level, so that every implementation decodes these alike.
        """
        levels = np.ascontiguousarray(self.levels, dtype=np.float32)
        missing = 2**self.bits - len(levels)
        return levels if not missing else np.concatenate([levels, np.full(missing, np.nan, dtype=np.float32)])

    @classmethod
    def of(cls, problem: BlocksProblem | ProductProblem) -> PackedBlocks:
        """Return the stored weights of a problem that examples are made from.

        Parameters
        ----------
        problem : BlocksProblem or ProductProblem
            The problem.

        Returns
        -------
        PackedBlocks
            Arrays of NumPy.
        """
        codes = problem.packed, problem.scales, problem.zeros
        return cls(*codes, problem.codebook.levels, problem.bits, problem.block_size)


@op(examples=lambda problem: (PackedBlocks.of(problem), problem.target()), record=("stored", PackedBlocks))
def decode(stored: PackedBlocks, out: Array) -> Array:
    """Write the decoded weights: the level of each code times the scale of its block.

    Parameters
    ----------
    stored : PackedBlocks
        Packed codes, scales and levels.
    out : array of float32, float16 or bfloat16, shape (n,)
        Array that is written.

    Returns
    -------
    array, shape (n,)
        ``out``, which holds ``(levels[code] - zero_point) * scale``. The difference is exact, since both are small
        integers. The product is rounded to float32, and then to the dtype of ``out``.

    Raises
    ------
    InvalidArgumentError
        If the arrays do not hold ``n`` weights, or ``out`` cannot be written to.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> scale, out = np.array([2], dtype=np.float32), np.empty(2, dtype=np.float32)
    >>> stored = PackedBlocks(np.array([240], dtype=np.uint8), scale, None, lq.NF4.levels, 4, 64)
    >>> decode(stored, out).tolist()
    [-2.0, 2.0]
    """
    packed, scales, zero_points, _, bits, block_size = stored
    xp = namespace(packed, scales, zero_points, out)
    stored.require_fit(math.prod(out.shape))
    require_writable(out, "out")
    codes = xp.astype(unpack_codes(packed, bits, out.shape[0]), xp.int64)
    blocks = to_blocks(pick(table_beside(stored.table(), packed), codes), block_size)
    if zero_points is not None:
        blocks = blocks - xp.astype(zero_points, xp.float32)[:, None]
    # The product is formed in float32 and rounded to the storage dtype afterwards. Rounding the levels or scales first
    # would round twice, and kernels could not return the same bytes.
    values = from_blocks(blocks * scales[:, None], out.shape[0])
    out[...] = values if dtype_name(out) == "float32" else storage_cast(values, dtype_name(out))
    return out
