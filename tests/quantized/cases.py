"""Shared helpers of the tests of quantized arrays: arrays drawn with a format, decoded scales, block errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis.extra import numpy as hnp

from lqlora import QuantizedArray, dequantize, quantize
from lqlora.testing.strategies import formats, largest_for, weights
from tests.strategies import host, normal_numbers, on, scale_dtypes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypothesis import strategies as st

    from lqlora import BlockFormat

DOUBLE = "nf4/16:u8/4:float32"
AXES = (None, 0, 1, -1, -2)

#: Formats with each normalization, each codebook and offset of scales, several depths of scales, axes, fitted levels.
UNROTATED = (
    "nf4/16:float32", "nf2/7:u8/5:float32", "nf8/16@-1:float32", "int5/5@0:u4+none/7:u3/3:float32", "uint1/53:float32",
    "nf3/6:d8/9:float32", "nf3/6:d8+none/9:float32", "nf4/4@-1:l8/8:float32", "af4/9@1:l4+min/8:float32",
    "fp4/8:i6/4:float32", "fp4-bnb/8:i6+mean/4:float32", "affine4/8@-1:float32", "affine2/5:u8/8:float32", "affine2-4/5:u8/8:float32",
    "affine8/16@0:d8/3:float32", "bof4s-64/16:float32", "bof2s-64/8@-1:d8+none/8:float32", "bof3s-64/5:i8/8:float32",
    "tcq2/16:float32", "tcq2-6/5@0:u8/8:float32", "tcq3/300:float32", "tcq1/9@-1:d8+none/3:float32",
    "nf3+fit/8:float32", "nf2+fit/8@0:u8/8:float32", "nf4+fit2/8@-1:float32", "bof4s-64+fit3/6@0:d8+none/4:float32",
)  # fmt: skip
KINDS = (
    *UNROTATED,
    "nf3/8~in:u8/8:float32",
    "tcq2/16~in5:float32",
    "nf2+fit/7@0~both3:float32",
    "affine4/6@-1~out:float32",
)


def ramp(*shape: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def shape_for(fmt: BlockFormat, max_side: int = 8) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes that have the axis of a format, empty ones included."""
    least = 0 if fmt.axis is None else fmt.axis + 1 if fmt.axis >= 0 else -fmt.axis
    least_side = int(isinstance(fmt.levels, int))  # no lines: tests/quantized/test_levels.py
    return hnp.array_shapes(min_dims=least, max_dims=3, min_side=least_side, max_side=max_side)


def draw_case(data: Any, xp: Any, dtype: Any = np.float32, **options: Any) -> tuple[np.ndarray, BlockFormat]:
    """Draw an array and a format for it; ``options`` are those of :func:`tests.strategies.formats`."""
    fmt = data.draw(formats(scale_dtypes(xp), **({"axes": AXES} | options)))
    w = normal_numbers(xp, data.draw(weights(dtype, largest_for(fmt), shape_for(fmt))))
    # Signed scales keep the sign of a zero: tests/quantized/test_signed.py and test_affine.py check that.
    return (w if fmt.codebook.normalization == "absmax" else w + dtype(0)), fmt


def levels_of(q: QuantizedArray) -> Iterator[QuantizedArray]:
    """Yield a quantized array and its scales of every depth, outermost first."""
    while isinstance(q.scales, QuantizedArray):
        yield q
        q = q.scales
    yield q


def scales_of(q: QuantizedArray) -> np.ndarray:
    """Return the decoded scales in float32."""
    return host(dequantize(q.scales) if isinstance(q.scales, QuantizedArray) else q.scales).astype(np.float32)


def quantized(xp: Any, w: np.ndarray, fmt: BlockFormat, **options: Any) -> QuantizedArray:
    """Quantize a NumPy array in another library, with its importance converted as well."""
    if options.get("weights") is not None:
        options["weights"] = on(xp, options["weights"])
    return quantize(on(xp, w), fmt, **options)


def restored(q: QuantizedArray) -> np.ndarray:
    return host(dequantize(q))


def lines(array: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the lines that are cut into blocks, as rows."""
    if axis is None:
        return array.reshape(1, -1)
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(-1, moved.shape[-1]) if moved.size else np.empty((0, 1), dtype=array.dtype)


def block_errors(w: np.ndarray, q: QuantizedArray, importance: np.ndarray | None = None) -> list[float]:
    """Return the squared error of each block in float64, computed from the dense arrays alone."""
    squares = (w.astype(np.float64) - restored(q)) ** 2
    if importance is not None:
        squares = squares * np.broadcast_to(importance, w.shape).astype(np.float64)
    size = q.format.block_size
    return [
        float(np.sum(line[start : start + size]))
        for line in lines(squares, q.format.axis)
        for start in range(0, len(line), size)
    ]
