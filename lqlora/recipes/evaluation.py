"""Perplexity of a causal language model, and its divergence from another one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lqlora._progress import reported
from lqlora.errors import InvalidArgumentError
from lqlora.nn import causal_lm_loss
from lqlora.nn.modes import evaluation_mode
from lqlora.recipes.text import check_sequences

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["divergence", "perplexity"]


def divergence(
    model: torch.nn.Module,
    teacher: torch.nn.Module,
    sequences: torch.Tensor,
    *,
    batch_size: int = 2,
    progress: bool | Callable[[int, int], None] = True,
) -> float:
    r"""Return the mean divergence of the predictions of a model from those of another one, such as the model before quantization.

    Parameters
    ----------
    model, teacher : torch.nn.Module
        Called with a batch of ``sequences``; return logits of one shape, or objects that have ``logits``. They are evaluated in
        evaluation mode and returned to their modes afterwards.
    sequences : Tensor of int64, shape (sequences, tokens)
        Token ids, on the device of the models.
    batch_size : int, default 2
        Sequences per forward pass.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts sequences.

    Returns
    -------
    float
        Mean over all positions of :math:`\mathrm{KL}(p \,\Vert\, q)` in nats, at least 0 but for rounding, where :math:`p` is the
        distribution of the next token that the teacher gives, and :math:`q` that of the model.

    Raises
    ------
    InvalidArgumentError
        If there is no sequence, a sequence has fewer than two tokens, or the logits have other shapes.

    Notes
    -----
    It is more sensitive than perplexity, which may stay the same while other tokens become likely.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> divergence(model, model, torch.arange(20).view(2, 10))
    0.0
    """
    check_sequences(sequences)
    found: list[float] = []
    with (
        evaluation_mode(model),
        evaluation_mode(teacher),
        torch.inference_mode(),
        reported(progress, "Divergence", len(sequences), "sequence") as report,
    ):
        for batch in sequences.split(batch_size):
            logits = [getattr(own, "logits", own).float() for own in (model(batch), teacher(batch))]
            if logits[0].shape != logits[1].shape:
                shapes = " and ".join(str(tuple(own.shape)) for own in logits)
                raise InvalidArgumentError(f"model and teacher must give logits of one shape, got {shapes}.")
            own, wanted = (functional.log_softmax(own, -1) for own in logits)
            found += functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1).mean(-1).tolist()
            report(len(found))
    return math.fsum(found) / len(found)


def perplexity(
    model: torch.nn.Module,
    sequences: torch.Tensor,
    *,
    batch_size: int = 2,
    progress: bool | Callable[[int, int], None] = True,
) -> float:
    r"""Return the perplexity of a causal language model on token sequences.

    Perplexity is the exponential of the mean negative log-likelihood per predicted token. The first token of each
    sequence is never predicted, and sequences are independent.

    Parameters
    ----------
    model : torch.nn.Module
        Called with a batch of ``sequences``; returns logits, or an object that has ``logits``. It is evaluated in
        evaluation mode and returned to its mode afterwards.
    sequences : Tensor of int64, shape (sequences, tokens)
        Token ids, on the device of the model: see :func:`token_sequences`.
    batch_size : int, default 2
        Sequences per forward pass. Each pass dequantizes every weight, so larger batches are faster, and take more memory.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts sequences.

    Returns
    -------
    float
        Perplexity, at least 1.0; lower is better. It is infinite or NaN if the model returns such logits.

    Raises
    ------
    InvalidArgumentError
        If there is no sequence, or a sequence has fewer than two tokens.

    Notes
    -----
    With :math:`N` sequences of :math:`T` tokens :math:`x_{nt}`, the result is

    .. math:: \exp\Bigl(-\frac{1}{N (T - 1)} \sum_{n=1}^N \sum_{t=2}^T \log p(x_{nt} \mid x_{n1}, \dots, x_{n,t-1})\Bigr).

    Examples
    --------
    A model that gives the same logit to each of 50 words is as uncertain as a draw among 50:

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> _ = torch.nn.init.zeros_(model[1].weight), torch.nn.init.zeros_(model[1].bias)
    >>> round(perplexity(model, torch.arange(20).view(2, 10)), 3)
    50.0
    """
    check_sequences(sequences)
    losses: list[float] = []
    title = "Perplexity"
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        reported(progress, title, len(sequences), "sequence") as report,
    ):
        for batch in sequences.split(batch_size):
            losses += causal_lm_loss(model, batch).tolist()
            report(len(losses))
    # All sequences have the same length, so the mean over sequences is the mean over predicted tokens. fsum adds without
    # rounding between the terms, so the order of the sequences does not matter.
    try:
        return math.exp(math.fsum(losses) / len(losses))
    except OverflowError:  # a loss above 709
        return math.inf
