"""Quantizer under test: the two functions, the options of the caller, and round trips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lqlora import ops
from lqlora._dispatch import array_library
from lqlora.testing._verdicts import AdapterError, NotApplicableError, RefusedError, ViolationError, named

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Wide = npt.NDArray[np.float64]

__all__ = ["Subject", "as_row", "on_host"]


@dataclass(frozen=True)
class Subject:
    """A quantizer with the options of :func:`lqlora.testing.check_quantizer`, under the same names.

    ``has_signed_scales`` is true for levels of a codebook whose scales have the sign of the largest weight.
    """

    quantize: Callable[[Any], Any]
    dequantize: Callable[[Any], Any]
    adapt: Callable[[npt.NDArray[Any]], Any] | None
    block_size: int | None
    size_multiple: int
    levels: Wide | None
    has_signed_scales: bool
    ties_to: Literal["lower", "upper"] | None
    symmetric: bool
    independent_blocks: bool
    tolerance: float
    scale_tolerance: float
    smallest: float
    largest: float

    @property
    def unit(self) -> int:
        """Smallest even number of weights that fills whole blocks and that the quantizer accepts."""
        # Even, so that quantizers that pack two codes in a byte meet an odd number in the properties about it only.
        return lcm(self.block_size or 1, self.size_multiple, 2)

    @cached_property
    def normalized(self) -> Wide:
        """Levels divided by the largest absolute level."""
        if self.levels is None:
            raise NotApplicableError("needs levels")
        scaled: Wide = self.levels / np.abs(self.levels).max()
        return scaled

    @cached_property
    def boundaries(self) -> Wide:
        """Midpoints of neighboring levels, computed from the levels in float32."""
        levels = self.normalized.astype(np.float32).astype(np.float64)
        midpoints: Wide = (levels[1:] + levels[:-1]) / 2
        return midpoints

    @cached_property
    def radius(self) -> float:
        """Largest distance of a number in [-1, 1] from the nearest normalized level."""
        # Half the widest gap between levels, or the distance of an end of the interval from the outermost level.
        levels = self.normalized
        return float(max(np.diff(levels).max() / 2, levels[0] + 1, 1 - levels[-1]))

    def adapted(self, w: npt.NDArray[Any]) -> Any:
        """Return the array in the form that the quantizer takes."""
        try:
            return w if self.adapt is None else self.adapt(w)
        except Exception as error:
            raise AdapterError(f"adapt() raised {named(error)}") from error

    def run(self, taken: Any) -> Wide:
        """Quantize and dequantize, and return the exact result as float64."""
        try:
            return np.array(on_host(self.dequantize(self.quantize(taken))), dtype=np.float64)
        except Exception as error:
            raise RefusedError(f"the quantizer raised {named(error)}") from error

    def round_trip(self, w: npt.NDArray[Any]) -> Wide:
        """Quantize and dequantize a row-major copy of the array."""
        return self.run(self.adapted(np.array(w, order="C")))

    def flat(self, w: npt.NDArray[Any]) -> Wide:
        """Return :meth:`round_trip` as one row, because only one property is about the shape."""
        return as_row(self.round_trip(w), w.size)

    def blocks(self, size: int) -> list[slice]:
        """Return the slices of the blocks; a single one if the block size is not known."""
        step = self.block_size or max(1, size)
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def absmax(self, w: npt.NDArray[Any]) -> Wide:
        """Return the absmax of the block of each weight."""
        size = np.abs(w.astype(np.float64).reshape(-1))
        return np.concatenate([np.full(size[block].size, size[block].max()) for block in self.blocks(size.size)])

    def allowed_error(self, w: npt.NDArray[Any], rounding: float = 0.0) -> Wide:
        """Return the largest allowed error of each weight."""
        # Let a be the absmax. With scale a, w / a is in [-1, 1], and its nearest level l is within the radius:
        # |w - a l| <= radius * a. Rounding the scale to a + d adds at most |d|, because |l| <= 1. Independent blocks
        # round their own scale; otherwise d is relative to the largest scale of the array.
        absmax = self.absmax(w)
        radius = 1.0 if self.levels is None else self.radius
        of_scale = absmax if self.independent_blocks else np.full(absmax.shape, absmax.max())
        return (radius + self.tolerance + rounding) * absmax + self.scale_tolerance * of_scale


def on_host(array: Any) -> npt.NDArray[Any]:
    """Return an array of any library as a NumPy array."""
    return np.asarray(ops.convert(array, np) if array_library(array) else array)


def as_row(out: Wide, size: int) -> Wide:
    """Return the entries in logical order, and raise if there are not as many as weights."""
    if out.size != size:
        raise ViolationError(f"{size} weights gave {out.size} results")
    return out.reshape(-1)
