"""Running a model to watch its linear layers, and leaving it as it was."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lqlora.errors import InvalidArgumentError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

__all__ = ["checked_losses", "connected", "frozen", "hooked", "input_of"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and off the gradients of parameters, and put everything back.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Yields
    ------
    None
        Flags and modes are as before at the end.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    model.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(linears: Mapping[str, nn.Linear], hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Call a hook after each use of a layer, and remove all hooks at the end.

    Parameters
    ----------
    linears : mapping of str to torch.nn.Linear
        Layers by name.
    hooks : mapping of str to callable
        ``hook(module, args, kwargs, output)`` by the same names; what it returns, if anything, replaces the output.

    Yields
    ------
    None
        The hooks are in place meanwhile.
    """
    handles = []
    try:
        for name, module in linears.items():
            handles.append(module.register_forward_hook(hooks[name], with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the input of a linear layer from the arguments of a hook.

    Parameters
    ----------
    args, kwargs : tuple and mapping
        What the layer was called with.

    Returns
    -------
    Tensor
        The input, the very object.
    """
    return args[0] if args else kwargs["input"]


def connected(output: torch.Tensor) -> torch.Tensor:
    """Make sure that a gradient reaches the output of a layer, though no parameter requires one.

    Parameters
    ----------
    output : Tensor
        Output of the layer.

    Returns
    -------
    Tensor
        The output, or a tensor to put in its place.
    """
    # The first layer has nothing before it that requires a gradient; a clone, because a leaf must not be changed.
    return output if output.requires_grad else output.detach().requires_grad_().clone()


def checked_losses(losses: torch.Tensor, examples: int) -> torch.Tensor:
    """Return the losses of a batch, unless they are not one finite number per example.

    Parameters
    ----------
    losses : Tensor
        What a loss returned.
    examples : int
        Number of examples before this batch, for the error.

    Returns
    -------
    Tensor, shape (examples of the batch,)
        The losses.

    Raises
    ------
    InvalidArgumentError
        If they have another shape.
    NonFiniteError
        If one is NaN or infinite.
    """
    if losses.ndim != 1:
        raise InvalidArgumentError(f"The loss must be one number per example, not of shape {tuple(losses.shape)}.")
    if not bool(torch.isfinite(losses).all()):
        raise NonFiniteError(f"The loss of an example after the first {examples} is NaN or infinite.")
    return losses
