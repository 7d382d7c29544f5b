"""Modules that compute ``x @ matrix.T + bias``: linear layers, classes derived from them, and transposed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["computes_product_alone", "has_more_than_weight_and_bias", "is_linear_map", "matrix_of", "offers_more"]

#: What a class of linear layers may define. Other methods may use the weight in other ways.
_HARMLESS = frozenset({"__init__", "__repr__", "extra_repr", "forward", "reset_parameters"})

#: Special methods that change what a layer does. Others belong to every class.
_SPECIAL = frozenset({"__call__", "__getattr__", "__getattribute__", "__setattr__"})


def is_linear_map(module: nn.Module) -> bool:
    """Return whether a module is a linear layer by its class.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for ``torch.nn.Linear``, derived classes, and ``Conv1D`` of transformers. They may compute something else, see
        :func:`computes_product_alone`.
    """
    if type(module).__name__ != "Conv1D":
        return isinstance(module, nn.Linear)
    # Conv1D is known by name, so that transformers need not be imported.
    weight = module._parameters.get("weight")  # noqa: SLF001 - of torch
    return weight is not None and weight.ndim == 2


def matrix_of(layer: nn.Module) -> torch.Tensor:
    """Return the matrix of a linear layer.

    Parameters
    ----------
    layer : torch.nn.Module
        One of the layers that :func:`select_linears` returns.

    Returns
    -------
    Tensor, shape (out_features, in_features)
        View of the weight that autograd does not follow. It is transposed if the layer stores the transposed matrix.
    """
    weight = cast("torch.Tensor", layer.weight).detach()
    return weight if isinstance(layer, nn.Linear) else weight.T


def has_more_than_weight_and_bias(layer: nn.Module, buffers: Collection[str] = ()) -> bool:
    """Return whether a layer has further tensors, or hooks that change what is saved and loaded.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear layer or embedding.
    buffers : collection of str
        Buffers that do not count.

    Returns
    -------
    bool
        True if a replacement would lose some of its state.
    """
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    own = vars(layer)
    return bool(
        own["_parameters"].keys() - {"weight", "bias"}
        or own["_buffers"].keys() - {*buffers}
        or any(own.get(kind) for kind in ("_modules", *hooks))
    )


def computes_product_alone(layer: nn.Module) -> bool:
    """Return whether a layer computes ``x @ matrix.T + bias``, and its class offers nothing else.

    The product is tried out with random inputs of two and three axes, in training and in evaluation.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear layer. On the meta device it is tried out with random parameters.

    Returns
    -------
    bool
        True for ``torch.nn.Linear`` itself.
    """
    if type(layer) is nn.Linear:
        return True
    if offers_more(layer, nn.Linear if isinstance(layer, nn.Linear) else nn.Module):
        return False
    mode, own = layer.training, layer._parameters  # noqa: SLF001 - of torch
    given = dict(own)
    try:
        # transformers builds models while the default device is the meta device, on which nothing can be compared.
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            own.update({key: _random(parameter) for key, parameter in given.items()})
            return all(_is_product(layer, shape) for layer.training in (True, False) for shape in ((3,), (2, 1)))
    except Exception:  # noqa: BLE001 - code of others; whatever it raises, it does not take any input
        return False
    finally:
        layer.training = mode
        own.update(given)


def _random(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return a parameter in memory: the same one, or a random one in the place of one on the meta device."""
    if parameter is None or not parameter.is_meta:
        return parameter
    return nn.Parameter(torch.randn(parameter.shape).to(parameter.dtype), requires_grad=False)


def offers_more(layer: nn.Module, base: type) -> bool:
    """Return whether the class of a layer has methods or properties that may use the weight in other ways than ``forward``.

    Parameters
    ----------
    layer : torch.nn.Module
        Any module.
    base : type
        Class of torch that it is derived from.

    Returns
    -------
    bool
        True if a class between both has one.
    """
    classes = type(layer).__mro__
    return any(_is_further(name, value) for cls in classes[: classes.index(base)] for name, value in vars(cls).items())


def _is_further(name: str, value: object) -> bool:
    """Return whether an attribute of a class is a method or property beside the harmless ones."""
    ordinary = name in _SPECIAL or not name.startswith("__")
    return ordinary and name not in _HARMLESS and (callable(value) or hasattr(value, "__get__"))


def _is_product(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a layer gives the product for a random input of one shape without its last axis."""
    matrix, bias = matrix_of(layer), cast("torch.Tensor | None", getattr(layer, "bias", None))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((*shape, matrix.shape[1]), generator=generator).to(matrix)
    expected = functional.linear(x, matrix, bias)
    # Each rounding of a sum is at most eps times the sum of the magnitudes.
    bound = functional.linear(x.abs(), matrix.abs(), None if bias is None else bias.abs())
    bound *= 16 * torch.finfo(matrix.dtype).eps
    y = type(layer).forward(layer, x)
    return y.shape == expected.shape and y.dtype == expected.dtype and not bool(((y - expected).abs() > bound).any())
