"""Models in several processes: replicas of ``DistributedDataParallel``, and parameters that ``fully_shard`` shares out."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed, nn

from lqlora.nn.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["is_sharded", "keep_codes_local", "unlocked", "whole", "write_once"]

#: Attribute of a module in which ``DistributedDataParallel`` finds the names of tensors that it does not send.
_NOT_SENT = "_ddp_params_and_buffers_to_ignore"

#: What wrappers put before names that also forward the attribute: PEFT, with prompts alone as well, and torch.compile around any.
_PREFIXES = tuple(outer + inner for outer in ("", "_orig_mod.") for inner in ("", "base_model.model.", "base_model."))


class _NotSent:
    """Names of the codes and scales that a model has when the names are read.

    Layers may be replaced later through a part of the model, and then train scales that were frozen. A list of names that
    was made before would keep their gradients from being averaged.

    Parameters
    ----------
    model : torch.nn.Module
        The model, which holds this object in an attribute.
    others : tuple of str
        Names that others have set.
    """

    def __init__(self, model: nn.Module, others: tuple[str, ...]) -> None:
        self.others = others
        self._model = weakref.ref(model)

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        model = self._model()
        if model is None:  # a shallow copy outlived its original
            return
        for owner, weight in model.named_modules():
            if isinstance(weight, QuantizedWeight):
                for key in dict(weight.named_buffers(recurse=False)):
                    for prefix in _PREFIXES:
                        yield f"{prefix}{owner}.{key}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of a model hold one with the new model. Weak references cannot be pickled.
        return type(self), (self._model(), self.others)


def keep_codes_local(model: nn.Module) -> None:
    """Let ``DistributedDataParallel`` send no codes and scales of a model: frozen, they stay the same in all processes.

    Parameters
    ----------
    model : torch.nn.Module
        The module that will be wrapped. Names of further tensors that others have set stay.
    """
    given = vars(model).get(_NOT_SENT, ())
    if not isinstance(given, _NotSent):
        setattr(model, _NOT_SENT, _NotSent(model, tuple(given)))


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether some tensors are spread over several processes.

    Parameters
    ----------
    tensors : iterable of Tensor
        Parameters and buffers of a model.

    Returns
    -------
    bool
        True if one is a DTensor of torch.
    """
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that is spread over several processes, all of which must call this.

    Parameters
    ----------
    tensor : Tensor
        Any tensor.

    Returns
    -------
    Tensor
        The tensor itself if it is in one piece.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    found: torch.Tensor = tensor.full_tensor()
    return found


def unlocked(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same memory but another storage, for use in one operation.

    ``fully_shard`` frees a storage after the forward pass and fills it again before the backward pass. torch cannot free one that
    NumPy has seen, and kernels of the CPU see tensors as arrays of NumPy.

    Parameters
    ----------
    tensor : Tensor
        A tensor that autograd does not follow.

    Returns
    -------
    Tensor
        The tensor itself if it is not on a CPU, or there is one process.
    """
    if not tensor.is_cpu or not distributed.is_available() or not distributed.is_initialized():
        return tensor
    found: torch.Tensor = cast("Any", torch).from_dlpack(tensor)
    return found


def write_once(write: Callable[..., None], *args: Any) -> None:
    """Let one process write what all of them have, and let the others wait and see the same error.

    Parameters
    ----------
    write : callable
        Called with ``args`` in the process of rank 0.
    *args
        Its arguments.

    Raises
    ------
    Exception
        What ``write`` raised in the process of rank 0, in all processes.
    """
    outcome: list[Exception | None] = [None]
    if distributed.get_rank() == 0:
        try:
            write(*args)
        except Exception as error:  # noqa: BLE001 - raised again below, in every process
            outcome[0] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
