"""Models on the meta device: which tensors they have, and how a file and their own code give these values."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora.nn.heads import names_above

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["MetaTensors", "with_computed_buffers"]


class MetaTensors:
    """Tensors on the meta device among parameters, buffers and attributes of modules, with all places that hold each.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        Modules by name.

    Attributes
    ----------
    names : dict of Tensor to str
        First name of each tensor.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names: dict[torch.Tensor, str] = {}
        self._filled: set[torch.Tensor] = set()
        self._places: dict[torch.Tensor, list[tuple[dict[str, Any], str]]] = {}
        for name, module in modules.items():
            # Tied tensors are found by identity; named_parameters would leave out second names.
            for held in (module._parameters, module._buffers, vars(module)):  # noqa: SLF001 - of torch
                for key, own in held.items():
                    if isinstance(own, torch.Tensor) and own.is_meta:
                        self.names.setdefault(own, f"{name}.{key}" if name else key)
                        self._places.setdefault(own, []).append((held, key))

    def put(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Replace a tensor in all places that hold it.

        Parameters
        ----------
        old, new : Tensor
            The tensor on the meta device, and another one.
        """
        for held, key in self._places[old]:
            held[key] = new

    def fill(self, old: torch.Tensor, values: torch.Tensor) -> None:
        """Replace a tensor by a copy of values in host memory, in its dtype and with its flags.

        Parameters
        ----------
        old : Tensor
            The tensor on the meta device.
        values : Tensor
            Values of the same shape. A tensor that has values already keeps them.
        """
        if old in self._filled:
            return
        self._filled.add(old)
        new = values.to(old.dtype, copy=True)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        vars(new).update(vars(old))  # marks of others
        self.put(old, new)


@contextlib.contextmanager
def with_computed_buffers(model: nn.Module) -> Iterator[None]:
    """Give values to buffers on the meta device that files do not store, and take them back if there is an error.

    Models of transformers compute such buffers, as frequencies of rotary embeddings, in the method that draws weights. What it does
    not compute stays on the meta device.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is not wrapped.

    Yields
    ------
    None
        Once, with the values in the model.
    """
    modules = dict(model.named_modules())
    found = MetaTensors(modules)
    computed: dict[torch.Tensor, torch.Tensor] = {}
    for name, module in modules.items():
        buffers = [
            own
            for key, own in module._buffers.items()  # noqa: SLF001 - of torch
            if own is not None and own.is_meta and key in module._non_persistent_buffers_set  # noqa: SLF001
        ]
        if not buffers or not all(own.is_meta for own in module.parameters()):  # which would be drawn anew
            continue
        owners = (modules.get(above) for above in (name, *(above for above, _ in names_above(name))))
        methods = (getattr(owner, "_init_weights", None) for owner in owners)
        initialize = next((method for method in methods if callable(method)), None)
        if initialize is not None:
            computed |= _computed(found, initialize, module, buffers)
    for old, new in computed.items():
        found.put(old, new)
    try:
        yield
    except BaseException:
        for old in computed:
            found.put(old, old)
        raise


def _computed(
    found: MetaTensors, initialize: Any, module: nn.Module, buffers: Iterable[torch.Tensor]
) -> dict[torch.Tensor, torch.Tensor]:
    """Return the buffers of a module that a function computes. Other buffers keep their values."""
    results: list[dict[torch.Tensor, torch.Tensor]] = []
    given = [
        (own._buffers, key, tensor)  # noqa: SLF001 - of torch
        for own in module.modules()
        for key, tensor in own._buffers.items()  # noqa: SLF001
        if tensor is not None and not tensor.is_meta
    ]
    try:
        for held, key, tensor in given:
            held[key] = tensor.clone()  # the function would write into it
        # What is not computed keeps the number that it was filled with.
        for number in (0, 1):
            new = {old: torch.full_like(old, number, device="cpu") for old in buffers}
            for old, own in new.items():
                found.put(old, own)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                initialize(module)
            results.append(new)
    except Exception:  # noqa: BLE001 - code of others; whatever it raises, it computes nothing
        return {}
    finally:
        for old in buffers:
            found.put(old, old)
        for held, key, tensor in given:
            held[key] = tensor
    first, second = results
    return {old: own for old, own in first.items() if torch.equal(own, second[old])}
