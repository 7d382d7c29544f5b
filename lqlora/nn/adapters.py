"""Sets of low-rank factors: copied, set, used for a while, and kept in small files."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._messages import shortened, shown
from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint.factors import base_fingerprint, read_factors, write_factors
from lqlora.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from lqlora.nn.model import quantized_layers
from lqlora.nn.selection import unwrapped
from lqlora.nn.sharding import is_sharded, whole, write_once

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from lqlora.nn.linear import LQLinear

__all__ = ["Factors", "factors", "load_factors", "save_factors", "set_factors", "using_factors"]

_NAMES = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class Factors:
    """Low-rank factors of one layer.

    Parameters
    ----------
    lora_A, lora_B : Tensor, shape (rank, in_features) and (out_features, rank)
        The factors.
    scaling : float
        Factor of the low-rank part.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float


@annotated
def factors(model: nn.Module) -> dict[str, Factors]:
    """Return copies of the low-rank factors of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers.

    Returns
    -------
    dict of str to Factors
        Factors by layer, on the device of the layer. Training does not change them.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, or is one itself.
    """
    return {
        name: Factors(layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling)
        for name, layer in quantized_layers(unwrapped(model)).items()
    }


@annotated
def set_factors(model: nn.Module, given: Mapping[str, Factors]) -> None:
    """Copy low-rank factors into a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers. It is changed only after all factors were checked.
    given : mapping of str to Factors
        Factors of every quantized layer, as :func:`factors` returns them. They may have other ranks than those of the model.

    Raises
    ------
    InvalidArgumentError
        If factors are missing, left over, or of shapes that do not fit.
    NonFiniteError
        If a factor overflows in the dtype of the model.

    Notes
    -----
    Parameters of the same rank keep their identity, so an optimizer goes on with them, and with its averages of the old
    factors. A layer of another rank gets new parameters, which an existing optimizer does not know.
    """
    put_factors(fitted_factors(quantized_layers(unwrapped(model)), given))


@contextmanager
@annotated
def using_factors(model: nn.Module, given: Mapping[str, Factors]) -> Iterator[None]:
    """Use other low-rank factors inside of a ``with`` block, such as those of the reference model of DPO.

    The factors of a new model belong to its approximation of the weights. So the reference of a training is the model with
    the factors that it started from, not the quantized part alone.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers.
    given : mapping of str to Factors
        Factors of every quantized layer, as :func:`factors` returns them. They may have other ranks than those of the model.

    Yields
    ------
    None
        Inside of the block the layers hold the tensors of ``given`` as frozen parameters, without a copy where device and
        dtype agree. Afterwards they hold the same parameters as before, also after an error.

    Raises
    ------
    InvalidArgumentError
        If factors are missing, left over, or of shapes that do not fit.
    NonFiniteError
        If a factor overflows in the dtype of the model.

    Notes
    -----
    Parameters are exchanged, not overwritten. A graph of autograd that was recorded before the block stays valid, and training
    flags do not change.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> report = lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/8:float32"), rank=2)
    >>> start, x = factors(model), torch.ones(1, 8)
    >>> before = model(x)
    >>> with torch.no_grad():
    ...     model[0].lora_B += 1  # as after training
    >>> with using_factors(model, start):
    ...     torch.allclose(model(x), before)
    True
    >>> torch.allclose(model(x), before)
    False
    """
    fitted = fitted_factors(quantized_layers(unwrapped(model)), given)
    old = [(layer, layer.lora_A, layer.lora_B, layer.scaling) for layer, _ in fitted]
    try:
        for layer, own in fitted:
            layer.lora_A = nn.Parameter(own.lora_A, requires_grad=False)
            layer.lora_B = nn.Parameter(own.lora_B, requires_grad=False)
            layer.scaling = own.scaling
        yield
    finally:
        for layer, inner, outer, scaling in old:
            layer.lora_A, layer.lora_B, layer.scaling = inner, outer, scaling


@annotated
def save_factors(path: str | os.PathLike[str], model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the low-rank factors of a model to one small file, atomically.

    The file also has a fingerprint of the quantized part of each layer, and the factors are loaded beside the same part only.
    Heads that trained beside the factors are not in the file. :func:`save_model` stores everything, and says what holds for
    several processes.

    Parameters
    ----------
    path : path-like
        File to write, see :func:`lqlora.save`.
    model : torch.nn.Module
        A model with quantized layers.
    metadata : mapping, optional
        JSON values to store with the factors.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, or the metadata is not JSON.
    CheckpointError
        If the file cannot be written.
    """
    layers = quantized_layers(unwrapped(model))
    has_shards = is_sharded(layer.lora_A for layer in layers.values())
    matrices = {
        name: StoredMatrix(layer.quantized.array, whole(layer.lora_A), whole(layer.lora_B), layer.scaling)
        for name, layer in layers.items()
    }
    if has_shards:
        write_once(write_factors, path, matrices, metadata)
    else:
        write_factors(path, matrices, metadata)


@annotated
def load_factors(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load a file of :func:`save_factors` into a model with the same quantized layers, in place.

    Parameters
    ----------
    path : path-like
        File to read.
    model : torch.nn.Module
        A model whose quantized parts are those of the model that was saved. It is changed only after the file was checked
        against it. :func:`set_factors` says what happens to its parameters.

    Returns
    -------
    dict
        The metadata of the file.

    Raises
    ------
    CheckpointError
        If the file is damaged, or was saved from a model with other layers or other codes and scales.
    InvalidArgumentError
        If the model has no quantized layer, or is one itself.
    NonFiniteError
        If a factor overflows in the dtype of the model.
    """
    layers = quantized_layers(unwrapped(model))
    content = read_factors(path)
    if left := content.factors.keys() ^ layers.keys():
        one = min(left)
        where = "in the file" if one in layers else "a quantized layer of the model"
        raise CheckpointError(
            shortened(f"{path} does not fit the model: {one!r} is not {where} ({len(left)} differences in all).")
        )
    if other := [
        name for name, own in content.factors.items() if base_fingerprint(layers[name].quantized.array) != own.base
    ]:
        raise CheckpointError(
            shortened(
                f"{path} belongs to another quantized model: format, codes or scales differ in {list_names(other, 2)}. "
                "Load the factors into the model that they were trained with."
            )
        )
    given = {name: Factors(own.lora_A, own.lora_B, own.scaling) for name, own in content.factors.items()}
    try:
        fitted = fitted_factors(layers, given)
    except InvalidArgumentError as error:
        raise CheckpointError(shortened(f"{path} does not fit the model: {error}")) from None
    put_factors(fitted)
    return content.metadata


def put_factors(fitted: list[tuple[LQLinear, Factors]]) -> None:
    """Copy factors into layers, or replace parameters of other shapes.

    Parameters
    ----------
    fitted : list of tuple of LQLinear and Factors
        Result of :func:`fitted_factors`.
    """
    with torch.no_grad():
        for layer, own in fitted:
            layer.scaling = own.scaling
            for key in _NAMES:
                old, new = getattr(layer, key), getattr(own, key)
                if old.shape == new.shape:
                    old.copy_(new)
                else:
                    setattr(layer, key, nn.Parameter(new.clone(), requires_grad=old.requires_grad))


def fitted_factors(layers: Mapping[str, LQLinear], given: Mapping[str, Factors]) -> list[tuple[LQLinear, Factors]]:
    """Return each layer with its new factors, in the dtype and on the device of the old ones.

    Parameters
    ----------
    layers : mapping of str to LQLinear
        Layers by name.
    given : mapping of str to Factors
        Factors of each layer.

    Returns
    -------
    list of tuple of LQLinear and Factors
        Pairs in the order of the layers.

    Raises
    ------
    InvalidArgumentError
        If factors are missing, left over, or of shapes that do not fit.
    NonFiniteError
        If a factor overflows in the dtype of its layer.
    """
    if left := given.keys() ^ layers.keys():
        what = "lack" if min(left) in layers else "have"
        raise InvalidArgumentError(
            f"factors must be those of the quantized layers of the model, but {what} {printable(list_names(sorted(left), 3))}."
        )
    fitted = []
    for name, layer in layers.items():
        own = given[name]
        if not isinstance(own, Factors):
            raise InvalidArgumentError(f"factors of {printable(name)!r} must be Factors, got {shown(own)}.")
        inner, outer = (
            ops.convert(plain_array(getattr(own, key), f"{key} of {name!r}", STORABLE_FLOATS), torch).detach()
            for key in _NAMES
        )
        if inner.shape[1:] != (layer.in_features,) or outer.shape != (layer.out_features, len(inner)):
            expected = f"({layer.out_features}, rank) and (rank, {layer.in_features})"
            found = f"{tuple(outer.shape)} and {tuple(inner.shape)}"
            raise InvalidArgumentError(
                f"factors of {printable(name)!r} must have shapes {expected} for lora_B and lora_A, got {found}."
            )
        inner, outer = _cast(inner, layer, name, "lora_A"), _cast(outer, layer, name, "lora_B")
        fitted.append((layer, Factors(inner, outer, own.scaling)))
    return fitted


def _cast(given: torch.Tensor, layer: LQLinear, name: str, key: str) -> torch.Tensor:
    """Return a factor in the dtype and on the device of that of a layer."""
    old = layer._parameters.get(key)  # noqa: SLF001 - of torch
    if type(old) is not nn.Parameter:
        kind = "a computed one" if old is None else type(old).__name__
        raise InvalidArgumentError(
            f"model must have plain parameters as factors, but {key} of {printable(name)!r} is {kind}. Exchange factors before "
            "the model is sharded or parametrized."
        )
    if given.is_meta and not old.is_meta:
        raise InvalidArgumentError(f"{key} of {printable(name)!r} must hold values, but is on the meta device.")
    found = given.to(device=old.device, dtype=old.dtype)
    # A cast to a shorter dtype may overflow. Factors of a training that diverged are passed on as they are.
    if found.dtype != given.dtype and not bool((found.isfinite() | ~given.to(old.device).isfinite()).all()):
        raise NonFiniteError(
            f"{key} of {printable(name)!r} must fit into {found.dtype}, in which the model holds its factors, got entries beyond "
            f"{torch.finfo(found.dtype).max:.3g}."
        )
    return found
