"""What the tests draw from: hard weights, layouts in memory, formats; and the way into and out of array libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lqlora import BlockFormat, Codebook, ScaleFormat, normal_float, uniform
from lqlora.codebooks import by_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy

#: Storage dtypes of scales by library: the array API standard has none below float32.
SCALE_DTYPES = {"array_api_strict": ("float32",)}

#: Signs, zeros, both ends of the subnormal range, both ends of the normal range.
HARD = (0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, -1e-30, 0.5, -1.0, 1.0, 3e38, -3.4028235e38)

LAYOUTS = ("contiguous", "transposed", "every second", "reversed")

ALL_CODEBOOKS = (
    *(normal_float(bits) for bits in range(2, 9)),
    *(uniform(bits) for bits in range(2, 9)),
    *(uniform(bits, signed=False) for bits in range(1, 9)),
    *(
        by_name(name)
        for name in (
            "affine1", "affine3", "affine4", "affine8", "fp4", "e3m2", "af4", "bof3-64", "bof2s-64", "bof4s-64",
            "sf4", "dynamic8", "udynamic8", "log3", "log8",
        )
    ),
)  # fmt: skip

#: Bits of a scale by its codebook, and the offsets that this takes, by whether the scales have a sign.
SCALE_BITS = {"uint": st.integers(1, 8), "int": st.integers(2, 8), "dynamic": st.just(8), "log": st.integers(3, 8)}
SCALE_OFFSETS = {
    ("uint", False): ["min", "none"], ("log", False): ["min", "none"],
    ("int", False): ["min", "mean", "none"], ("dynamic", False): ["min", "mean", "none"],
    ("int", True): ["mean", "none"], ("dynamic", True): ["mean", "none"],
}  # fmt: skip


def scale_dtypes(xp: Any) -> tuple[str, ...]:
    return SCALE_DTYPES.get(xp.__name__, ("float32", "float16", "bfloat16"))


def on(xp: Any, array: np.ndarray) -> Any:
    """Copy a NumPy array to another library, without help from the library under test."""
    if array.dtype == ml_dtypes.bfloat16 and "torch" in xp.__name__:
        return on(xp, array.view(np.uint16)).view(xp.bfloat16)
    if "torch" in xp.__name__:
        return xp.asarray(np.array(array, order="C"))
    return xp.asarray(array, copy=True)


def host(array: Any) -> np.ndarray:
    """Copy an array of any library to NumPy; bfloat16 becomes that of ml_dtypes."""
    if array_api_compat.is_torch_array(array):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            return host(array.contiguous().view(dtype=_torch_uint16(array))).view(ml_dtypes.bfloat16)
        return array.numpy().copy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    return np.array(array)


def _torch_uint16(array: Any) -> Any:
    return array_api_compat.array_namespace(array).uint16


def stored(q: Any) -> dict[str, bytes]:
    """Bytes of every stored array: equal on all libraries, or the library is wrong."""
    return {name: host(array).tobytes() for name, array in q.to_arrays().items()}


def lay_out(xp: Any, array: np.ndarray, layout: str) -> Any:
    """Return the same entries in the same logical order, held differently in memory."""
    if layout == "contiguous" or array.ndim == 0:
        return on(xp, array)
    if layout == "transposed":
        axes = tuple(reversed(range(array.ndim)))
        return xp.permute_dims(on(xp, np.ascontiguousarray(array.transpose(axes))), axes)
    if layout == "every second":
        wide = np.full((2 * array.shape[0], *array.shape[1:]), 7, dtype=array.dtype)
        wide[::2] = array
        return on(xp, wide)[::2, ...]
    if "torch" in xp.__name__:  # has no negative strides
        return xp.flip(on(xp, array[::-1]), axis=0)
    return on(xp, np.ascontiguousarray(array[::-1]))[::-1, ...]


def shapes(max_dims: int = 3, max_side: int = 6) -> SearchStrategy[tuple[int, ...]]:
    """Shapes of 0 to 3 dimensions, empty ones included."""
    return hnp.array_shapes(min_dims=0, max_dims=max_dims, min_side=0, max_side=max_side)


def _limit(largest: float) -> SearchStrategy[float]:
    """Hard values, and any float32, not beyond ``largest``."""
    bound = (
        float(np.float32(largest)) if np.float32(largest) <= largest else float(np.nextafter(np.float32(largest), 0))
    )
    return st.sampled_from([x for x in HARD if abs(x) <= bound]) | st.floats(-bound, bound, width=32)


@st.composite
def weights(
    draw: DrawFn, dtype: Any = np.float32, largest: float = 3.4e38, shape: SearchStrategy[tuple[int, ...]] | None = None
) -> np.ndarray:
    """Normal noise of any size with hard values strewn in and a stretch of zeros, in any shape."""
    dimensions = draw(shapes() if shape is None else shape)
    seed = draw(st.integers(0, 2**16))
    size = draw(st.integers(-126, 120))
    noise = np.random.default_rng(seed).standard_normal(dimensions) * 2.0**size
    array = np.atleast_1d(np.clip(noise, -largest, largest)).reshape(-1)
    if array.size:
        for value in draw(st.lists(_limit(largest), max_size=8)):
            array[draw(st.integers(0, array.size - 1))] = value
        start = draw(st.integers(0, array.size))
        array[start : start + draw(st.integers(0, 20))] = 0.0
    with np.errstate(under="ignore"):
        return array.reshape(dimensions).astype(dtype)


@st.composite
def ties(draw: DrawFn, codebook: Codebook) -> np.ndarray:
    """One block whose entries are its largest entry times the midpoints between levels: power-of-two scales tie."""
    scale = np.float32(2.0 ** draw(st.integers(-60, 60)))
    boundaries = draw(st.permutations(codebook.boundaries.tolist()))
    return np.array([1.0, *boundaries], dtype=np.float32) * scale


@st.composite
def scale_formats(draw: DrawFn, dtypes: tuple[str, ...], depth: int = 2, *, signed: bool = False) -> ScaleFormat:
    """Every codebook of scales with every offset it takes; only those for scales of both signs if ``signed``."""
    inner = st.sampled_from(dtypes)
    if depth > 1:
        inner = inner | scale_formats(dtypes, depth - 1)
    codebook = draw(st.sampled_from(["int", "dynamic"] if signed else list(SCALE_BITS)))
    offset = draw(st.sampled_from(SCALE_OFFSETS[codebook, signed]))
    return ScaleFormat(draw(SCALE_BITS[codebook]), draw(st.integers(1, 20)), draw(inner), offset, codebook)


@st.composite
def formats(
    draw: DrawFn,
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16"),
    depth: int = 2,
    *,
    codebooks: Sequence[Codebook] | None = None,
    axes: Sequence[int | None] = (None,),
    fitted: bool = False,
) -> BlockFormat:
    """All codebooks, blocks of 1 to 70, scales as floats or quantized themselves; levels of its own if ``fitted``."""
    codebook = draw(st.sampled_from(ALL_CODEBOOKS if codebooks is None else codebooks))
    signed = codebook.normalization == "signed"
    scales = draw(st.sampled_from(dtypes) | scale_formats(dtypes, depth, signed=signed))
    axis = draw(st.sampled_from(axes))
    sharing = ["matrix"] if fitted else ["codebook"]
    if fitted and axis is not None:
        sharing.append(draw(st.integers(1, 4)))
    levels = "codebook" if codebook.normalization == "affine" else draw(st.sampled_from(sharing))
    return BlockFormat(codebook, draw(st.integers(1, 70)), scales, axis, levels)


def largest_for(fmt: BlockFormat) -> float:
    """Return the largest weight whose scale every level of the format can hold."""
    largest = 6e4 if "float16" in str(fmt).replace("bfloat16", "") else 1e38
    return largest / 2 if fmt.codebook.normalization == "affine" else largest
