"""Fine-tuning loop for the low-rank factors of a causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lqlora._progress import reported
from lqlora.errors import InvalidArgumentError
from lqlora.nn import causal_lm_loss
from lqlora.recipes.text import check_sequences

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["fine_tune"]


def fine_tune(
    model: torch.nn.Module,
    sequences: torch.Tensor,
    *,
    learning_rate: float = 1e-3,
    batch_size: int = 1,
    progress: bool | Callable[[int, int], None] = True,
) -> list[float]:
    """Train every parameter that requires a gradient, on each sequence once, in the order given.

    The optimizer is AdamW without weight decay. The learning rate falls linearly to zero, and gradients are clipped to
    a total norm of 1. After :func:`lqlora.nn.quantize_model` only the low-rank factors require gradients. For long
    runs use a trainer of your own: this loop has no checkpoints, no mixed precision and no evaluation.

    Parameters
    ----------
    model : torch.nn.Module
        Called with a batch of ``sequences``; returns logits, or an object that has ``logits``. Trained in place, in
        the mode it is in.
    sequences : Tensor of int64, shape (sequences, tokens)
        Token ids, on the device of the model: see :func:`token_sequences`.
    learning_rate : float, default 1e-3
        Learning rate of the first step.
    batch_size : int, default 1
        Sequences per step.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts steps.

    Returns
    -------
    list of float
        Loss of each step before its update, in nats per token.

    Raises
    ------
    InvalidArgumentError
        If no parameter requires a gradient, there is no sequence, or a sequence has fewer than two tokens.

    References
    ----------
    AdamW: Loshchilov and Hutter, arXiv 1711.05101.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> losses = fine_tune(model, torch.arange(10).repeat(30, 1), learning_rate=0.1)
    >>> len(losses), losses[-1] < losses[0] / 10
    (30, True)
    """
    check_sequences(sequences)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InvalidArgumentError(
            "model must have a parameter that requires a gradient, got none. Call lqlora.nn.quantize_model first."
        )
    batches = sequences.split(batch_size)
    # Weight decay would pull the product of the factors toward zero, that is, the layer toward the quantized weight alone.
    # Step k of n (from 0) has the rate learning_rate * (1 - k / n): the last one is small, but not zero.
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    losses: list[float] = []
    with reported(progress, "Fine-tuning", len(batches), "step") as report:
        for batch in batches:
            # The mean over sequences, not the sum, keeps the size of gradients, and so the clipping, independent of the batch
            # size. In a last batch that is shorter each sequence counts more.
            loss = causal_lm_loss(model, batch).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(len(losses))
    optimizer.zero_grad(set_to_none=True)  # frees the gradients
    return losses
