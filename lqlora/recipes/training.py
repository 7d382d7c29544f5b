"""Measuring and fine-tuning a causal language model: just enough for the demo."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lqlora.nn import causal_lm_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora.recipes.settings import Settings

__all__ = ["fine_tune", "perplexity"]


def perplexity(model: torch.nn.Module, sequences: torch.Tensor, progress: Callable[[int, int], None]) -> float:
    """Exponential of the mean negative log-likelihood per predicted token."""
    losses: list[float] = []
    model.eval()
    with torch.inference_mode():
        for pair in sequences.split(2):  # each call dequantizes every weight; four sequences take too much memory
            losses += causal_lm_loss(model, pair).tolist()
            progress(len(losses), len(sequences))
    return math.exp(math.fsum(losses) / len(losses))


def fine_tune(
    model: torch.nn.Module, sequences: torch.Tensor, settings: Settings, progress: Callable[[int, int], None]
) -> None:
    """Train whatever requires gradients: AdamW, a learning rate that falls to zero, each sequence once, in order."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.steps)
    for step, batch in enumerate(sequences.split(settings.batch), start=1):
        loss = causal_lm_loss(model, batch).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(step, settings.steps)
    optimizer.zero_grad(set_to_none=True)
