"""Models to and from checkpoint files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lqlora import ops
from lqlora.checkpoint import Checkpoint, StoredMatrix, load, save
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.nn.linear import LQLinear
from lqlora.nn.model import quantized_keys, replace_module, select_linears

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import nn

__all__ = ["load_model", "save_model"]

_TIED = "tied"


def save_model(path: str | os.PathLike[str], model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model with quantized layers to one file.

    Parameters
    ----------
    path : path-like
        File to write, see :func:`lqlora.save`.
    model : torch.nn.Module
        A model that :func:`quantize_model` changed.
    metadata : mapping, optional
        JSON values of your own; not under the key ``tied``.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, or the metadata uses the reserved key.
    CheckpointError
        If the file cannot be written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LQLinear)}
    if not layers:
        raise InvalidArgumentError("The model has no quantized layer to save.")
    if "" in layers:
        raise InvalidArgumentError("The model is itself a quantized layer: wrap it in torch.nn.Sequential first.")
    if _TIED in (metadata or {}):
        raise InvalidArgumentError(f"The key {_TIED!r} of the metadata is reserved.")
    matrices = {
        name: StoredMatrix(layer.weight.array, layer.lora_A, layer.lora_B, layer.scaling)
        for name, layer in layers.items()
    }
    own = quantized_keys(model)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in own:
            continue
        origin = first.setdefault(id(tensor), name)  # tied parameters are one object under two names
        if origin == name:
            tensors[name] = tensor
        else:
            tied[name] = origin
    save(path, matrices, tensors, {**(metadata or {}), _TIED: tied})


def load_model(path: str | os.PathLike[str], model: nn.Module) -> Checkpoint:
    """Load a file of :func:`save_model` into a model of the same architecture, in place.

    Parameters
    ----------
    path : path-like
        The file.
    model : torch.nn.Module
        A model with plain linear layers, of any values; changed only after the file was checked against it.

    Returns
    -------
    Checkpoint
        The content of the file.

    Raises
    ------
    CheckpointError
        If the file is broken, or does not fit the model: a layer or tensor is missing, left over or of another shape.
    """
    content = load(path)
    if not content.matrices:
        raise CheckpointError(f"{path} holds no quantized matrix.")
    try:
        linears = select_linears(model, include=content.matrices.__contains__, exclude=())
    except InvalidArgumentError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from None
    tied = _ties(path, content)
    _check_fit(path, model, linears, content, tied)
    model.requires_grad_(requires_grad=False)
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in [*content.tensors, *tied]:
            state[name].copy_(ops.convert(content.tensors[tied.get(name, name)], torch))
    for name, matrix in content.matrices.items():
        layer = LQLinear.from_decomposition(matrix, linears[name].bias)
        replace_module(model, linears[name], layer.to(linears[name].weight.device))
    return content


def _ties(path: str | os.PathLike[str], content: Checkpoint) -> dict[str, str]:
    """Read which tensors are others under a second name."""
    tied = content.metadata.get(_TIED, {})
    if not isinstance(tied, dict) or not all(origin in content.tensors for origin in map(str, tied.values())):
        raise CheckpointError(f"{path} names ties to tensors that it does not have.")
    return tied


def _check_fit(
    path: str | os.PathLike[str],
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    content: Checkpoint,
    tied: Mapping[str, str],
) -> None:
    """Compare names and shapes of everything in the file with everything in the model."""
    replaced = {id(module.weight) for module in linears.values()}
    state = model.state_dict(keep_vars=True)
    expected = {name: tuple(t.shape) for name, t in state.items() if id(t) not in replaced}
    stored = {name: tuple(content.tensors[tied.get(name, name)].shape) for name in [*content.tensors, *tied]}
    expected |= {name: tuple(linears[name].weight.shape) for name in linears}
    stored |= {name: matrix.quantized.shape for name, matrix in content.matrices.items()}
    faults = [f"{name!r} is not in the file" for name in expected if name not in stored]
    faults += [f"{name!r} is not in the model, or not of that kind" for name in stored if name not in expected]
    faults += [
        f"{name!r} is {expected[name]} in the model and {shape} in the file"
        for name, shape in stored.items()
        if name in expected and expected[name] != shape
    ]
    faults += [f"{name!r} is on the meta device and holds no data" for name, t in state.items() if t.is_meta]
    first: dict[int, str] = {}
    for name in content.tensors:
        other = first.setdefault(id(state.get(name, name)), name)
        if other != name:
            faults.append(f"{name!r} and {other!r} are one tensor in the model and two in the file")
    if faults:
        raise CheckpointError(f"{path} does not fit the model: {faults[0]} ({len(faults)} differences in all).")
