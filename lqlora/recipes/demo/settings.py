"""Sizes, formats and budgets of the demo. Importing them does not import torch."""

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
    """Sizes, formats and budgets of one run of the demo.

    Parameters
    ----------
    rank : int, default 16
        Rank of the low-rank parts. 16 is 2.8 % of the hidden size of SmolLM2-135M, 576. The rank of 64 in LQ-LoRA's
        paper would be a third of its narrowest side, 192.
    seed : int, default 0
        Seed of every random number.
    length : int, default 256
        Tokens per sequence.
    calibration, evaluation : int
        Number of sequences for Fisher information, and for perplexity.
    steps, batch : int
        Number of fine-tuning steps, and of sequences per step.
    learning_rate : float, default 1e-3
        Learning rate of the first step; it falls linearly to zero.
    formats : tuple of BlockFormat
        Formats of the cost table.
    iterations : int, default 20
        Largest number of iterations of a decomposition.
    budgets : tuple of float or None
        Bits per weight of the plans; None is the exact storage of NF3 for all matrices.
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
        """Return settings that run every stage within a minute or two. Do not compare their figures.

        Parameters
        ----------
        rank, seed, budgets : int, int, tuple of float or None
            Fields of the class.

        Returns
        -------
        Settings
            Short sequences, few formats, three steps and two iterations.
        """
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
