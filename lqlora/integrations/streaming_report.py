"""Report of a checkpoint that was written matrix by matrix, or of a dry run."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lqlora._printable import printable

if TYPE_CHECKING:
    from lqlora.formats import BlockFormat
    from lqlora.integrations.contents import LeftOut

__all__ = ["CheckpointReport", "StreamedMatrix"]

#: Names of tensors that are listed for each dtype or reason.
_MOST_NAMES = 3


@dataclass(frozen=True)
class StreamedMatrix:
    """Numbers of one matrix of a checkpoint.

    Parameters
    ----------
    format : BlockFormat
        Format of the quantized part.
    shape : tuple of int
        Shape (outputs, inputs).
    rank : int
        Rank of the low-rank part.
    clipped_from : int, optional
        Rank that was asked for, if it exceeds the smaller side of the matrix.
    nbytes : int
        Bytes of the quantized part, scales and padding included.
    factor_bytes : int
        Bytes of the low-rank factors.
    relative_error : float, optional
        Relative weighted error of what is stored; None in a dry run.
    """

    format: BlockFormat
    shape: tuple[int, int]
    rank: int
    clipped_from: int | None
    nbytes: int
    factor_bytes: int
    relative_error: float | None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CheckpointReport:
    """Numbers of a checkpoint of :func:`lqlora.decompose_checkpoint`. Printing it sums them up.

    Parameters
    ----------
    matrices : dict of str to StreamedMatrix
        Decomposed matrices by name.
    copied : dict of str to int
        Bytes of each tensor that is copied as it is.
    left_out : dict of str to LeftOut
        Tensors of the source files that are not in the checkpoint, with the reasons.
    source_bytes : int
        Bytes of the tensors of the model in the source.
    files : dict of str to int
        Bytes of each file with tensors; in a dry run without the header of the file.
    seconds : float, optional
        Estimated time of a dry run.
    memory_bytes : int, optional
        Estimated memory of a dry run.
    """

    matrices: dict[str, StreamedMatrix]
    copied: dict[str, int]
    left_out: dict[str, LeftOut]
    source_bytes: int
    files: dict[str, int]
    seconds: float | None = None
    memory_bytes: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the decomposed matrices, scales and padding included. Factors and copied tensors are not counted.

        It is NaN if the matrices are empty.
        """
        size = sum(own.size for own in self.matrices.values())
        return 8 * sum(own.nbytes for own in self.matrices.values()) / size if size else math.nan

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors: quantized parts, factors, and copies."""
        matrices = self.matrices.values()
        return sum(own.nbytes + own.factor_bytes for own in matrices) + sum(self.copied.values())

    def __str__(self) -> str:
        matrices = self.matrices.values()
        formats = Counter(str(own.format) for own in matrices)
        ranks = Counter(own.rank for own in matrices)
        quantized, factors = sum(own.nbytes for own in matrices), sum(own.factor_bytes for own in matrices)
        lines = [
            (
                f"{len(matrices)} matrices of {sum(own.size for own in matrices):,} weights: {_megabytes(quantized)}, "
                f"{self.bits_per_weight:.3f} bits per weight; factors {_megabytes(factors)}"
            ),
            f"formats: {_counts(formats)}; ranks: {_counts(ranks)}",
        ]
        if clipped := [name for name, own in self.matrices.items() if own.clipped_from is not None]:
            lines.append(f"clipped ranks: {_names(clipped)}")
        errors = {name: own.relative_error for name, own in self.matrices.items() if own.relative_error is not None}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            lines.append(
                f"relative error: median {statistics.median(errors.values()):.4f}, largest {errors[worst]:.4f} ({printable(worst)})"
            )
        if self.copied:
            lines.append(
                f"{_number(len(self.copied), 'tensor')} copied: {_megabytes(sum(self.copied.values()))} ({_names([*self.copied])})"
            )
        if self.left_out:
            size = sum(own.nbytes for own in self.left_out.values())
            lines.append(
                f"{_number(len(self.left_out), 'tensor')} left out: {_megabytes(size)} ({_names([*self.left_out])})"
            )
        lines.append(
            f"total: {_megabytes(self.total_bytes)} in {_number(len(self.files), 'file')}, from {_megabytes(self.source_bytes)}"
        )
        if self.seconds is not None and self.memory_bytes is not None:
            lines.append(f"estimated: {_duration(self.seconds)}, {_megabytes(self.memory_bytes)} of memory")
        return "\n".join(lines)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else _number(nbytes, "byte")


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _counts(found: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{own} ({count})" for own, count in found.most_common())


def _names(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_MOST_NAMES])) + (", …" if len(names) > _MOST_NAMES else "")
