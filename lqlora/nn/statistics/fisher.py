"""Diagonal empirical Fisher information of linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lqlora.errors import InvalidArgumentError
from lqlora.nn.model import select_linears
from lqlora.nn.statistics.hooks import checked_losses, connected, frozen, hooked, input_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from lqlora._patterns import Patterns

__all__ = ["causal_lm_loss", "collect_fisher"]


def causal_lm_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, for each sequence of a batch.

    Parameters
    ----------
    model : torch.nn.Module
        Called with ``batch``; returns logits, or an object that has ``logits``, of shape (examples, tokens, words).
    batch : Tensor of int64, shape (examples, tokens)
        Token numbers.

    Returns
    -------
    Tensor of float32, shape (examples,)
        Losses in nats per token.
    """
    output = model(batch)
    logits = getattr(output, "logits", output)[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(batch.shape[0], -1).mean(dim=1)


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] = causal_lm_loss,
    include: Patterns = "*",
    exclude: Patterns = ("lm_head", "*.lm_head"),
    progress: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Average the squared gradients of single examples.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; its gradients, flags and mode are as before afterwards.
    batches : iterable
        What ``loss`` takes. Layers must see the examples of a batch along their first axis.
    loss : callable, default :func:`causal_lm_loss`
        ``loss(model, batch)`` returns one loss per example, shape (examples,).
    include, exclude : patterns
        See :func:`select_linears`.
    progress : callable, optional
        Called after each batch with the number of examples so far.

    Returns
    -------
    dict of str to Tensor of float32, shape (out_features, in_features)
        ``mean over examples of (d loss / d weight) ** 2``, on the device of the weight.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, no layer matches, or a loss is not one number per example.
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    The square of a sum over a batch is not the sum of squares over its examples. The gradient of each example is formed
    from the layer's input and the gradient at its output, so batches may be larger than one; a layer used several times
    in one pass has its contributions added before they are squared. Weights get no ``.grad``.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.2 (diagonal of the empirical Fisher information matrix).
    """
    linears = select_linears(model, include, exclude)
    fisher = {name: torch.zeros_like(module.weight, dtype=torch.float32) for name, module in linears.items()}
    recorders = {name: _Recorder(name, total) for name, total in fisher.items()}
    examples = 0
    with frozen(model), hooked(linears, recorders), torch.enable_grad():
        for batch in batches:
            losses = checked_losses(loss(model, batch), examples)
            for recorder in recorders.values():
                recorder.examples = losses.shape[0]
            losses.sum().backward()
            for recorder in recorders.values():
                recorder.finish()
            examples += losses.shape[0]
            if progress is not None:
                progress(examples)
    if examples == 0:
        raise InvalidArgumentError("Fisher information needs at least one batch.")
    return {name: values.div_(examples) for name, values in fisher.items()}


class _Recorder:
    """Forward hook of one layer, which adds the squared gradient of each example to a total.

    A layer that is used once in a forward pass is done with as soon as the gradient at its output is known. One that is
    used several times waits for the end of the backward pass: not every result need have reached the loss.
    """

    def __init__(self, name: str, total: torch.Tensor) -> None:
        self._name, self._total = name, total
        self.examples = 0
        self._uses = 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = input_of(args, kwargs).detach()
        version = x._version  # noqa: SLF001 - torch has no public name for it
        output = connected(output)
        self._uses += 1

        def see(gradient: torch.Tensor) -> None:
            if x._version != version:  # noqa: SLF001
                raise InvalidArgumentError(f"The input of {self._name!r} is changed in place after the layer saw it.")
            self._seen.append((x, gradient.detach()))
            if self._uses == 1:
                self._add()

        output.register_hook(see)
        return output

    def finish(self) -> None:
        """Add what is left, and get ready for the next batch."""
        if self._seen:
            self._add()
        self._uses = 0

    def _add(self) -> None:
        seen, self._seen = self._seen, []
        lengths = {inputs.shape[0] for inputs, _ in seen}
        if lengths != {self.examples}:
            raise InvalidArgumentError(
                f"The first axis of what {self._name!r} sees has length {max(lengths)}, not one entry for each of the "
                f"{self.examples} examples: exclude the layer, or do not merge the axes of examples and tokens."
            )
        for example in range(self.examples):
            parts = [_one_gradient(inputs[example], grad[example]) for inputs, grad in seen]
            gradient_of_weight = torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
            self._total.addcmul_(gradient_of_weight, gradient_of_weight)


def _one_gradient(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of one example in float32, whatever the precision of a surrounding autocast."""
    with torch.autocast(x.device.type, enabled=False):
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        return rows.T @ x.reshape(-1, x.shape[-1]).float()
