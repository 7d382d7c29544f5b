"""Losses of single examples: the next token of a language model, or the loss that a model computes from its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.statistics.batches import has_targets, parts_of, run_model
from lqlora.nn.statistics.gradients import send_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import nn

    from lqlora.nn.statistics.gradients import OutputGradients

__all__ = ["causal_lm_loss", "losses_of", "send_batch"]


def causal_lm_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean negative log-likelihood of the next token, for each sequence of a batch.

    Parameters
    ----------
    model : torch.nn.Module
        Called with ``batch``. It returns logits of shape (examples, tokens, vocabulary), or an object with the attribute
        ``logits``.
    batch : Tensor of int64, shape (examples, tokens), or mapping
        Token ids, or keyword arguments of the model with ``input_ids`` and perhaps ``attention_mask``. Where the mask is 0,
        tokens neither predict nor are predicted. Labels are not used.

    Returns
    -------
    Tensor of float32, shape (examples,)
        Losses in nats per token.

    Raises
    ------
    InvalidArgumentError
        If the batch has no matrix of token ids, if an example has no token with a next one, or if the logits have another
        shape.
    """
    arguments, mask, kind = batch, None, type(batch).__name__
    if isinstance(batch, Mapping):
        arguments = {name: value for name, value in batch.items() if name != "labels"}
        batch, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(batch, torch.Tensor) or batch.ndim != 2 or batch.shape[1] < 2:
        seen = f"shape {tuple(batch.shape)}" if isinstance(batch, torch.Tensor) else f"{kind} without one"
        raise InvalidArgumentError(
            f"batch must be a tensor of shape (examples, tokens) with at least two tokens, or hold one as input_ids, got {seen}. "
            "Pass batches with labels to use the model's own loss, or loss=."
        )
    counts = torch.ones_like(batch[:, 1:], dtype=torch.float32)
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != batch.shape:
            seen = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise InvalidArgumentError(
                f"attention_mask must have the shape {tuple(batch.shape)} of input_ids, got {seen}."
            )
        counts = ((mask[:, 1:] != 0) & (mask[:, :-1] != 0)).float()
        if not bool((has_next := counts.any(dim=1)).all()):
            example = int((~has_next).nonzero()[0, 0])
            raise InvalidArgumentError(
                f"attention_mask must keep a token and the next one of each example, but not so for example {example} of a "
                "batch. Leave the example out."
            )
    output = run_model(model, arguments)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.shape[:2] != batch.shape:
        seen = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InvalidArgumentError(
            f"model must return logits of shape (examples, tokens, vocabulary) for tokens of shape {tuple(batch.shape)}, got "
            f"{seen}. Pass batches with labels to use the model's own loss, or loss=."
        )
    predictions = logits[:, :-1].float().flatten(0, 1)
    losses = functional.cross_entropy(predictions, batch[:, 1:].flatten(), reduction="none").view(batch.shape[0], -1)
    return losses.mean(dim=1) if mask is None else (losses * counts).sum(dim=1) / counts.sum(dim=1)


def send_batch(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None,
    layers: Collection[OutputGradients],
    done: int,
) -> int:
    """Run a model on a batch, and hand the gradients of its single losses to the hooks of layers.

    Parameters
    ----------
    model : torch.nn.Module
        Model with the hooks.
    batch : mapping or object
        Batch. Padding is cut from a mapping.
    loss : callable, optional
        ``loss(model, part)`` returns one loss per example. Without it, the model's own loss is used if the batch has labels,
        for one example at a time because it is one number, and :func:`causal_lm_loss` otherwise.
    layers : collection of OutputGradients
        The hooks.
    done : int
        Number of examples before this batch. Errors use it.

    Returns
    -------
    int
        Number of examples of the batch.
    """
    count = 0
    for part in parts_of(model, batch, one_by_one=loss is None and has_targets(batch)):
        # No name holds the losses, so that their graph is gone when the next part runs.
        count += send_gradients(losses_of(model, part, loss, done + count), layers)
    return count


def losses_of(
    model: nn.Module, part: Any, loss: Callable[[nn.Module, Any], torch.Tensor] | None, done: int
) -> torch.Tensor:
    """Return the losses of the examples of a part of a batch.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    part : mapping or object
        Part of a batch. With labels, and without ``loss``, it has one example.
    loss : callable, optional
        See :func:`send_batch`.
    done : int
        Number of examples before this part. Errors use it.

    Returns
    -------
    Tensor, shape (examples,)
        Finite losses.
    """
    compute = _own_loss if loss is None and has_targets(part) else loss or causal_lm_loss
    return _checked(compute(model, part), done)


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that a model computes from the labels of one example, shape (1,)."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        seen = f"one of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else "none"
        raise InvalidArgumentError(
            f"model must return an output with one number as its loss for batches with labels, got {seen} in "
            f"{type(output).__name__}. Pass loss=."
        )
    return loss.reshape(1)


def _checked(losses: torch.Tensor, done: int) -> torch.Tensor:
    """Return the losses of a batch, unless they are not one finite number per example."""
    if not isinstance(losses, torch.Tensor) or losses.ndim != 1:
        seen = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise InvalidArgumentError(
            f"loss must return one number per example, shape (examples,), got {seen}. Average over the tokens of each "
            "example, not over examples."
        )
    if not bool((finite := torch.isfinite(losses)).all()):
        first = int((~finite).nonzero()[0, 0])
        raise NonFiniteError(
            f"loss must be finite, got {losses[first].item()} for example {done + first}, counted from 0 over all batches. "
            "Leave out examples without a token to predict, or compute in a wider dtype."
        )
    return losses
