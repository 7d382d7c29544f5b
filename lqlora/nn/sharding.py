"""Models whose parameters are shared out to several processes, as ``fully_shard`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["is_sharded", "whole", "write_once"]


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
