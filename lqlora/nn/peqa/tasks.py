"""Task sets of scales: copied, set, used for a while, combined, and kept in small files."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._messages import given as shown_argument
from lqlora._messages import shortened
from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint.scales import codes_fingerprint, read_scales, write_scales
from lqlora.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from lqlora.nn.adapters import Factors, fitted_factors, put_factors
from lqlora.nn.peqa.conversion import peqa_layers
from lqlora.nn.selection import unwrapped
from lqlora.nn.sharding import is_sharded, whole, write_once

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from lqlora.nn.peqa.linear import PEQALinear

__all__ = ["Scales", "combine_scales", "load_scales", "save_scales", "scales", "set_scales", "using_scales"]


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of one layer for a task, with its low-rank factors if they trained, too.

    Parameters
    ----------
    values : Tensor of float32, shape (blocks,)
        The scales.
    factors : Factors, optional
        Low-rank factors that trained beside the scales. Without them the layer keeps its own.
    """

    values: torch.Tensor
    factors: Factors | None = None


@annotated
def scales(model: nn.Module) -> dict[str, Scales]:
    """Return copies of the trainable scales of a model: the task that it learned.

    Parameters
    ----------
    model : torch.nn.Module
        A model with layers of :class:`PEQALinear`.

    Returns
    -------
    dict of str to Scales
        Scales by layer, on the device of the layer, and factors where they train, too. Training does not change these copies.

    Raises
    ------
    InvalidArgumentError
        If the model has no layer with trainable scales, or is one itself.
    """
    return {name: _copied(layer) for name, layer in peqa_layers(unwrapped(model)).items()}


def _copied(layer: PEQALinear) -> Scales:
    factors = None
    if layer.train_factors:
        factors = Factors(layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling)
    return Scales(layer.quantized.scales.detach().clone(), factors)


@annotated
def set_scales(model: nn.Module, given: Mapping[str, Scales]) -> None:
    """Copy the scales of a task into a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with layers of :class:`PEQALinear`. It is changed only after everything was checked.
    given : mapping of str to Scales
        Scales of every such layer, as :func:`scales` returns them, with factors for layers whose factors train.

    Raises
    ------
    InvalidArgumentError
        If layers are missing or left over, shapes do not fit, or factors are there only on one side.
    NonFiniteError
        If a scale or factor overflows in the dtype of the model.

    Notes
    -----
    Scales keep their identity as parameters, so an optimizer goes on with them, and with its averages of the old task.
    """
    _set(_fitted(peqa_layers(unwrapped(model)), given))


def _set(fitted: list[tuple[PEQALinear, Scales]]) -> None:
    with torch.no_grad():
        for layer, own in fitted:
            layer.quantized.scales.copy_(own.values)
    put_factors([(layer, own.factors) for layer, own in fitted if own.factors is not None])


@contextmanager
@annotated
def using_scales(model: nn.Module, given: Mapping[str, Scales]) -> Iterator[None]:
    """Use the scales of a task inside of a ``with`` block.

    Parameters
    ----------
    model : torch.nn.Module
        A model with layers of :class:`PEQALinear`.
    given : mapping of str to Scales
        Scales of every such layer, as :func:`scales` returns them.

    Yields
    ------
    None
        Inside of the block the layers hold the tensors of ``given`` as frozen parameters, without a copy where device and
        dtype agree. Afterwards they hold the same parameters as before, also after an error.

    Raises
    ------
    InvalidArgumentError
        If layers are missing or left over, shapes do not fit, or factors are there only on one side.
    NonFiniteError
        If a scale or factor overflows in the dtype of the model.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> report = lq.nn.peqa_model(model, lq.BlockFormat.parse("nf4/8:float32"))
    >>> start, x = scales(model), torch.ones(1, 8)
    >>> before = model(x)
    >>> with torch.no_grad():
    ...     model[0].quantized.scales *= 2  # as after training
    >>> with using_scales(model, start):
    ...     torch.equal(model(x), before)
    True
    """
    fitted = _fitted(peqa_layers(unwrapped(model)), given)
    old = [(layer, layer.quantized.scales, layer.lora_A, layer.lora_B, layer.scaling) for layer, _ in fitted]
    try:
        for layer, own in fitted:
            layer.quantized.scales = nn.Parameter(own.values, requires_grad=False)
            if own.factors is not None:
                layer.lora_A = nn.Parameter(own.factors.lora_A, requires_grad=False)
                layer.lora_B = nn.Parameter(own.factors.lora_B, requires_grad=False)
                layer.scaling = own.factors.scaling
        yield
    finally:
        for layer, values, inner, outer, scaling in old:
            layer.quantized.scales, layer.lora_A, layer.lora_B, layer.scaling = values, inner, outer, scaling


@annotated
def combine_scales(
    start: Mapping[str, Scales], tasks: Mapping[str, Mapping[str, Scales]], weights: Mapping[str, float]
) -> dict[str, Scales]:
    """Return the sum of several tasks: the first scales plus a weighted sum of what each task changed.

    Parameters
    ----------
    start : mapping of str to Scales
        Scales that every task started from, as :func:`scales` returned them before training.
    tasks : mapping of str to mapping of str to Scales
        Scales of each task by its name.
    weights : mapping of str to float
        Weight of each task by its name: ``{"law": 1.0, "style": 0.5}``. The weight 1 of one task alone gives this task.

    Returns
    -------
    dict of str to Scales
        ``start + weights[t] * (tasks[t] - start)``, summed over tasks in float64 and rounded once to float32.

    Raises
    ------
    InvalidArgumentError
        If names of tasks or layers differ, shapes do not fit, a weight is not a finite number, or a task has low-rank factors,
        whose product is not linear.

    Notes
    -----
    The sum of tasks that were trained one by one is an approximation, as in task arithmetic (arXiv 2212.04089). Evaluate it.
    """
    if left := weights.keys() ^ tasks.keys():
        raise InvalidArgumentError(
            f"weights must have one number for each task, but differ from tasks in {printable(list_names(sorted(map(str, left)), 3))}."
        )
    for task, weight in weights.items():
        if not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise InvalidArgumentError(
                f"weights must be finite numbers, got {shown_argument(weight)} for {printable(str(task))!r}."
            )
    first = {name: _values(own, name, None) for name, own in start.items()}
    found = {name: own.double() for name, own in first.items()}
    for task, given in tasks.items():
        _require_layers(given, start, f"scales of task {printable(str(task))!r}")
        for name, own in given.items():
            found[name] = found[name] + weights[task] * (
                _values(own, name, first[name]).to(first[name].device).double() - first[name].double()
            )
    # 1 * (t - s) + s is t up to a rounding in float64, so it is t after the rounding to float32, unless s is 2**29 times t.
    return {name: Scales(own.float()) for name, own in found.items()}


def _values(own: object, name: str, like: torch.Tensor | None) -> torch.Tensor:
    """Return scales to combine; raise if they have factors or another shape."""
    if not isinstance(own, Scales):
        raise InvalidArgumentError(f"scales of {printable(name)!r} must be Scales, got {shown_argument(own)}.")
    if own.factors is not None:
        raise InvalidArgumentError(
            f"scales of {printable(name)!r} must have no factors, whose products do not add up like scales. Train scales alone."
        )
    values: torch.Tensor = ops.convert(plain_array(own.values, f"values of {name!r}", STORABLE_FLOATS), torch).detach()
    if like is not None and values.shape != like.shape:
        raise InvalidArgumentError(
            f"values of {printable(name)!r} must have shape {tuple(like.shape)}, got {tuple(values.shape)}."
        )
    return values


def _require_layers(given: Mapping[str, object], layers: Mapping[str, object], what: str) -> None:
    if left := given.keys() ^ layers.keys():
        one = "lack" if min(left) in layers else "have"
        raise InvalidArgumentError(
            f"{what} must have the layers with trainable scales, but {one} {printable(list_names(sorted(left), 3))}."
        )


@annotated
def save_scales(path: str | os.PathLike[str], model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the trainable scales of a model to one small file, atomically.

    The file has the scales, and the factors of layers whose factors train, too. It also has a fingerprint of the rest of each
    layer, such as the codes, and is loaded beside the same rest only.

    Parameters
    ----------
    path : path-like
        File to write, see :func:`lqlora.save`.
    model : torch.nn.Module
        A model with layers of :class:`PEQALinear`.
    metadata : mapping, optional
        JSON values to store with the scales.

    Raises
    ------
    InvalidArgumentError
        If the model has no layer with trainable scales, a scale is not finite, or the metadata is not JSON.
    CheckpointError
        If the file cannot be written.
    """
    layers = peqa_layers(unwrapped(model))
    matrices = {
        name: StoredMatrix(
            layer.quantized.array, whole(layer.lora_A.detach()), whole(layer.lora_B.detach()), layer.scaling
        )
        for name, layer in layers.items()
    }
    content = path, matrices, [name for name, layer in layers.items() if layer.train_factors], metadata
    if is_sharded(layer.quantized.scales for layer in layers.values()):
        write_once(write_scales, *content)
    else:
        write_scales(*content)


@annotated
def load_scales(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load a file of :func:`save_scales` into a model with the same codes, in place.

    Parameters
    ----------
    path : path-like
        File to read.
    model : torch.nn.Module
        A model with layers of :class:`PEQALinear`, of any scales: codes, zero points, levels and frozen factors must be those of
        the model that was saved. It is changed only after the file was checked against it.

    Returns
    -------
    dict
        The metadata of the file.

    Raises
    ------
    CheckpointError
        If the file is damaged, or was saved from a model with other layers or codes.
    InvalidArgumentError
        If the model has no layer with trainable scales, or is one itself.
    """
    layers = peqa_layers(unwrapped(model))
    content = read_scales(path)
    if left := content.scales.keys() ^ layers.keys():
        one = min(left)
        where = "in the file" if one in layers else "a layer of the model with trainable scales"
        raise CheckpointError(
            shortened(f"{path} does not fit the model: {one!r} is not {where} ({len(left)} differences in all).")
        )
    other = []
    for name, own in content.scales.items():
        layer = layers[name]
        kept = None if own.factors is not None else (layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
        if codes_fingerprint(layer.quantized.array, kept) != own.base:
            other.append(name)
    if other:
        raise CheckpointError(
            shortened(
                f"{path} belongs to another quantized model: format, codes or frozen factors differ in {list_names(other, 2)}. "
                "Load the scales into the model that they were trained in."
            )
        )
    given = {
        name: Scales(own.scales, None if own.factors is None else Factors(*own.factors))
        for name, own in content.scales.items()
    }
    try:
        fitted = _fitted(layers, given)
    except InvalidArgumentError as error:
        raise CheckpointError(shortened(f"{path} does not fit the model: {error}")) from None
    _set(fitted)
    return content.metadata


def _fitted(layers: Mapping[str, PEQALinear], given: Mapping[str, Scales]) -> list[tuple[PEQALinear, Scales]]:
    """Return each layer with its new scales, in the dtype and on the device of the old ones; raise if they do not fit."""
    _require_layers(given, layers, "scales")
    fitted = []
    for name, layer in layers.items():
        own, old = given[name], layer.quantized.scales
        if not isinstance(own, Scales):
            raise InvalidArgumentError(f"scales of {printable(name)!r} must be Scales, got {shown_argument(own)}.")
        if type(layer.quantized._parameters.get("scales")) is not nn.Parameter:  # noqa: SLF001 - of torch
            raise InvalidArgumentError(
                f"model must have plain parameters as scales, but those of {printable(name)!r} are computed or spread over "
                "processes. Exchange scales before the model is sharded or parametrized."
            )
        values: torch.Tensor = ops.convert(
            plain_array(own.values, f"values of {name!r}", STORABLE_FLOATS), torch
        ).detach()
        if values.shape != old.shape:
            raise InvalidArgumentError(
                f"values of {printable(name)!r} must have shape {tuple(old.shape)}, got {tuple(values.shape)}."
            )
        if values.is_meta and not old.is_meta:
            raise InvalidArgumentError(
                f"values of {printable(name)!r} must not be on the meta device, which holds no numbers."
            )
        found = values.to(device=old.device, dtype=old.dtype)
        if found.dtype != values.dtype and not bool((found.isfinite() | ~values.to(old.device).isfinite()).all()):
            raise NonFiniteError(f"values of {printable(name)!r} must fit into float32, got entries beyond 3.4e38.")
        factors = own.factors
        if (factors is not None) != layer.train_factors:
            rule = "factors, which train in" if layer.train_factors else "no factors, which are frozen in"
            raise InvalidArgumentError(f"scales of {printable(name)!r} must have {rule} this layer of the model.")
        if factors is not None:
            ((_, factors),) = fitted_factors({name: layer}, {name: factors})
        fitted.append((layer, Scales(found, factors)))
    return fitted
