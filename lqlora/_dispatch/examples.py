"""Protocols of the test problems from which an operation makes its example arguments.

An operation is declared with a function that makes its arguments from one of these: ``@op(examples=...)`` or
``@op(products=...)``. The conformance suite of :mod:`lqlora.testing` draws easy and hard problems, and calls every
override with the arguments. All arrays are NumPy arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BlocksProblem", "ProductProblem", "Tables"]


class Tables(Protocol):
    """Levels and boundaries of a codebook."""

    @property
    def levels(self) -> npt.NDArray[np.float32]:
        """Sorted levels, read-only."""

    @property
    def boundaries(self) -> npt.NDArray[np.float32]:
        """Boundaries between the levels, read-only."""

    def __len__(self) -> int:
        """Return the number of levels."""


class BlocksProblem(Protocol):
    """Weights in blocks, with scales, codes and a codebook."""

    @property
    def seed(self) -> int:
        """Seed of the random numbers that an example draws itself."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def block_size(self) -> int:
        """Weights per scale."""

    @property
    def count(self) -> int:
        """Number of weights."""

    @property
    def weights(self) -> npt.NDArray[Any]:
        """Weights of float16, bfloat16, float32 or float64, shape (count,)."""

    @property
    def wide(self) -> npt.NDArray[Any]:
        """The weights in float32, or in float64 if that is their dtype."""

    @property
    def normalized(self) -> npt.NDArray[Any]:
        """Weights in float32 or float64, divided by their scales. Quotients may be infinite, but not NaN."""

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """One scale a block."""

    @property
    def zeros(self) -> npt.NDArray[np.uint8] | None:
        """One zero point a block, or None."""

    @property
    def codebook(self) -> Tables:
        """The codebook."""

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """Codes below the number of levels, shape (count,)."""

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The codes as dense bytes."""

    def rows(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the whole blocks of a flat array as rows."""

    def target(self) -> npt.NDArray[Any]:
        """Return an array of any contents that decoded weights are written to."""


class ProductProblem(Protocol):
    """Rows of inputs, a quantized matrix, and low-rank factors."""

    @property
    def x(self) -> npt.NDArray[Any]:
        """Rows of inputs, shape (batch, columns)."""

    @property
    def y(self) -> npt.NDArray[Any]:
        """Rows of outputs, shape (batch, rows)."""

    @property
    def lora_A(self) -> npt.NDArray[Any]:
        """Right factor, shape (rank, columns)."""

    @property
    def lora_B(self) -> npt.NDArray[Any]:
        """Left factor, shape (rows, rank)."""

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """Packed codes of the matrix, shape (rows, columns) before packing."""

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """One scale a block."""

    @property
    def zeros(self) -> npt.NDArray[np.uint8] | None:
        """One zero point a block, or None."""

    @property
    def codebook(self) -> Tables:
        """The codebook."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def block_size(self) -> int:
        """Weights per scale."""
