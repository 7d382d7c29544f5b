"""What a decomposition returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from lqlora import ops
from lqlora.quantized import QuantizedArray, dequantize

if TYPE_CHECKING:
    from lqlora._typing import Array

__all__ = ["Decomposition", "StopReason"]

StopReason: TypeAlias = Literal["converged", "max_iter", "target", "time_limit", "rank_zero", "callback"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A quantized matrix and its low-rank factors, with the history of how they were found.

    Parameters
    ----------
    quantized : QuantizedArray of shape (m, n)
        The frozen part.
    lora_A : array of float32, shape (rank, n)
        Right factor.
    lora_B : array of float32, shape (m, rank)
        Left factor.
    scaling : float
        Factor of the product: the matrix is ``dequantize(quantized) + scaling * lora_B @ lora_A``.
    errors : tuple of float
        Relative weighted errors. Entry 0 is quantization alone (rank 0), entry 1 adds one SVD of its residual, then come
        the iterates. The entry of the pair that is returned counts its factors as they are, refitted and quantized.
    best : int
        Index into ``errors`` of the pair that is returned.
    stop_reason : {"converged", "max_iter", "target", "time_limit", "rank_zero", "callback"}
        Why the alternation ended; ``"rank_zero"`` if there was none, as for rank 0 and ``init="zero"``.
    squared_error : float
        Weighted sum of squares of the residual of the returned pair, not divided by anything.
    factors : tuple of QuantizedArray, optional
        ``lora_A`` and ``lora_B`` as they are stored, if a format was given for them; ``lora_A`` and ``lora_B`` are what
        they decode to.
    """

    quantized: QuantizedArray
    lora_A: Array
    lora_B: Array
    scaling: float
    errors: tuple[float, ...]
    best: int
    stop_reason: StopReason
    squared_error: float
    factors: tuple[QuantizedArray, QuantizedArray] | None = None

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return int(self.lora_A.shape[0])

    @property
    def relative_error(self) -> float:
        """Weighted norm of the residual, divided by the weighted norm of the matrix."""
        return self.errors[self.best]

    @property
    def storage_bits(self) -> int:
        """Exact bits of the quantized part and of the factors: as quantized, or 32 for each of their entries."""
        if self.factors is not None:
            return 8 * (self.quantized.nbytes + sum(factor.nbytes for factor in self.factors))
        return 8 * self.quantized.nbytes + 32 * self.rank * sum(self.quantized.shape)

    def reconstruct(self) -> Array:
        """Return the dense approximation.

        Returns
        -------
        array of float32, shape (m, n)
            ``dequantize(quantized) + scaling * lora_B @ lora_A``.
        """
        return dequantize(self.quantized) + ops.low_rank_product(self.lora_B, self.lora_A, self.scaling)
