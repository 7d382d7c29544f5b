"""Conversion of models for PEQA: quantize to codes and trainable scales, train the scales of a quantized model, freeze them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lqlora._annotations import annotated
from lqlora._patterns import list_names, select
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.nn.linear import LQLinear
from lqlora.nn.merging import require_replaceable
from lqlora.nn.model import move_attributes, quantize_model, quantized_layers, replace_modules
from lqlora.nn.peqa.linear import PEQALinear
from lqlora.nn.selection import refuse_distributed, unwrapped
from lqlora.quantized._scales import with_scale_format

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor

    from torch import nn

    from lqlora._patterns import Pattern, Patterns
    from lqlora._typing import FloatName
    from lqlora.allocation import Plan
    from lqlora.formats import BlockFormat, ScaleFormat
    from lqlora.nn.report import QuantizationReport, QuantizedLayer
    from lqlora.quantized import Fit, QuantizedArray
    from lqlora.weighting import AbstractWeighting

__all__ = ["freeze_scales", "peqa_layers", "peqa_model", "train_scales"]


@annotated
def peqa_model(
    model: nn.Module,
    formats: BlockFormat | Mapping[Pattern, BlockFormat] | Callable[[str], BlockFormat] | Plan,
    *,
    include: Patterns | None = None,
    exclude: Patterns = (),
    weighting: Mapping[Pattern, AbstractWeighting] | Callable[[str], AbstractWeighting | None] | None = None,
    fit: Fit = "scale",
    executor: Executor | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> QuantizationReport:
    """Replace linear layers by :class:`PEQALinear`, in place, and freeze the rest of the body.

    Each matrix is rounded to the nearest codes, without a low-rank part. For scales beside low-rank factors call
    :func:`quantize_model` and then :func:`train_scales`.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. It is changed only after every layer was quantized.
    formats : BlockFormat, mapping of pattern to BlockFormat, callable, or Plan
        Formats of the layers, see :func:`quantize_model`. A block that is longer than a row makes one scale per channel:
        ``"affine4/1000000@-1:float32"``. Scales are float32 in the model, whatever the format says.
    include, exclude : patterns
        See :func:`select_linears`.
    weighting : mapping of pattern to AbstractWeighting, or callable, optional
        Norms in which the first scales are fitted, see :func:`quantize_model`.
    fit : {"absmax", "scale", "levels+scale"}
        Choice of the first scales, see :func:`lqlora.quantize`. The paper minimizes the squared error, as ``"scale"`` does.
    executor, progress : Executor, and bool or callable, optional
        See :func:`lqlora.cost_table`.

    Returns
    -------
    QuantizationReport
        Numbers of the quantized layers, with float32 scales, and of what was left dense.

    Raises
    ------
    InvalidArgumentError
        If no layer is selected, a pattern matches nothing, or only layers that cannot be quantized.
    NonFiniteError
        If a weight holds NaN or infinity. In this case the model is unchanged.

    References
    ----------
    PEQA, arXiv 2305.14152, section 3, equation 1.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> report = peqa_model(model, lq.BlockFormat.parse("affine4/1000000@-1:float32"))
    >>> [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    [('0.quantized.scales', 8), ('2.quantized.scales', 4)]
    """
    report = quantize_model(
        model,
        formats,
        rank=0,
        include=include,
        exclude=exclude,
        weighting=weighting,
        fit=fit,
        executor=executor,
        progress=progress,
    )
    new = quantized_layers(unwrapped(model))
    _replace(unwrapped(model), {name: new[name] for name in report.layers}, train_factors=False)
    trainable = sum(parameter.numel() for parameter in unwrapped(model).parameters() if parameter.requires_grad)
    layers = {name: _with_plain_scales(own) for name, own in report.layers.items()}
    return dataclasses.replace(report, layers=layers, trainable=trainable)


def _with_plain_scales(layer: QuantizedLayer) -> QuantizedLayer:
    """Return the numbers of a layer for scales in float32."""
    fmt = dataclasses.replace(layer.format, scales="float32")
    return dataclasses.replace(layer, format=fmt, nbytes=fmt.storage_bits(layer.shape) // 8)


@annotated
def train_scales(
    model: nn.Module, include: Patterns = "*", exclude: Patterns = (), *, train_factors: bool = False
) -> list[str]:
    """Make the scales of quantized layers trainable, in place: each :class:`LQLinear` becomes a :class:`PEQALinear`.

    No value of a weight changes. Scales that the format stores in another way are decoded to float32, so the memory of
    double-quantized weights grows by 0.373 bits per weight at blocks of 64.

    Parameters
    ----------
    model : torch.nn.Module
        A model that :func:`quantize_model` or :func:`load_model` changed.
    include, exclude : patterns
        Quantized layers, by name or pattern as in :func:`select_linears`. By default all.
    train_factors : bool, default False
        Whether the low-rank factors of these layers train, too. Otherwise they are frozen. They stay the same parameters.

    Returns
    -------
    list of str
        Names of the layers, in the order of the model. The scales of the layer ``m`` are the parameter ``m.quantized.scales``.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer or is one itself, no layer is selected, or a layer cannot be replaced, such as one with
        a forward method of its own.
    """
    refuse_distributed(model)
    model = unwrapped(model)
    layers = quantized_layers(model)
    names = select(list(layers), include, exclude, what="quantized layer")
    require_replaceable(model, {name: layers[name] for name in names if not isinstance(layers[name], PEQALinear)})
    _replace(model, {name: layers[name] for name in names}, train_factors=train_factors)
    return names


def _replace(model: nn.Module, layers: Mapping[str, LQLinear], *, train_factors: bool) -> None:
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        replacements[layer] = new = (
            layer if isinstance(layer, PEQALinear) else _moved(PEQALinear, layer, layer.quantized.array)
        )
        # Factors of rank 0 have nothing to train, so tasks leave them out.
        new.train_factors = train_factors and layer.rank > 0
        new.lora_A.requires_grad_(new.train_factors)
        new.lora_B.requires_grad_(new.train_factors)
        new.quantized.scales.requires_grad_()
    replace_modules(model, replacements)


def _moved(kind: Any, layer: LQLinear, array: QuantizedArray) -> Any:
    """Return a layer of another class with a weight, and the factors, bias, hooks and attributes of a layer."""
    new = kind(array, layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling, None, layer.dropout)
    new.quantized.dtype = layer.quantized.dtype
    new.quantized.to(layer.quantized.device)  # the array of an offloaded weight is in host memory
    # The same parameters, so that an optimizer and modules that share them go on with them.
    new.lora_A, new.lora_B, new.bias = layer.lora_A, layer.lora_B, layer.bias
    move_attributes(new, layer, without={"train_factors"})
    return new


@annotated
def freeze_scales(model: nn.Module, scales: FloatName | ScaleFormat = "float32") -> None:
    """Turn each :class:`PEQALinear` of a model into an :class:`LQLinear` with the scales of now, in place.

    The layers keep their codes. Use it before inference, or before a training of low-rank factors. Factors stay the same
    parameters, and train if they did.

    Parameters
    ----------
    model : torch.nn.Module
        A model with trainable scales. It is changed only after all scales were checked.
    scales : {"float32", "float16", "bfloat16"} or ScaleFormat
        Storage of the scales from now on. In float32 nothing is rounded. ``lq.ScaleFormat(8, 256)`` takes 8 bits for each, and
        changes each by half a percent at most of the largest in its block of 256.

    Raises
    ------
    InvalidArgumentError
        If the model has no such layer or is one itself, a scale is negative and its format has no sign for scales, or a layer
        cannot be replaced.
    FormatError
        If the storage of the scales does not suit the codebook of a layer.
    NonFiniteError
        If a scale is NaN or infinite, or beyond the range of its storage.
    """
    refuse_distributed(model)
    model = unwrapped(model)
    layers = peqa_layers(model)
    require_replaceable(model, layers)
    arrays = {}
    for name, layer in layers.items():
        own = layer.quantized.scales.detach()
        if layer.quantized.format.codebook.normalization != "signed" and own.numel() and bool((own < 0).any()):
            raise InvalidArgumentError(
                f"model must have no negative scale, but {printable(name)!r} has {int((own < 0).sum())} of {own.numel()}, "
                f"the least {float(own.min()):.3g}. Lower the learning rate, or clamp quantized.scales at 0 after each step."
            )
        array = layer.quantized.array
        arrays[layer] = with_scale_format(array, scales, name)
    replace_modules(model, {layer: _moved(LQLinear, layer, array) for layer, array in arrays.items()})


def peqa_layers(model: nn.Module) -> dict[str, PEQALinear]:
    """Return the layers with trainable scales by name.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is not wrapped.

    Returns
    -------
    dict of str to PEQALinear
        Layers in the order of the model. A layer with several names is listed under the first.

    Raises
    ------
    InvalidArgumentError
        If the model has no such layer, or is one itself.
    """
    quantized = quantized_layers(model)
    layers = {name: layer for name, layer in quantized.items() if isinstance(layer, PEQALinear)}
    if not layers:
        raise InvalidArgumentError(
            f"model must have a layer with trainable scales, got none of {len(quantized)} quantized layers "
            f"({printable(list_names(quantized, 2))}). Call train_scales first."
        )
    return layers
