"""How much the demo does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Self

from lqlora.codebooks import normal_float
from lqlora.formats import BlockFormat, ScaleFormat

__all__ = ["NF3", "NF4", "Settings"]

NF3 = BlockFormat.parse("nf3/64:u8/256:float32")
NF4 = BlockFormat.parse("nf4/64:u8/256:float32")


def _grid(bits: tuple[int, ...], blocks: tuple[int, ...], scale_bits: tuple[int, ...]) -> tuple[BlockFormat, ...]:
    scales = {8: ScaleFormat(8, 256, "float16"), 4: ScaleFormat(4, 64, "float16")}
    return tuple(BlockFormat(normal_float(b), size, scales[s]) for b, size, s in product(bits, blocks, scale_bits))


@dataclass(frozen=True)
class Settings:
    """Sizes of the parts of the demo.

    Parameters
    ----------
    rank : int
        Rank of the low-rank parts. 16 of 576 is 2.8 %; LQ-LoRA's 64 would be a third of the narrowest matrices here.
    seed : int
        Of everything random.
    length : int
        Tokens per sequence.
    calibration, evaluation : int
        Sequences for Fisher information and for perplexity.
    steps, batch : int
        Fine-tuning steps, and sequences per step.
    learning_rate : float
        Of AdamW, falling linearly to zero.
    formats : tuple of BlockFormat
        Choices of the cost table.
    iterations : int
        Largest number of alternations of a decomposition.
    budgets : tuple of float or None
        Bits per weight of the plans; None is the exact storage of uniform NF3.
    """

    rank: int = 16
    seed: int = 0
    length: int = 256
    calibration: int = 24
    evaluation: int = 16
    steps: int = 24
    batch: int = 1
    learning_rate: float = 1e-3
    formats: tuple[BlockFormat, ...] = _grid((2, 3, 4, 6), (16, 32, 64), (4, 8))
    iterations: int = 20
    budgets: tuple[float | None, ...] = (None, 2.75)

    @classmethod
    def fast(cls, rank: int, seed: int, budgets: tuple[float | None, ...]) -> Self:
        """Return sizes that show every stage in a minute or two, and prove nothing."""
        return cls(
            rank=rank,
            seed=seed,
            length=64,
            calibration=4,
            evaluation=4,
            steps=3,
            formats=_grid((2, 3, 4), (32, 64), (8,)),
            iterations=2,
            budgets=budgets,
        )
