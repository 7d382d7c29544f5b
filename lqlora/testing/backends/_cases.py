"""Test problems that example arguments of operations are made from. A few small numbers define each problem.

A finding prints these numbers, which are enough to repeat the failing call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from lqlora import ops
from lqlora.codebooks import Codebook, affine, normal_float, uniform

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Blocks", "Product"]

#: NumPy's dtypes of weights, and the unsigned integers of the same width.
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}

#: Unusual scales: both zeros, a negative scale, the smallest and largest subnormals, the smallest normal, a huge one.
_SCALES = (0.0, -0.0, -1.5, 1e-45, 1.1754942e-38, 1.1754944e-38, 3e38, 1.0)

Values = Literal["noise", "boundaries", "special", "non-finite", "midpoints"]


@dataclass(frozen=True)
class Blocks:
    """A quantization problem, from which the arguments of most operations are made.

    ``values`` names the hard part of the problem. "boundaries": weights are boundaries between levels times the scale,
    or next to such a product. "special": weights and scales are zeros, subnormals and the largest numbers.
    "non-finite": some weights are NaN or infinite. "midpoints": levels times scales are midway between two numbers of
    16 bits.
    """

    seed: int
    dtype: str = "float32"
    bits: int = 4
    block_size: int = 64
    count: int = 128
    values: Values = "noise"
    zero_points: bool = False
    any_levels: bool = False
    unused_bits: bool = False

    def arguments(self, operation: str) -> tuple[Any, ...]:
        """Return the flat arguments of an operation of :mod:`lqlora.ops`, as arrays of NumPy."""
        known = getattr(ops, operation)
        arguments: tuple[Any, ...] = known.arguments.flatten(known.examples(self))
        return arguments

    def rows(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the whole blocks of a flat array as rows."""
        columns = max(1, min(self.block_size, self.count))
        rows = self.count // columns
        return values[: rows * columns].reshape(rows, columns)

    def target(self) -> npt.NDArray[Any]:
        """Return an array for decoded weights, of the dtype of the weights; float32 for float64."""
        return np.full(self.count, 7, dtype=DTYPES["float32" if self.dtype == "float64" else self.dtype])

    @cached_property
    def codebook(self) -> Codebook:
        """An affine codebook, random levels, or NormalFloat."""
        if self.zero_points:
            return affine(self.bits)
        if self.any_levels:
            rng = np.random.default_rng(self.seed)
            levels = rng.standard_normal(rng.integers(2, 2**self.bits, endpoint=True)).astype(np.float32)
            return Codebook(np.unique(levels))
        return normal_float(self.bits) if self.bits > 1 else uniform(1, signed=False)

    @cached_property
    def _blocks(self) -> int:
        return -(-self.count // self.block_size)

    @cached_property
    def _block_of(self) -> npt.NDArray[np.int64]:
        return np.arange(self.count) // self.block_size

    @cached_property
    def zeros(self) -> npt.NDArray[np.uint8] | None:
        """Zero points, if the problem has them."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, 2**self.bits, self._blocks).astype(np.uint8) if self.zero_points else None

    @cached_property
    def codes(self) -> npt.NDArray[np.uint8]:
        """Random codes below the number of levels."""
        return np.random.default_rng(self.seed).integers(0, len(self.codebook), self.count).astype(np.uint8)

    @cached_property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The codes as dense bytes, packed by the definition: a stream of bits, least significant bit first."""
        stream = (self.codes[:, None] >> np.arange(self.bits, dtype=np.uint8) & 1).reshape(-1)
        packed = np.packbits(stream, bitorder="little")
        if self.unused_bits and stream.size % 8:
            packed[-1] |= 255 << stream.size % 8 & 255
        return packed

    @cached_property
    def scales(self) -> npt.NDArray[np.float32]:
        """Scales of float32. They are not absolute maxima: some weights are above their scale."""
        rng = np.random.default_rng(self.seed + 1)
        if self.values == "midpoints":
            return self._midpoint_scales(rng)
        if self.values == "special":
            return rng.choice(np.array(_SCALES, dtype=np.float32), self._blocks)
        reach = 4 if self.dtype == "float16" else 20
        scales = rng.uniform(1, 2, self._blocks) * 2.0 ** rng.integers(-reach, reach, self._blocks)
        return scales.astype(np.float32)

    def _midpoint_scales(self, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return scales whose product with the first level of their block is midway, after rounding to float32."""
        mantissa = rng.integers(0, 2**10, self._blocks).astype(np.uint32)
        exponent = rng.integers(120, 136, self._blocks).astype(np.uint32)
        # A float32 whose first dropped bit is one, and whose other dropped bits are zero, is midway between two numbers
        # of 16 bits. bfloat16 drops 16 bits, and float16 drops 13 bits of the mantissa.
        half, shift = (0x8000, 16) if self.dtype == "bfloat16" else (0x1000, 13)
        middle = (exponent << 23 | mantissa << shift & 0x7FFFFF | half).view(np.float32)
        levels = self.codebook.levels[self.codes[:: self.block_size]].astype(np.float64)
        return (middle / np.where(levels == 0, 1, levels)).astype(np.float32)

    @cached_property
    def weights(self) -> npt.NDArray[Any]:
        """Weights of the dtype."""
        rng = np.random.default_rng(self.seed + 2)
        dtype, scales = DTYPES[self.dtype], self.scales[self._block_of]
        if self.values == "boundaries":
            return self._near_boundaries(rng)
        largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        weights = np.clip(rng.standard_normal(self.count) / 2 * scales, -largest, largest).astype(dtype)
        weights[rng.random(self.count) < 0.1] = 0
        if self.values in ("special", "non-finite"):
            chosen = rng.random(self.count) < 0.3
            weights[chosen] = rng.choice(self._hard_values, self.count)[chosen]
        return weights

    @cached_property
    def wide(self) -> npt.NDArray[Any]:
        """The weights in float32, or float64."""
        return self.weights.astype(np.promote_types(self.weights.dtype, np.float32))

    def _near_boundaries(self, rng: np.random.Generator) -> npt.NDArray[Any]:
        zeros = 0 if self.zeros is None else self.zeros[self._block_of].astype(np.float64)
        normalized = rng.choice(self.codebook.boundaries, self.count).astype(np.float64) - zeros
        weights = (normalized * self.scales[self._block_of]).astype(DTYPES[self.dtype])
        bits = weights.view(_UNSIGNED[weights.dtype.itemsize])
        nudged = (bits + rng.integers(-2, 3, self.count).astype(bits.dtype)).view(weights.dtype)
        # A step between subnormal numbers is large in relation to them, so small weights stay where they are.
        return np.where(np.abs(weights) < 2.0**-13, weights, nudged)

    @cached_property
    def _hard_values(self) -> npt.NDArray[Any]:
        dtype = DTYPES[self.dtype]
        if self.values == "non-finite":
            return np.array([np.nan, np.inf, -np.inf], dtype=dtype)
        ends: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        sizes = [0, float(ends.smallest_subnormal), float(ends.smallest_normal), float(ends.max), 1]
        return np.array([*sizes, *(-size for size in sizes)], dtype=dtype)

    @cached_property
    def normalized(self) -> npt.NDArray[Any]:
        """The weights divided by their scales; infinite quotients stay, NaN becomes zero."""
        with np.errstate(all="ignore"):
            values = self.wide / self.scales.astype(self.wide.dtype)[self._block_of]
        return np.where(np.isnan(values), 0, values).astype(values.dtype)


@dataclass(frozen=True)
class Product:
    """Rows of inputs with a quantized matrix, and with low-rank factors.

    If ``exact``, all numbers are small integers or powers of two, so that sums in any order are exact in float32.
    """

    seed: int
    dtype: str = "float32"
    bits: int = 4
    block_size: int = 64
    rows: int = 3
    columns: int = 64
    batch: int = 2
    zero_points: bool = False
    exact: bool = True

    def arguments(self, operation: str) -> tuple[Any, ...]:
        """Return the flat arguments of an operation of :mod:`lqlora.ops`, as arrays of NumPy."""
        known = getattr(ops, operation)
        arguments: tuple[Any, ...] = known.arguments.flatten(known.products(self))
        return arguments

    @property
    def x(self) -> npt.NDArray[Any]:
        """Rows of inputs."""
        return self._factor(0, self.batch, self.columns)

    @property
    def y(self) -> npt.NDArray[Any]:
        """Rows of outputs, which a product may overwrite."""
        return self._factor(1, self.batch, self.rows)

    @property
    def lora_A(self) -> npt.NDArray[Any]:
        """Right factor."""
        return self._factor(2, 3, self.columns)

    @property
    def lora_B(self) -> npt.NDArray[Any]:
        """Left factor."""
        return self._factor(3, self.rows, 3)

    def _factor(self, stream: int, *shape: int) -> npt.NDArray[Any]:
        rng = np.random.default_rng((self.seed, stream))
        factor = rng.integers(-1, 2, shape) if self.exact else rng.standard_normal(shape)
        return factor.astype(DTYPES[self.dtype])

    @cached_property
    def stored(self) -> Blocks:
        """The matrix as a quantization problem; its levels are integers if products are exact."""
        integers = self.exact or self.zero_points
        return Blocks(self.seed, "float32", self.bits, self.block_size, self.rows * self.columns, zero_points=integers)

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """Packed codes of the matrix."""
        return self.stored.packed

    @property
    def codebook(self) -> Codebook:
        """Codebook of the matrix."""
        return self.stored.codebook

    @property
    def zeros(self) -> npt.NDArray[np.uint8] | None:
        """Zero points of the matrix."""
        return self.stored.zeros if self.zero_points else None

    @cached_property
    def scales(self) -> npt.NDArray[np.float32]:
        """Powers of two if products are exact, else numbers near one."""
        small = self.stored.scales < 1
        scales = np.where(small, 0.5, 2.0) if self.exact else np.where(small, 0.7, 1.3)
        return scales.astype(np.float32)

    def truth(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the product in float64, and the product of absolute values, which bounds the rounding errors."""
        stored = self.stored
        block = np.arange(stored.count) // self.block_size
        values = self.codebook.levels[stored.codes]
        if self.zeros is not None:
            values = values - self.zeros[block]
        values = values * self.scales[block]
        w = values.astype(np.float64).reshape(self.rows, self.columns)
        x = self.x.astype(np.float64)
        return x @ w.T, np.abs(x) @ np.abs(w).T
