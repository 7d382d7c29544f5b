"""Shared parts of the collectors: runs over batches with hooks on linear layers, checks of numbers, outer products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora._progress import reported
from lqlora._warnings import warn
from lqlora.errors import DeadLayerWarning, InvalidArgumentError, NonFiniteError
from lqlora.nn.experts import split_for_a_while

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from lqlora.nn.selection import LinearMaps

__all__ = [
    "SMALLEST",
    "input_of",
    "living_layers",
    "require_no_overflow",
    "run_batches",
    "sum_outer_products",
    "version_of",
    "warn_of_underflow",
]

#: Smallest normal number of float32. Smaller ones lose digits, and then become zero.
SMALLEST = 2.0**-126


def run_batches(
    model: nn.Module,
    maps: LinearMaps,
    batches: Iterable[Any],
    step: Callable[[Any, int], int],
    linears: Mapping[str, nn.Module],
    hooks: Mapping[str, Callable[..., Any]],
    *,
    gradients: bool,
    progress: bool | Callable[[int, int | None], None] = True,
    title: str,
) -> int:
    """Run a step on every batch while hooks watch the linear layers, and return the total count.

    The model is in evaluation mode meanwhile, and its parameters require no gradients. Experts that are stored in one array
    are layers of their own. Afterwards arrays, flags, modes and hooks are as before, also after an exception.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    maps : LinearMaps
        Linear layers of the model, which ``linears`` were chosen from.
    batches : iterable
        Arguments of ``step``.
    step : callable
        ``step(batch, done)`` runs the model and returns an increment of the count, such as the number of examples;
        ``done`` is the count so far.
    linears : mapping of str to torch.nn.Module
        Layers by name.
    hooks : mapping of str to callable
        ``hook(module, args, kwargs, output)`` by the same names, called after each use of the layer. What it returns,
        unless None, replaces the output.
    gradients : bool
        Whether autograd records the steps, also if the caller has switched it off.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts batches.
    title : str
        Title of the bar.

    Returns
    -------
    int
        The count, at least 1.

    Raises
    ------
    InvalidArgumentError
        If nothing was counted, or ``batches`` is a mapping or a tensor, which is one batch.
    """
    if isinstance(batches, Mapping):
        raise InvalidArgumentError(
            "batches must be several batches, such as a list of mappings, got one mapping. Pass [batch]."
        )
    if isinstance(batches, torch.Tensor):
        raise InvalidArgumentError(
            f"batches must be several batches, such as a list of tensors, got one tensor of shape {tuple(batches.shape)}. Pass [batch], or "
            "batch.split(1) for batches of one example."
        )
    count, total = 0, None
    with suppress(TypeError, NotImplementedError):  # data sets that are read from streams have a length that raises
        total = len(batches)  # type: ignore[arg-type]
    with (
        reported(progress, title, total, "batch") as report,
        _frozen(model),
        split_for_a_while(maps.stacks_of({*linears.values()})),
        _hooked(linears, hooks),
        torch.set_grad_enabled(gradients),
    ):
        for done, batch in enumerate(batches, start=1):
            count += step(batch, count)
            report(done)
    if count == 0:
        raise InvalidArgumentError(
            "batches must hold at least one batch with examples, got none. Was an iterator used up?"
        )
    return count


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and switch off the gradients of parameters; restore both at the end."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():  # whose flags torch does not let us restore
            raise InvalidArgumentError(
                f"model must not have parameters of torch.inference_mode, such as {printable(name)!r}. Build or load it outside."
            )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    # Collectors form gradients of weights from inputs and output gradients, example by example. Gradients that autograd
    # would accumulate in the parameters are sums over examples, and take as much memory as the model.
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
def _hooked(linears: Mapping[str, nn.Module], hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Register a forward hook on each layer, and remove all hooks at the end."""
    handles = []
    try:
        for name, module in linears.items():
            # Before hooks of the caller, which may replace the output: gradients are those of the product itself.
            handles.append(module.register_forward_hook(hooks[name], with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the input of a linear layer from the arguments of a hook.

    Parameters
    ----------
    args, kwargs : tuple and mapping
        Arguments that the layer was called with.

    Returns
    -------
    Tensor
        The input itself, not a copy.
    """
    return args[0] if args else next(iter(kwargs.values()))


def living_layers(is_alive: Mapping[str, bool], what: str) -> list[str]:
    """Return the layers that a collector has statistics of, and warn of all others at once.

    It is a warning and no error, because an error would lose the statistics of the other layers, which can take hours.

    Parameters
    ----------
    is_alive : mapping of str to bool
        Whether each selected layer has statistics.
    what : str
        What the other layers lack, such as ``"a gradient"``.

    Returns
    -------
    list of str
        Names in the same order, at least one.

    Raises
    ------
    InvalidArgumentError
        If no layer has statistics.

    Warns
    -----
    DeadLayerWarning
        If some layers have none.
    """
    living = [name for name, own in is_alive.items() if own]
    if not living:
        raise InvalidArgumentError(
            f"include must select layers that the batches reach, but none of {len(is_alive)} ({list_names(is_alive)}) got {what}."
        )
    if len(living) < len(is_alive):
        dead = [name for name, own in is_alive.items() if not own]
        warn(
            f"include selects {len(dead)} of {len(is_alive)} layers that never got {what} ({list_names(dead)}). The result leaves "
            "them out. Exclude them, or pass batches that reach them.",
            DeadLayerWarning,
        )
    return living


def version_of(x: torch.Tensor) -> int | None:
    """Return the number of changes in place of a tensor.

    Parameters
    ----------
    x : Tensor
        Any tensor.

    Returns
    -------
    int or None
        The number. Tensors of inference mode have none.
    """
    return None if x.is_inference() else x._version  # noqa: SLF001 - torch has no public name for it


def sum_outer_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    r"""Return :math:`\sum_t l_t r_t^T` over the rows of two tensors, in float32.

    Parameters
    ----------
    left, right : Tensor, shape (..., m) and (..., n)
        Rows along the last axis; all other axes are summed over.

    Returns
    -------
    Tensor of float32, shape (m, n)
        The sum. An autocast around the call does not lower its precision.
    """
    # Sums over thousands of rows in a half precision would lose the small terms, so rows are widened before the product.
    with torch.autocast(left.device.type, enabled=False):
        rows = left.reshape(-1, left.shape[-1]).float()
        return rows.T @ right.reshape(-1, right.shape[-1]).float()


def require_no_overflow(squares: torch.Tensor, what: str) -> float:
    """Raise if sums of squares overflow float32.

    Parameters
    ----------
    squares : Tensor
        Sums of squares, not negative.
    what : str
        Name of the numbers that were squared, which the error begins with.

    Returns
    -------
    float
        The largest sum, zero if there is none.

    Raises
    ------
    NonFiniteError
        If a sum is NaN or infinite.
    """
    largest = float(squares.max()) if squares.numel() else 0.0
    if not largest < math.inf:  # NaN included
        raise NonFiniteError(f"{what} holds NaN, infinity, or numbers whose squares overflow float32.")
    return largest


def warn_of_underflow(names: list[str], what: str) -> None:
    """Warn that squares of some layers are below the smallest normal number of float32.

    Parameters
    ----------
    names : list of str
        The layers; without any there is no warning.
    what : str
        Name of the numbers that were squared, which the message begins with.
    """
    if names:
        warn(
            f"{what} of the layers {list_names(names)} are so small that their squares are below {SMALLEST:.2g}, where float32 loses "
            "digits. Multiply the loss, or the inputs, by a large number.",
        )
