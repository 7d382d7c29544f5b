"""Gradients at the outputs of linear layers, with the example that each row belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, cast

import torch

from lqlora.errors import InvalidArgumentError
from lqlora.nn.statistics.hooks import input_of, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import nn

__all__ = ["Gradients", "OutputGradients", "send_gradients"]

#: A marking pass has this number of different weights of losses, 2**0, 2**6 ... 2**90. A row with parallel parts of two
#: examples could be taken for one of a third only if one part is at least 63 times the other, or they almost cancel. In
#: float16 the larger weights overflow, so that rows count as shared.
_WEIGHTS, _STEP = 16, 6

#: Rows are compared in this number of random directions. A few numbers a row do not keep the gradients of a model alive.
_DIRECTIONS = 4


@dataclass(frozen=True)
class Gradients:
    """Gradient of a batch at one use of a layer.

    Parameters
    ----------
    inputs : Tensor, shape (..., in_features), or None
        Input of the layer, if it was kept.
    values : Tensor, shape (..., out_features)
        Gradient at the output.
    owners : int or Tensor of int64, shape (rows,)
        Example of all rows, or of each row. It is -1 where the gradient is zero.
    """

    inputs: torch.Tensor | None
    values: torch.Tensor
    owners: int | torch.Tensor

    def of_example(self, example: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients and inputs of the rows of one example. Inputs must have been kept.

        Parameters
        ----------
        example : int
            Position of the example in the batch.
        count : int
            Number of examples of the batch.

        Returns
        -------
        values, inputs : Tensor
            Rows along all axes but the last.
        """
        values, inputs, owners = self.values, cast("torch.Tensor", self.inputs), self.owners
        if isinstance(owners, int):
            return values, inputs
        if values.ndim > 1 and values.shape[0] == count:
            expected = torch.arange(count, device=owners.device).repeat_interleave(owners.shape[0] // count)
            if bool(((owners == expected) | (owners < 0)).all()):
                return values[example], inputs[example]
        chosen = owners == example
        return values.reshape(-1, values.shape[-1])[chosen], inputs.reshape(-1, inputs.shape[-1])[chosen]


class _Pass(Enum):
    """Uses of the gradients of a backward pass by a layer."""

    MARK = auto()
    TAKE = auto()
    SINGLE = auto()
    IGNORE = auto()


@dataclass
class _Use:
    """One use of a layer in a forward pass: its input, the input's version, and the projections of marking passes."""

    inputs: torch.Tensor | None
    version: int | None
    marks: list[torch.Tensor] = field(default_factory=list)


class OutputGradients:
    """Forward hook of one layer, which passes the gradients of its outputs to a collector for each batch.

    Gradients are handed on as soon as they are known if the layer is used once in a pass. If it is used several times, they
    wait for the end of the backward pass, because an unused result gets no gradient.

    Parameters
    ----------
    name : str
        Name of the layer, for errors.
    take : callable
        ``take(gradients, examples)`` gets the gradients of all uses of the layer in a batch, and the examples that they
        belong to. A batch may come in several calls, one for each example.
    keep_inputs : bool
        Whether ``take`` needs the inputs of the layer. A model that changes them in place is refused then.

    Attributes
    ----------
    is_alive : bool
        Whether a gradient ever arrived.
    is_shared : bool
        Whether the present batch has rows that several examples depend on.
    """

    def __init__(self, name: str, take: Callable[[Sequence[Gradients], range], None], *, keep_inputs: bool) -> None:
        self._name, self._take, self._keep_inputs = name, take, keep_inputs
        self._pass: _Pass | None = None
        self._uses, self._without_gradients = 0, 0
        self._examples = range(0)
        self._seen: list[Gradients] = []
        self.is_alive = False
        self.is_shared = False

    def __call__(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Watch the gradient at an output, and return what replaces it."""
        # A loss may run part of the model without gradients. Such a use has no part in the gradient of the weight.
        if not torch.is_grad_enabled():
            self._without_gradients += 1
            return None
        if self._pass is None:
            self._uses += 1
        elif self._without_gradients:
            # Checkpointing without use_reentrant repeats a forward pass too, but its gradients arrive at the first uses.
            raise InvalidArgumentError(
                f"model must not run {self._name!r} again in the backward pass, as reentrant checkpointing does. "
                "Switch checkpointing off, or pass use_reentrant=False to it."
            )
        # The input is kept without a copy until its gradient arrives. A change in place in between would pair the
        # gradient with other values, so the version of the tensor is compared.
        x = input_of(args, kwargs).detach() if self._keep_inputs else None
        use = _Use(x, None if x is None else version_of(x))
        # Parameters require no gradient here, and the first layer has nothing before it that does: without a new leaf,
        # autograd would stop after it. The clone is for activations that change the output in place. Autograd forbids
        # that for a leaf. For a view it replaces the history, so that the hook would never be called, and torch returns a
        # view for inputs of three or more axes.
        output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
        output.register_hook(lambda gradient: self._see(use, gradient.detach()))
        return output

    @property
    def is_forward(self) -> bool:
        """True while the model runs forward and records gradients."""
        return self._pass is None and torch.is_grad_enabled()

    def begin(self, purpose: _Pass, examples: range) -> None:
        """Begin a backward pass.

        Parameters
        ----------
        purpose : _Pass
            What happens to the gradients that arrive.
        examples : range
            Positions of the examples whose losses have a weight that is not zero.
        """
        self._pass, self._examples = purpose, examples

    def end(self) -> None:
        """End a backward pass, and hand on the gradients that have waited for it."""
        self._pass = _Pass.IGNORE
        if self._seen:
            self._hand_on()

    def reset(self) -> None:
        """Forget the uses of a batch."""
        self._pass = None
        self._uses, self._without_gradients, self.is_shared = 0, 0, False

    def _see(self, use: _Use, gradient: torch.Tensor) -> None:
        if self._pass is _Pass.IGNORE:
            return
        if use.inputs is not None and version_of(use.inputs) != use.version:
            raise InvalidArgumentError(
                f"model changes the input of {self._name!r} in place after the layer saw it. Exclude the layer."
            )
        self.is_alive |= gradient.numel() > 0
        if self._pass is _Pass.MARK:
            use.marks.append(_projection(gradient))
            return
        if self._pass is _Pass.SINGLE:
            self._seen.append(Gradients(use.inputs, gradient, self._examples[0]))
        elif self.is_shared or (owners := _owners(use.marks, gradient, len(self._examples))) is None:
            self._seen.clear()
            self.is_shared = True
            return
        else:
            self._seen.append(Gradients(use.inputs, gradient, owners))
        if self._uses == 1:
            self._hand_on()

    def _hand_on(self) -> None:
        seen, self._seen = self._seen, []
        self._take(seen, self._examples)


def send_gradients(losses: torch.Tensor, layers: Collection[OutputGradients]) -> int:
    """Run backward passes, so that hooks of layers receive the gradients of each loss by itself.

    Parameters
    ----------
    losses : Tensor, shape (examples,)
        Losses of the examples of a batch.
    layers : collection of OutputGradients
        Hooks that saw the forward pass.

    Returns
    -------
    int
        Number of examples.
    """
    # The shape of a layer's input does not tell which rows belong to which example: an expert may see as many tokens as
    # the batch has examples, and other layers have the tokens on the first axis. Gradients tell. Row t has the gradient
    # g_t = sum_n dL_n/dy_t, and if losses are weighted with c_n it is sum_n c_n dL_n/dy_t. A row that only L_n depends on
    # has c_n g_t. With powers of two for c_n the products are exact, so that equality can be asked for.
    # Other rows, such as those of relative positions, have parts of several examples. Their layers need one backward
    # pass for each example, where every row belongs to it.
    count = losses.shape[0]
    if count and losses.requires_grad:
        alone = list(layers)
        if count > 1:
            for weights in _weights(losses):
                _run(losses, weights, layers, _Pass.MARK, range(count))
            _run(losses, torch.ones_like(losses), layers, _Pass.TAKE, range(count))
            alone = [layer for layer in layers if layer.is_shared]
        for example in range(count) if alone else ():
            own = torch.zeros_like(losses)
            own[example] = 1
            _run(losses, own, alone, _Pass.SINGLE, range(example, example + 1))
    for layer in layers:
        layer.reset()
    return count


def _run(
    losses: torch.Tensor, weights: torch.Tensor, layers: Collection[OutputGradients], purpose: _Pass, examples: range
) -> None:
    """Run one backward pass with a weight for each loss."""
    for layer in layers:
        layer.begin(purpose, examples)
    is_last = purpose is _Pass.SINGLE and examples.stop == losses.shape[0]
    torch.autograd.backward(losses, weights, retain_graph=not is_last)
    for layer in layers:
        layer.end()


def _weights(losses: torch.Tensor) -> list[torch.Tensor]:
    """Return the weights of losses in each marking pass: powers of two, by the digits of the positions of examples."""
    positions = torch.arange(losses.shape[0], device=losses.device)
    passes = _number_of_digits(losses.shape[0])
    digits = [positions // _WEIGHTS**digit % _WEIGHTS for digit in range(passes)]
    return [(2.0 ** (_STEP * digit)).to(losses.dtype) for digit in digits]


def _number_of_digits(count: int) -> int:
    """Return the number of digits that positions below a count have."""
    return max(1, math.ceil(math.log(count, _WEIGHTS) - 1e-9))


def _projection(gradient: torch.Tensor) -> torch.Tensor:
    """Return the rows of a gradient in a few random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(gradient.shape[-1], _DIRECTIONS, generator=generator)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    with torch.autocast(gradient.device.type, enabled=False):
        return gradient.reshape(-1, gradient.shape[-1]).to(dtype) @ directions.to(gradient.device, dtype)


def _owners(marks: list[torch.Tensor], gradient: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return the example of each row, -1 where the gradient is zero; None if a row has parts of several examples."""
    if len(marks) != _number_of_digits(count):
        return None
    own = _projection(gradient)
    # The largest component measures a row: a marked row may be so large that its squares overflow float32.
    size = _largest(own)
    # Rounding in the order of sums may differ between passes on some devices. A smaller part of another example than
    # that does not count either. If a number leaves the range of its type, the row counts as shared, which is right.
    tolerance = min(64 * torch.finfo(gradient.dtype).eps, 2.0**-5)
    owners = torch.zeros_like(size, dtype=torch.int64)
    fits = torch.ones_like(size, dtype=torch.bool)
    for digit, mark in enumerate(marks):
        value = ((_largest(mark) / size).log2() / _STEP).round().nan_to_num(0.0, 0.0, 0.0).clamp(0, _WEIGHTS - 1)
        expected = own * (2.0 ** (_STEP * value))[:, None]
        fits &= _largest(mark - expected) <= tolerance * _largest(expected)
        owners += value.long() * _WEIGHTS**digit
    is_zero = (gradient.reshape(-1, gradient.shape[-1]) == 0).all(dim=-1)
    fits &= (owners < count) & (is_zero == (size == 0))
    return owners.masked_fill(is_zero, -1) if bool(fits.all()) else None


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each row."""
    return rows.abs().amax(dim=-1)
