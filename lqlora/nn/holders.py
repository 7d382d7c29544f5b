"""References to layers outside of the tree of modules, which a replacement of the layers does not reach."""

from __future__ import annotations

import functools
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from lqlora._printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["find_holders"]

#: Attributes that every module of torch has. Submodules and parameters are found by their owners, hooks get the module.
_USUAL = frozenset(vars(nn.Module()))

#: Containers and functions are looked into this many times.
_DEPTH = 3


def find_holders(modules: Mapping[str, nn.Module], layers: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Return the layers that attributes of modules hold beside the tree of modules.

    Lists, dicts, bound methods and closures may hold a layer or its weight. They would go on to use the old layer after it
    was replaced, without factors that train.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        All modules of the model by name.
    layers : iterable of torch.nn.Module
        Layers to look for.

    Returns
    -------
    dict of torch.nn.Module to str
        Description of the attribute by layer.
    """
    wanted: dict[int, nn.Module] = {}
    for layer in layers:
        wanted[id(layer)] = wanted[id(layer._parameters.get("weight"))] = layer  # noqa: SLF001 - of torch
    wanted.pop(id(None), None)
    found: dict[nn.Module, str] = {}
    for name, module in modules.items():
        for key, value in vars(module).items():
            if key in _USUAL or type(value) in (bool, int, str):
                continue
            for held in _objects(value, _DEPTH):
                own = wanted.get(id(held))
                if own is not None and own is not module:
                    found.setdefault(own, f"attribute {printable(key)!r} of {printable(name) or 'the model'!r}")
    return found


def _objects(value: Any, depth: int) -> Iterator[Any]:
    """Yield a value and what it holds."""
    yield value
    if depth == 0:
        return
    inner: Iterable[Any] = ()
    if isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, FunctionType):
        inner = (_content(cell) for cell in value.__closure__ or ())
    for held in inner:
        yield from _objects(held, depth - 1)


def _content(cell: Any) -> Any:
    """Return what a closure refers to, None if it was not set yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
