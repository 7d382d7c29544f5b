"""Codes and scales as frozen parameters, which ``fully_shard`` of torch shares out to several processes.

``fully_shard`` shares out parameters and leaves buffers whole. It casts parameters of floating-point numbers if a policy says so,
and it cuts them along their first axis. So each array becomes a parameter of bytes with one axis.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import nn

from lqlora._annotations import annotated
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.nn.model import quantized_layers
from lqlora.nn.offload import Fetch, OffloadedTensor, OffloadedWeight, versions
from lqlora.nn.peqa.linear import ScaledWeight
from lqlora.nn.selection import unwrapped
from lqlora.nn.sharding import unlocked, whole
from lqlora.nn.weight import QuantizedWeight
from lqlora.quantized import QuantizedArray

__all__ = ["ShardableWeight", "make_shardable"]


class _Aliases:
    """Fetches tensors on a CPU as others that share their memory but not their storage."""

    def fetch(self, wanted: Fetch) -> list[torch.Tensor]:
        return [unlocked(own) for own in wanted.hosts]


class _AliasedTensor(OffloadedTensor):
    """Tensor that is gathered for a time: operators get an alias that they drop, and others a copy that stays."""

    @property
    def fetched(self) -> torch.Tensor:
        """Copy of the tensor."""
        self.fetch.require_unchanged()
        return self.fetch.hosts[self.position].clone()


class ShardableWeight(QuantizedWeight):
    """Quantized array whose codes and scales are frozen parameters of bytes.

    :func:`make_shardable` makes one of a :class:`QuantizedWeight` by a change of its class, as ``fully_shard`` of torch does.

    Parameters
    ----------
    quantized : QuantizedArray
        See :class:`QuantizedWeight`.
    """

    _kinds: dict[str, tuple[torch.dtype, torch.Size]]

    @property
    def array(self) -> QuantizedArray:
        """Quantized array. If it is shared out, all processes must ask for it, and get the whole in host memory."""
        found = {name: self._gathered(name) for name in self._stored}
        return QuantizedArray(found.pop("codes"), found.pop("scales"), self.format, tuple(self.shape), **found)

    def _gathered(self, name: str) -> Any:
        own = getattr(self, name)
        if isinstance(own, QuantizedWeight):
            return own.array
        own = own.detach()
        found = whole(own).cpu() if hasattr(own, "full_tensor") else own
        return self._typed(name, found)

    def _typed(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Return the array that bytes stand for; scales that train are arrays already."""
        if name not in self._kinds:
            return stored
        dtype, shape = self._kinds[name]
        return stored.detach().view(dtype).view(shape)

    def _tensors(self) -> list[torch.Tensor]:
        own = [getattr(self, name) for name in self._stored]
        if any(hasattr(tensor, "full_tensor") for tensor in own):
            raise InvalidArgumentError(
                "weight of a quantized layer must be whole, but its codes are shared out to several processes. Call the module "
                "that fully_shard was given, or save the model and load it."
            )
        found: list[torch.Tensor] = []
        for name, tensor in zip(self._stored, own, strict=True):
            found += tensor._tensors() if isinstance(tensor, QuantizedWeight) else [self._typed(name, tensor)]  # noqa: SLF001 - of this class
        return found

    def _current(self) -> list[torch.Tensor]:
        found = super()._current()
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return found
        hosts = [own for own in found if not isinstance(own, nn.Parameter)]
        fetch = Fetch(hosts, self.device, cast("Any", weakref.ref(self)), cast("Any", _Aliases()), versions(hosts))
        aliased = iter([_AliasedTensor(fetch, position) for position in range(len(hosts))])
        return [own if isinstance(own, nn.Parameter) else next(aliased) for own in found]


class ShardableScaledWeight(ShardableWeight, ScaledWeight):
    """The same for an array whose scales train: they are a parameter already."""


@annotated
@torch.inference_mode(mode=False)  # the parameters stay in use outside of it
def make_shardable(model: nn.Module) -> None:
    """Turn codes and scales of quantized layers and embeddings into frozen parameters, in place.

    ``fully_shard`` then shares them out, and gathers those of a module for the time that it runs. Call this before
    ``fully_shard``, and after everything else that changes layers. Results stay the same.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer or is one itself, or a layer is offloaded.

    Notes
    -----
    The parameters are bytes with one axis, under the names that the buffers had. They have no gradients, and code that switches on the
    gradients of all parameters fails. ``state_dict`` has these bytes; use :func:`save_model`, which gathers the layers and writes
    the same file as without this.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 4))
    >>> report = lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/64:float32"), rank=2)
    >>> make_shardable(model)
    >>> {name: own.numel() for name, own in model.named_parameters() if own.dtype == torch.uint8}
    {'0.quantized.codes': 256, '0.quantized.scales': 32, '1.quantized.codes': 16, '1.quantized.scales': 4}
    """
    model = unwrapped(model)
    quantized_layers(model)
    weights = {name: own for name, own in model.named_modules() if isinstance(own, QuantizedWeight)}
    for name, weight in weights.items():
        if isinstance(weight, OffloadedWeight):
            raise InvalidArgumentError(
                f"model must have its codes in memory, but {printable(name)!r} is offloaded. Call onload_model first."
            )
    for weight in weights.values():
        if isinstance(weight, ShardableWeight):
            continue
        buffers = dict(weight.named_buffers(recurse=False))
        own: Any = weight
        own.__class__ = ShardableScaledWeight if isinstance(weight, ScaledWeight) else ShardableWeight
        own._kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in buffers.items()}  # noqa: SLF001 - of this class
        for name, tensor in buffers.items():
            del weight._buffers[name]  # noqa: SLF001 - of torch
            weight.register_parameter(name, nn.Parameter(tensor.reshape(-1).view(torch.uint8), requires_grad=False))
