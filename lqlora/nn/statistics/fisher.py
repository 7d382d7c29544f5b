"""Diagonal of the empirical Fisher information of linear layers, from the gradients of single examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lqlora._annotations import annotated
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.selection import LinearMaps
from lqlora.nn.statistics.gradients import OutputGradients
from lqlora.nn.statistics.hooks import (
    SMALLEST,
    living_layers,
    require_no_overflow,
    run_batches,
    sum_outer_products,
    warn_of_underflow,
)
from lqlora.nn.statistics.losses import send_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from lqlora._patterns import Patterns
    from lqlora.nn.statistics.gradients import Gradients

__all__ = ["collect_fisher"]


@annotated
@torch.inference_mode(mode=False)  # tensors of inference mode have no version that shows a change in place
def collect_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    progress: bool | Callable[[int, int | None], None] = True,
) -> dict[str, torch.Tensor]:
    r"""Return the mean of the squared gradients of single examples, for the weights of linear layers.

    Use it as importance of the entries in :class:`lqlora.weighting.Elementwise`.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its gradients, flags and modes are the same afterwards.
    batches : iterable
        Mappings of keyword arguments of the model, as tokenizers and collators of transformers return them, or token ids.
        Padding of mappings is cut: what ``attention_mask`` leaves out does not reach the model. See below.
    loss : callable, optional
        ``loss(model, batch)`` returns one loss per example, shape (examples,). ``batch`` may be anything; of a mapping it is
        the part without padding. By default a batch with ``labels`` has the model's own loss, of one example at a time, and
        other batches have :func:`causal_lm_loss`.
    include, exclude : patterns
        See :func:`select_linears`.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts batches. The number of all is None if ``batches`` has no length.

    Returns
    -------
    dict of str to Tensor of float32, shape (out_features, in_features)
        ``mean over examples of (d loss / d weight) ** 2``, in host memory for every device of the model. Layers without a
        gradient are left out.

    Raises
    ------
    InvalidArgumentError
        If there are no batches, no layer matches, a loss is not one number per example, no layer got a gradient, or the
        padding of a batch cannot be cut.
    NonFiniteError
        If a loss is NaN or infinite, or a squared gradient overflows float32.

    Warns
    -----
    DeadLayerWarning
        If some layers got no gradient in any batch. The result leaves them out: zeros would say that they cost nothing.
        One warning lists them, when all others are complete.
    UserWarning
        If all squared gradients of a layer are below the normal numbers of float32.

    Notes
    -----
    With losses :math:`L_n` of :math:`N` examples, the result is
    :math:`\frac{1}{N} \sum_n (\partial L_n / \partial W)^2`, entry by entry. The gradient of a whole batch is not enough:
    the square of a sum over examples is not the sum of their squares. The gradient of each example is computed from the
    layer's inputs and the gradients at its outputs.

    Layers may see the rows of a batch in any order: experts see some of the tokens, and other layers have the axis of
    tokens first. A second backward pass with weighted losses finds the example that each row belongs to. For batches of
    more than 16 examples there are two such passes. Where several examples depend on one row, as in layers of relative
    positions, each example has a backward pass of its own. Batches of one example need one pass. Experts that are stored in one
    array run one by one meanwhile, and those that no token reaches are left out like other layers.

    A batch with padding runs in parts of examples with the same number of tokens. Results are those of the examples
    without padding, so ``attention_mask`` must keep tokens that follow each other. For a decoder the same holds for
    ``decoder_attention_mask``, or for labels of -100 at the end. An entry that may or may not have an element per token is
    refused.

    A layer that is used several times in one pass has the gradients of its uses added before they are squared. The
    gradient is that of the losses of the data, not of labels drawn from the model. Weights get no ``.grad``.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.2 (diagonal of the empirical Fisher information matrix).
    """
    maps = LinearMaps(model)
    linears = maps.choose(include, exclude)
    squares = {name: _Squares(name, layer) for name, layer in linears.items()}
    hooks = {name: OutputGradients(name, own.add, keep_inputs=True) for name, own in squares.items()}

    def step(batch: Any, done: int) -> int:
        """Add one batch and return its number of examples."""
        count = send_batch(model, batch, loss, hooks.values(), done)
        for name, own in squares.items():
            if hooks[name].is_alive:
                own.check()
        return count

    examples = run_batches(
        model, maps, batches, step, linears, hooks, gradients=True, progress=progress, title="Fisher information"
    )
    warn_of_underflow([name for name, own in squares.items() if own.is_lost()], "gradients of weights")
    living = living_layers({name: hook.is_alive for name, hook in hooks.items()}, "a gradient")
    return {name: squares[name].total.div_(examples) for name in living}


class _Squares:
    """Sum of the squared gradients of the weight of one layer, example by example.

    The layer computes y_t = W x_t for the rows x_t of its input, so with g_t = dL/dy_t the gradient of example n is
    dL_n/dW = sum of g_t x_t^T over the rows t of the example, and over all uses of the layer. Cross terms between rows
    belong to its square; those between examples do not. So each example needs one matrix product; squared inputs and
    squared gradients are not enough.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        # In host memory, because the sums of a large model do not fit beside it on a GPU.
        self.total = torch.zeros(matrix_of(layer).shape, dtype=torch.float32, device="cpu")
        self._name = name
        self._largest, self._bound = 0.0, 0.0

    def add(self, seen: Sequence[Gradients], examples: range) -> None:
        """Add the squares of the gradients of some examples."""
        if self._largest < SMALLEST:  # no square counts yet: entries of the gradient are at most this
            # Sums in float32 lose less than the margin of the bound. Not every device has float64.
            sizes = [
                float(own.values.float().abs().sum()) * float(x.float().abs().max())
                for own in seen
                if (x := own.inputs) is not None and x.numel()
            ]
            self._bound = max(self._bound, sum(sizes))
        device = seen[0].values.device
        total = self.total if device == self.total.device else torch.zeros_like(self.total, device=device)
        for example in examples:
            parts = [sum_outer_products(*own.of_example(example, len(examples))) for own in seen]
            gradient_of_weight = torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
            total.addcmul_(gradient_of_weight, gradient_of_weight)
        if total is not self.total:
            self.total.add_(total.cpu())

    def check(self) -> None:
        """Raise if a sum overflows float32."""
        self._largest = require_no_overflow(self.total, f"gradient of the weight of {self._name!r}")

    def is_lost(self) -> bool:
        """Return whether gradients are not zero, but so small that their squares lose digits in float32."""
        return self._largest < SMALLEST and 0 < self._bound < 2.0**-50
