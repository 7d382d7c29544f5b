"""Undo of changes to the modules of a model: an error or an interrupt leaves the model as it was."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["unchanged_on_error"]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore modules, hooks and gradient flags of a model if the body of the ``with`` statement raises.

    Tensors are not copied. So values that are changed in place are not restored, and tensors that the body replaces
    stay in memory until it ends.

    Parameters
    ----------
    model : torch.nn.Module
        Root of the modules.

    Yields
    ------
    None
        Nothing.
    """
    modules = [
        (own, type(own), {key: (value, _copied(value)) for key, value in vars(own).items()}) for own in model.modules()
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:  # a keyboard interrupt, too
        for module, kind, attributes in modules:
            module.__class__ = kind
            own = vars(module)
            own.clear()
            for key, (value, copied) in attributes.items():
                # Handles of hooks refer to the dictionary that they are in, so it must stay the same one.
                if copied is not None:
                    value.clear()
                    value.update(copied)
                own[key] = value
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _copied(value: Any) -> Any:
    """Return a shallow copy of a dictionary or a set, and None for other values."""
    return value.copy() if isinstance(value, dict | set) else None
