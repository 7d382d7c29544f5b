"""Decomposition: the result of ``decompose``, with its history of errors."""

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
    """Result of :func:`lqlora.decompose`: a quantized matrix, low-rank factors, and the history of errors.

    Parameters
    ----------
    quantized : QuantizedArray of shape (m, n)
        Frozen quantized part.
    lora_A : array of float32, shape (rank, n)
        Right factor.
    lora_B : array of float32, shape (m, rank)
        Left factor.
    scaling : float
        Factor of the product in ``dequantize(quantized) + scaling * lora_B @ lora_A``.
    errors : tuple of float
        Relative weighted errors. Entry 0 is quantization alone (rank 0), entry 1 is quantization with one SVD of its
        residual, and the iterates follow. If a decomposition was continued, entry 0 is its error instead of both. Entry ``best`` is the error of the factors as returned, after refitting and
        quantization.
    best : int
        Index into ``errors`` of the returned iterate.
    stop_reason : {"converged", "max_iter", "target", "time_limit", "rank_zero", "callback"}
        Reason why the alternation ended. ``"rank_zero"`` means that there was no alternation: rank 0 or
        ``init="zero"``.
    squared_error : float
        Weighted squared norm of the residual, not normalized.
    factors : tuple of QuantizedArray, optional
        ``lora_A`` and ``lora_B`` in quantized form, if ``factor_format`` was given. The arrays ``lora_A`` and
        ``lora_B`` are then their decoded values.
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

    def __repr__(self) -> str:
        """Return shape, format, rank and error. The numbers are those of the attributes."""
        own = self.quantized
        return (
            f"Decomposition(shape={own.shape}, format={str(own.format)!r}, rank={self.rank}, relative_error={self.relative_error:.4g}, "
            f"stop_reason={self.stop_reason!r})"
        )

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return int(self.lora_A.shape[0])

    @property
    def relative_error(self) -> float:
        """Weighted norm of the residual divided by the weighted norm of the matrix."""
        return self.errors[self.best]

    @property
    def storage_bits(self) -> int:
        """Exact number of bits of the quantized part and the factors, which take 32 bits an entry unless quantized."""
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
