"""Hypothesis strategies: weights with edge cases, memory layouts, codebooks and formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lqlora._dispatch import array_library, namespace
from lqlora.codebooks import Codebook, by_name, normal_float, uniform
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, Rotation, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from hypothesis.strategies import DrawFn, SearchStrategy

    from lqlora._typing import Array, FloatName

__all__ = [
    "ALL_CODEBOOKS",
    "HARD",
    "LAYOUTS",
    "TRELLISES",
    "block_weights",
    "codebooks",
    "formats",
    "hard_floats",
    "largest_for",
    "lay_out",
    "scale_formats",
    "shapes",
    "ties",
    "weights",
]

#: Hard values of float32: zeros of both signs, both ends of the subnormal and of the normal range.
HARD = tuple(
    float(np.float32(x))
    for x in (0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, -1e-30, 0.5, -1.0, 1.0, 3e38, -3.4028235e38)
)

#: Codebooks of trellis codes with few states. Their levels are not rounded to, so they are not among :data:`ALL_CODEBOOKS`.
TRELLISES = tuple(by_name(name) for name in ("tcq1-4", "tcq2-4", "tcq2-7", "tcq3-8", "tcq4-8"))

#: Memory layouts of :func:`lay_out`.
LAYOUTS = ("contiguous", "transposed", "every second", "reversed")

#: Named codebooks of every family and normalization.
ALL_CODEBOOKS = (
    *(normal_float(bits) for bits in range(2, 9)),
    *(uniform(bits) for bits in range(2, 9)),
    *(uniform(bits, signed=False) for bits in range(1, 9)),
    *(
        by_name(name)
        for name in (
            "affine1", "affine3", "affine4", "affine8", "affine2-4", "affine3-8", "fp4", "e3m2", "af4", "bof3-64", "bof2s-64", "bof4s-64",
            "sf4", "dynamic8", "udynamic8", "log3", "log8",
        )
    ),
)  # fmt: skip

#: Range of bits by the codebook of the scales; offsets by codebook and by whether scales have a sign. Differences
#: from a mean have both signs, which "uint" and "log" cannot hold. An offset may change the sign of small scales.
_SCALE_BITS = {"uint": (1, 8), "int": (2, 8), "dynamic": (8, 8), "log": (3, 8)}
_SCALE_OFFSETS = {
    ("uint", False): ["min", "none"], ("log", False): ["min", "none"],
    ("int", False): ["min", "mean", "none"], ("dynamic", False): ["min", "mean", "none"],
    ("int", True): ["none"], ("dynamic", True): ["none"],
}  # fmt: skip

#: Rotations of every side.
_ROTATIONS = (Rotation(), Rotation("out", 1), Rotation("both", 2**32 - 1))

#: Smallest fraction of the absmax that :func:`block_weights` draws, so that normal weights stay normal.
_FINEST = 2.0**-20

#: Strategies of one block, built once because that takes time.
_SIGNS = st.sampled_from((1.0, -1.0))
_FEW = st.lists(st.integers(-1024, 1024), max_size=4)


def lay_out(array: Array, layout: str) -> Array:
    """Return an array with the same entries in the same logical order in another memory layout.

    Parameters
    ----------
    array : array of any library, any shape
        The entries.
    layout : {"contiguous", "transposed", "every second", "reversed"}
        Row-major; axes in reverse order; gaps along the first axis; negative strides.

    Returns
    -------
    array
        An array equal to ``array``. It is ``array`` itself for the layout "contiguous", for zero-dimensional arrays,
        and for the layout "reversed" in torch, which has no negative strides.

    Raises
    ------
    InvalidArgumentError
        If the layout is not one of :data:`LAYOUTS`.

    Examples
    --------
    >>> import numpy as np
    >>> lay_out(np.zeros((2, 3), dtype=np.float32), "transposed").strides
    (4, 8)
    """
    if layout not in LAYOUTS:
        raise InvalidArgumentError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    no_reversal = layout == "reversed" and array_library(array) == "torch"
    if layout == "contiguous" or array.ndim == 0 or no_reversal:
        return array
    xp = namespace(array)
    if layout == "transposed":
        axes = tuple(reversed(range(array.ndim)))
        return xp.permute_dims(_compact(xp, xp.permute_dims(array, axes)), axes)
    if layout == "every second":
        device = array_api_compat.device(array)
        wide = xp.full((2 * array.shape[0], *array.shape[1:]), 7, dtype=array.dtype, device=device)
        wide[::2, ...] = array
        return wide[::2, ...]
    return _compact(xp, xp.flip(array, axis=0))[::-1, ...]


def _compact(xp: Any, array: Array) -> Array:
    """Copy to row-major order. The array is flattened first, because a copy may keep strides."""
    return xp.reshape(xp.asarray(xp.reshape(array, (-1,)), copy=True), tuple(array.shape))


def shapes(max_dims: int = 3, max_side: int = 6) -> SearchStrategy[tuple[int, ...]]:
    """Return a strategy of shapes of few dimensions, among them empty ones and ``()``.

    Parameters
    ----------
    max_dims : int, default 3
        Largest number of dimensions.
    max_side : int, default 6
        Longest side.

    Returns
    -------
    SearchStrategy of tuple of int
        Shapes.

    Examples
    --------
    >>> from hypothesis import find
    >>> 0 in find(shapes(), lambda shape: 0 in shape)
    True
    """
    return hnp.array_shapes(min_dims=0, max_dims=max_dims, min_side=0, max_side=max_side)


def hard_floats(largest: float = 3.4e38, codebook: Codebook | None = None) -> SearchStrategy[float]:
    """Return a strategy of float32 values that often draws edge cases.

    Parameters
    ----------
    largest : float, default 3.4e38
        Largest absolute value.
    codebook : Codebook, optional
        Codebook whose boundaries between levels are drawn too. In a block with absmax 1 they are ties.

    Returns
    -------
    SearchStrategy of float
        Values of float32: zeros of both signs, subnormals, the ends of the range, and others.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(hard_floats(), lambda x: 0 < x < 1.2e-38) < 1.2e-38
    True
    """
    # st.floats(width=32) refuses limits that float32 does not hold, so the limit is rounded toward zero.
    bound = float(np.float32(largest))
    if bound > largest:  # float32 rounded the limit up
        bound = float(np.nextafter(np.float32(largest), np.float32(0)))
    special = [*HARD, *(codebook.boundaries.tolist() if codebook is not None else ())]
    return st.sampled_from([x for x in special if abs(x) <= bound]) | st.floats(-bound, bound, width=32)


@st.composite
def weights(
    draw: DrawFn, dtype: Any = np.float32, largest: float = 3.4e38, shape: SearchStrategy[tuple[int, ...]] | None = None
) -> npt.NDArray[Any]:
    """Draw arrays of normal noise of any magnitude, with edge cases and a run of zeros inserted.

    Parameters
    ----------
    dtype : dtype, default float32
        Dtype of the array. Values are drawn as float32.
    largest : float, default 3.4e38
        Largest absolute value.
    shape : SearchStrategy of tuple of int, optional
        Strategy of the shapes; :func:`shapes` by default.

    Returns
    -------
    SearchStrategy of ndarray
        Finite weights.

    Examples
    --------
    >>> import numpy as np
    >>> from hypothesis import find
    >>> find(weights(), lambda w: w.size > 2 and np.abs(w).max() > 1e30).dtype
    dtype('float32')
    """
    dimensions = draw(shapes() if shape is None else shape)
    seed = draw(st.integers(0, 2**16))
    size = draw(st.integers(-126, 120))
    # Standard normal numbers are below 2**3 in magnitude, so the noise stays below 2**123. It is clipped before the
    # conversion at the end, where a narrower dtype would otherwise turn it into infinity.
    noise = np.random.default_rng(seed).standard_normal(dimensions) * 2.0**size
    array = np.atleast_1d(np.clip(noise, -largest, largest)).reshape(-1)
    if array.size:
        for value in draw(st.lists(hard_floats(largest), max_size=8)):
            array[draw(st.integers(0, array.size - 1))] = value
        start = draw(st.integers(0, array.size))
        array[start : start + draw(st.integers(0, 20))] = 0.0
    with np.errstate(under="ignore"):
        return array.reshape(dimensions).astype(dtype)


@st.composite
def block_weights(
    draw: DrawFn,
    block_size: int = 64,
    size: SearchStrategy[int] | None = None,
    smallest: float = 2.0**-20,
    largest: float = 2.0**20,
) -> npt.NDArray[np.float32]:
    """Draw blocks of very different magnitude: each is noise, or a few weights among zeros.

    No block is all zeros. Its largest weight is often its first or its last, where off-by-one faults show.

    Parameters
    ----------
    block_size : int, default 64
        Weights per block.
    size : SearchStrategy of int, optional
        Strategy of the number of weights; by default one to six whole blocks.
    smallest, largest : float, default 2**-20 and 2**20
        Range of the absmax of a block. Other weights are zero, or at least 2**-20 times the absmax.

    Returns
    -------
    SearchStrategy of ndarray of float32, shape (n,)
        Finite weights.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(block_weights(2), lambda w: w.size > 2).size % 2
    0
    """
    count = draw(st.integers(1, 6).map(lambda blocks: blocks * block_size) if size is None else size)
    starts = range(0, count, block_size)
    blocks = [_one_block(draw, min(block_size, count - start), smallest, largest) for start in starts]
    return np.concatenate([np.zeros(0, dtype=np.float32), *blocks])


def _one_block(draw: DrawFn, count: int, smallest: float, largest: float) -> npt.NDArray[np.float32]:
    # Blocks are built with an absmax of exactly 1 and scaled at the end. In a block of a few weights the products
    # (k / 1024) * (m / 1024) have at most 22 bits, so float32 holds them exactly, and w / absmax is k / 1024 again.
    if draw(st.booleans()):
        noise = np.random.default_rng(draw(st.integers(0, 2**16))).standard_normal(count)
        block = np.clip(noise / 3, -1, 1)
        block[np.abs(block) < _FINEST] = 0.0
    else:
        block = np.zeros(count)
        for value in draw(_FEW):
            block[_place(draw, count)] = value / 1024
    block[_place(draw, count)] = draw(_SIGNS)
    exponent = draw(st.integers(int(np.ceil(np.log2(smallest))), int(np.floor(np.log2(largest))) - 1))
    mantissa = draw(st.integers(1024, 2047))
    return (block * (mantissa / 1024 * 2.0**exponent)).astype(np.float32)


def _place(draw: DrawFn, count: int) -> int:
    """Draw an index: the first, the last and any other, each in a third of the draws."""
    return min(max(draw(st.integers(-count, 2 * count - 1)), 0), count - 1)


@st.composite
def ties(draw: DrawFn, codebook: Codebook) -> npt.NDArray[np.float32]:
    """Draw one block: a power of two and, in any order, that power times the boundaries between levels.

    Parameters
    ----------
    codebook : Codebook
        Codebook with a largest absolute level of 1, so that the boundaries are ties after division by the scale.

    Returns
    -------
    SearchStrategy of ndarray of float32, shape (number of levels,)
        Blocks whose first weight is the power of two.

    Examples
    --------
    >>> from hypothesis import find
    >>> sorted(find(ties(uniform(2)), lambda w: w[0] == 4).tolist())
    [-2.0, 2.0, 4.0]
    """
    # Products with a power of two are exact, so dividing by the scale gives the boundaries back bit for bit. Another
    # scale would round some products, and what is rounded need not be a tie.
    scale = np.float32(2.0 ** draw(st.integers(-60, 60)))
    boundaries = draw(st.permutations(codebook.boundaries.tolist()))
    return np.array([1.0, *boundaries], dtype=np.float32) * scale


def codebooks(max_levels: int = 256) -> SearchStrategy[Codebook]:
    """Return a strategy of named codebooks and of codebooks with arbitrary levels.

    Parameters
    ----------
    max_levels : int, default 256
        Largest number of levels, at least 2.

    Returns
    -------
    SearchStrategy of Codebook
        Codebooks.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(codebooks(4), lambda codebook: codebook.name == "custom").bits <= 2
    True
    """
    named = [codebook for codebook in ALL_CODEBOOKS if len(codebook) <= max_levels]
    levels = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=min(max_levels, 20), unique=True)
    return st.sampled_from(named) | levels.map(sorted).map(Codebook)


@st.composite
def scale_formats(
    draw: DrawFn,
    dtypes: Sequence[FloatName] = ("float32", "float16", "bfloat16"),
    depth: int = 2,
    *,
    signed: bool = False,
) -> ScaleFormat:
    """Draw formats of quantized scales, of one or more depths, with every codebook and every offset it takes.

    Parameters
    ----------
    dtypes : sequence of str, default all
        Dtypes of the innermost scales.
    depth : int, default 2
        Largest depth of double quantization.
    signed : bool, default False
        True draws only formats that hold scales of both signs.

    Returns
    -------
    SearchStrategy of ScaleFormat
        Blocks of 1 to 20 scales, 1 to 8 bits.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(scale_formats(), lambda scales: scales.bits == 8 and scales.offset == "none").block_size <= 20
    True
    """
    inner: SearchStrategy[Any] = st.sampled_from(dtypes)
    if depth > 1:
        inner = inner | scale_formats(dtypes, depth - 1)
    codebook: Any = draw(st.sampled_from(["int", "dynamic"] if signed else list(_SCALE_BITS)))
    offset: Any = draw(st.sampled_from(_SCALE_OFFSETS[codebook, signed]))
    bits = draw(st.integers(*_SCALE_BITS[codebook]))
    return ScaleFormat(bits, draw(st.integers(1, 20)), draw(inner), offset, codebook)


@st.composite
def formats(
    draw: DrawFn,
    dtypes: Sequence[FloatName] = ("float32", "float16", "bfloat16"),
    depth: int = 2,
    *,
    codebooks: Sequence[Codebook] | None = None,
    axes: Sequence[int | None] = (None,),
    fitted: bool = False,
    rotated: bool = False,
) -> BlockFormat:
    """Draw formats with blocks of 1 to 70 weights.

    Parameters
    ----------
    dtypes : sequence of str, default all
        Dtypes of the scales.
    depth : int, default 2
        Largest depth of double quantization.
    codebooks : sequence of Codebook, optional
        Codebooks to draw from; :data:`ALL_CODEBOOKS` and :data:`TRELLISES` by default.
    axes : sequence of int or None, default (None,)
        Axes of the blocks to draw from.
    fitted : bool, default False
        True draws formats with fitted levels where the codebook allows them.
    rotated : bool, default False
        True draws formats that rotate arrays of two dimensions or more, among others.

    Returns
    -------
    SearchStrategy of BlockFormat
        Formats with float or quantized scales.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(formats(), lambda fmt: fmt.block_size > 60).block_size <= 70
    True
    """
    # ALL_CODEBOOKS is not a default of the signature, because Hypothesis would print every level of every codebook.
    codebook = draw(st.sampled_from((*ALL_CODEBOOKS, *TRELLISES) if codebooks is None else codebooks))
    signed = codebook.normalization == "signed"
    scales: Any = draw(st.sampled_from(dtypes) | scale_formats(dtypes, depth, signed=signed))
    axis = draw(st.sampled_from(axes))
    sharing: list[Any] = ["codebook"]
    if fitted and codebook.normalization not in ("affine", "rms"):
        sharing = ["matrix", *([] if axis is None else [1, 2, 3, 4])]
    rotation = draw(st.sampled_from([None, *_ROTATIONS])) if rotated else None
    return BlockFormat(codebook, draw(st.integers(1, 70)), scales, axis, draw(st.sampled_from(sharing)), rotation)


def largest_for(fmt: BlockFormat) -> float:
    """Return the largest weight for which every scale of a format fits the dtype that stores it.

    Parameters
    ----------
    fmt : BlockFormat
        The format.

    Returns
    -------
    float
        60,000 for float16 scales, otherwise 1e38; half of that for affine formats, whose scale spans a block's range.

    Examples
    --------
    >>> largest_for(BlockFormat(uniform(4), 64, "float16"))
    60000.0
    """
    largest = 6e4 if "float16" in str(fmt).replace("bfloat16", "") else 1e38
    return largest / 2 if fmt.codebook.normalization == "affine" else largest
