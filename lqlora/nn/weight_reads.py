"""Modules that read the weight of a linear layer instead of calling it, found in the bytecode of their methods."""

from __future__ import annotations

import dis
import functools
from types import CodeType

from torch import nn

__all__ = ["needs_dense_weight", "reads_weight"]

#: Methods that run before a model is converted, or only prepare it.
_PREPARING = ("__init__", "__setstate__", "_init", "init_", "_reset", "reset_", "_load", "tie_", "prune_")

#: Attributes of a weight that a quantized weight has, too.
_READABLE = frozenset({"device", "dequantize", "dtype", "shape"})


@functools.lru_cache(maxsize=4096)
def reads_weight(owner: type, attribute: str) -> bool:
    """Return whether methods of a class read the weight of a layer that its modules hold.

    Parameters
    ----------
    owner : type
        Class of the module that holds the layer.
    attribute : str
        Attribute under which the module holds the layer.

    Returns
    -------
    bool
        True if a method that may run in a forward pass has ``.attribute.weight``. Reads through other variables are not
        found.
    """
    # Owners of a base_layer are those of PEFT. They read its weight when they merge their adapter, not before.
    return attribute != "base_layer" and any(attribute in _uses(cls)[0] for cls in owner.__mro__)


@functools.lru_cache(maxsize=4096)
def needs_dense_weight(owner: type, attribute: str) -> bool:
    """Return whether a class reads the weight of a layer and never calls the layer, or belongs to torch.

    Modules of torch call a layer in training, and pass its weight to a fused function in evaluation.

    Parameters
    ----------
    owner : type
        Class of the module that holds the layer.
    attribute : str
        Attribute under which the module holds the layer.

    Returns
    -------
    bool
        True if such a module fails with any quantized layer.
    """
    if not reads_weight(owner, attribute):
        return False
    in_torch = any(cls.__module__.startswith("torch.nn.") and attribute in _uses(cls)[0] for cls in owner.__mro__)
    return in_torch or not any(attribute in _uses(cls)[1] for cls in owner.__mro__)


@functools.lru_cache(maxsize=1024)
def _uses(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return the attributes whose weight the methods of a class read, and those that they use otherwise."""
    read: set[str] = set()
    used: set[str] = set()
    if cls is not nn.Module:
        for name, value in vars(cls).items():
            method = getattr(value, "fget", value)
            code = getattr(getattr(method, "__wrapped__", method), "__code__", None)
            if isinstance(code, CodeType) and not name.startswith(_PREPARING):
                _collect_uses(code, read, used)
    return frozenset(read), frozenset(used)


def _collect_uses(code: CodeType, read: set[str], used: set[str]) -> None:
    """Add the attributes whose weight a function reads, and those that it uses otherwise."""
    # The source x.q.weight compiles to consecutive loads of the attributes q and weight.
    steps = list(dis.get_instructions(code))
    attributes = [step.argval if step.opname in {"LOAD_ATTR", "LOAD_METHOD"} else None for step in steps] + [None, None]
    for index, attribute in enumerate(attributes[:-2]):
        following, second = attributes[index + 1 : index + 3]
        # isinstance(x.q.weight, torch.Tensor) is false for a quantized weight, and no failure.
        tested = index >= 2 and steps[index - 2].argval == "isinstance"
        if attribute is None or (following == "weight" and (tested or second in _READABLE)):
            continue
        if following == "weight":
            read.add(attribute)
        elif following is None:
            used.add(attribute)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _collect_uses(constant, read, used)
