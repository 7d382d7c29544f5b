"""The classes that transformers calls to load and save models with quantized layers."""

from __future__ import annotations

import copy
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.auto import register_quantization_config as add_config
from transformers.quantizers.auto import register_quantizer as add_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lqlora._messages import shortened, shown
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint.quantization_config import METHOD, MatrixFormat, describe_matrices, read_matrices
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.integrations._expert_rows import ExpertRows, find_rows, renamings
from lqlora.nn import PEQALinear
from lqlora.nn.experts import ExpertMatrix, split_into_rows
from lqlora.nn.linear import LQLinear
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.merging import dequantize_model
from lqlora.nn.model import QUANTIZED, quantize_model, quantized_layer, replace_modules
from lqlora.nn.selection import LinearMaps
from lqlora.quantized.array import nest

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LqloraConfig", "LqloraQuantizer", "attach", "register_quantizer"]

_IS_VERSION_4 = transformers.__version__.startswith("4.")


class LqloraConfig(QuantizationConfigMixin):
    """Configuration of the quantized layers of a model, in its ``config.json``.

    Parameters
    ----------
    groups : list of dict, optional
        Formats of quantized matrices, see :mod:`lqlora.checkpoint.quantization_config`.
    format, rank : str and int, optional
        Format and rank with which a dense model is quantized.
    options : dict, optional
        Further options of :func:`lqlora.nn.quantize_model`.
    **_
        Keys that transformers adds.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]] | None = None,
        format: str | None = None,  # noqa: A002 - the key in the file
        rank: int | None = None,
        options: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.groups, self.format, self.rank, self.options = groups, format, rank, options
        if groups is None and (format is None or rank is None):
            raise InvalidArgumentError("quantization_config of lqlora must have groups, or a format and a rank.")

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry, as transformers asks configurations that may also be dicts.

        Parameters
        ----------
        key : str
            Name of the entry.
        default : object
            Value if there is none.

        Returns
        -------
        object
            The entry.
        """
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to ``config.json``.

        Returns
        -------
        dict
            Values of JSON.
        """
        own = {"groups": self.groups, "format": self.format, "rank": self.rank, "options": self.options}
        return {"quant_method": METHOD} | {
            name: copy.deepcopy(value) for name, value in own.items() if value is not None
        }


class LqloraQuantizer(HfQuantizer):
    """Loader of quantized layers for transformers.

    Parameters
    ----------
    quantization_config : LqloraConfig
        Configuration of the model.
    **kwargs
        See ``HfQuantizer`` of transformers.
    """

    requires_calibration = False
    quantization_config: Any
    requires_parameters_quantization = False
    _asked: torch.dtype | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise if transformers cannot load the model with these arguments.

        Parameters
        ----------
        *_
            Arguments that make no difference.
        device_map : str or dict, optional
            Device of each module.
        **__
            Arguments that make no difference.

        Raises
        ------
        InvalidArgumentError
            If transformers 4 is to leave layers on the disk.
        """
        if _IS_VERSION_4 and isinstance(device_map, dict) and "disk" in device_map.values():
            raise InvalidArgumentError(
                "device_map must not have 'disk' with transformers 4, which loads no buffers from there."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to load in.

        Parameters
        ----------
        dtype : torch.dtype
            Dtype that the caller asked for.

        Returns
        -------
        torch.dtype
            The same. With transformers 4, which would round scales and factors to it, it is float32, and the rest of the model is cast
            at the end.
        """
        if not _IS_VERSION_4 or not self.pre_quantized:
            return dtype
        asked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        self._asked = asked if isinstance(asked, torch.dtype) else None
        return torch.float32

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Replace layers by empty quantized ones, which transformers fills from the files."""
        if self.pre_quantized:
            replace_by_empty(model, read_matrices(self.quantization_config.to_dict(), "quantization_config"))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Quantize a dense model, or freeze one that was loaded."""
        config = self.quantization_config
        if self.pre_quantized:
            LinearMaps(model).freeze()
            layers = quantized_modules(model)
            _require_loaded(layers)
            for layer in layers.values():
                layer.lora_A.requires_grad = layer.lora_B.requires_grad = True
                if layer.bias is not None:
                    layer.bias.requires_grad = False
            if self._asked is not None:
                _cast_dense(model, self._asked)
        else:
            quantize_model(model, BlockFormat.parse(config.format), rank=config.rank, **(config.options or {}))
        attach(model, self)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, *_: Any, **__: Any) -> tuple[None, dict[str, str]]:
        """Describe the layers once more before the model is saved: they may have changed since it was loaded.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The model.
        *_, **__
            Arguments of other versions of transformers.

        Returns
        -------
        (None, dict)
            transformers takes the state dict itself.
        """
        if not getattr(model, "_hf_peft_config_loaded", False):  # it saves adapters of PEFT alone
            attach(model, self)
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:  # noqa: ARG002 - that of the layers holds
        dequantize_model(model)
        return model

    def is_serializable(self, **_: Any) -> bool:
        """Return that ``save_pretrained`` may write the model.

        Returns
        -------
        bool
            True.
        """
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the low-rank factors train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: no adapter of PEFT is needed."""
        return True


def _cast_dense(model: Any, dtype: torch.dtype) -> None:
    """Cast the parameters of a model, but those of quantized layers."""
    factors = {own for layer in model.modules() if isinstance(layer, LQLinear) for own in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter not in factors:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = model.config._pre_quantization_dtype = dtype  # noqa: SLF001 - of transformers


def register_quantizer() -> None:
    """Add both classes to the registry of transformers, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        add_config(METHOD)(LqloraConfig)
        add_quantizer(METHOD)(LqloraQuantizer)


def quantized_modules(model: nn.Module) -> dict[str, LQLinear]:
    """Return the quantized layers of a model by name; their tensors may be on the meta device.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    dict of str to LQLinear
        Layers in the order of the model.
    """
    return {name: own for name, own in model.named_modules() if isinstance(own, LQLinear)}


def _require_loaded(layers: dict[str, LQLinear]) -> None:
    """Raise if a tensor of a layer was in no file: transformers fills what is missing with what happens to be in memory."""
    # Version 5 marks the tensors that it has read. Version 4 raises an error of its own.
    for name, layer in layers.items() if not _IS_VERSION_4 else ():
        for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if not (getattr(tensor, "_is_hf_initialized", False) or tensor.is_meta):
                raise CheckpointError(
                    shortened(
                        f"{shown(f'{name}.{key}')} is in no file of the model, although quantization_config lists it."
                    )
                )


def attach(model: Any, quantizer: LqloraQuantizer | None = None) -> None:
    """Describe the layers of a model in its configuration, so that ``save_pretrained`` writes what ``from_pretrained`` reads.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model. If it has no quantized layer, the description is removed.
    quantizer : LqloraQuantizer, optional
        The one that has loaded the model.

    Raises
    ------
    InvalidArgumentError
        If there are layers that cannot be described.
    """
    layers = quantized_modules(model)
    if not layers:
        if quantizer is not None:
            quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return
    for name, own in model.named_modules():
        fault = ""
        if isinstance(own, QUANTIZED) and not isinstance(own, LQLinear):
            fault = f"is {type(own).__name__}"
        elif isinstance(own, LQLinear) and own.dropout:
            fault = "has dropout, which is not stored"
        elif isinstance(own, LQLinear) and name.endswith(".base_layer"):
            fault = "has adapters of PEFT over it"
        elif isinstance(own, PEQALinear):
            fault = "has scales that train"
        if fault:
            raise InvalidArgumentError(
                shortened(
                    f"model must have quantized layers that a folder of transformers can describe, but {shown(name)} {fault}."
                )
            )
    rows = {name: MatrixFormat(own.quantized.format, own.rank, own.scaling) for name, own in layers.items()}
    config = LqloraConfig(groups=describe_matrices(rows)["groups"])
    model.hf_quantizer = quantizer or LqloraQuantizer(config, pre_quantized=True)
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    model.hf_quantizer.pre_quantized = True
    model.is_quantized, model.quantization_method = True, METHOD
    # transformers 5 writes some tensors under the names of older versions, and arrays of experts one by one. It does not know how to do
    # that with codes and scales. Without conversions it writes the names of the state dict.
    model._weight_conversions = []  # noqa: SLF001 - no public function says it


def _with_and_without_prefix(model: Any, name: str) -> tuple[str, ...]:
    """Return a name, and those that it has in a file of a base model for a model with a head, or the other way round."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def _names_in_the_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names of modules in a model by those in its file, which may be of another class or of an older transformers."""
    modules = {name for name, _ in model.named_modules()}
    renames, found = renamings(model), {}
    for name in names:
        renamed = f"{name}.weight"
        for own in renames if name not in modules else ():
            renamed, _ = own.rename_source_key(renamed)
        renamed = renamed.removesuffix(".weight")
        found[name] = next((own for own in _with_and_without_prefix(model, renamed) if own in modules), renamed)
    return found


def _misfit(sentence: str) -> CheckpointError:
    return CheckpointError(shortened(f"quantization_config does not fit the model: {sentence}"))


def _empty_layer(row: MatrixFormat, layer: nn.Module) -> LQLinear:
    """Return a quantized layer on the meta device in place of a dense one."""
    rows, columns = matrix_of(layer).shape
    with torch.device("meta"):
        arrays = {
            key: torch.empty(shape, dtype=getattr(torch, dtype))
            for key, (dtype, shape) in row.format.stored_arrays((rows, columns)).items()
        }
        factors = torch.empty(row.rank, columns), torch.empty(rows, row.rank)
    quantized = nest(arrays, row.format, (rows, columns), 0)
    return quantized_layer(StoredMatrix(quantized, *factors, row.scaling), layer)


def _replace_arrays(maps: LinearMaps, matrices: dict[str, MatrixFormat], names: dict[str, str]) -> set[str]:
    """Replace arrays of experts by layers that the files have one by one, and return the names of their matrices."""
    stacks = {stack.name: stack for stack in maps.stacks}
    arrays: dict[str, dict[str, ExpertRows]] = {}
    for tensor, own in find_rows(maps.model, [f"{name}.weight" for name in names]).items() if stacks else ():
        if own.array in stacks:
            arrays.setdefault(own.array, {})[tensor.removesuffix(".weight")] = own
    for array, found in arrays.items():
        stack, parts = stacks[array], next(iter(found.values())).parts
        if {(own.expert, own.part) for own in found.values()} != {*product(range(len(stack.matrices)), range(parts))}:
            raise _misfit(
                f"it has a part of the experts of {shown(array)}, which the model has in one array. Decompose all of them, or none."
            )
        layers, keys, owner = {}, [""] * parts, f"{array.rpartition('.')[0]}."
        for listed, own in found.items():
            own_names = _with_and_without_prefix(maps.model, names[listed])
            below = next((name for name in own_names if name.startswith(owner)), names[listed]).removeprefix(owner)
            number, _, keys[own.part] = below.partition(".")
            if number != str(own.expert) or "." in keys[own.part]:
                raise _misfit(f"{shown(names[listed])} is not the name of a matrix of {shown(array)}.")
            rows = stack.matrices[f"{array}.{number}"].weight.detach().tensor_split(parts)[own.part]
            layers[below] = _empty_layer(matrices[listed], ExpertMatrix(rows, requires_grad=False))
        split_into_rows(stack, layers, keys)
    return {listed for found in arrays.values() for listed in found}


def _is_near(name: str, maps: LinearMaps) -> bool:
    """Return whether a model has the part of a layer that it lacks, so that the description does not fit it."""
    return name.partition(".")[0] in maps.modules


def replace_by_empty(model: nn.Module, matrices: dict[str, MatrixFormat]) -> None:
    """Replace linear layers by quantized ones on the meta device.

    Parameters
    ----------
    model : torch.nn.Module
        Model on the meta device.
    matrices : dict of str to MatrixFormat
        Formats by name of the layer.

    Raises
    ------
    CheckpointError
        If the model lacks a layer, or it cannot be quantized.
    """
    maps = LinearMaps(model, to_fill=True)
    replacements: dict[nn.Module, nn.Module] = {}
    names = _names_in_the_model(model, [name for name in matrices if name not in maps.layers])
    joined = _replace_arrays(maps, matrices, names)
    present = joined | {own for own in matrices if own in maps.layers or names.get(own) in maps.modules}
    # What the class of the model does not have, such as a decoder, is left in the file. Then other parts fit.
    is_partial = bool(present) and not any(_is_near(names.get(own, own), maps) for own in matrices.keys() - present)
    for listed, row in matrices.items():
        name = names.get(listed, listed)
        layer = maps.layers.get(name)
        if listed in joined or (layer is None and is_partial and listed not in present):
            continue
        if layer is None or name in maps.faults:
            why = f"{maps.faults[name].sentence}" if layer is not None else "is not a linear layer of the model"
            raise _misfit(f"{shown(name)} {why}.")
        replacements[layer] = _empty_layer(row, layer)
    maps.split_stacks(replacements)
    replace_modules(maps.model, replacements)
    if _IS_VERSION_4:
        # It would draw random numbers into weights of layers whose owner initializes them, as CLIP does. Version 5 looks at the tensor.
        for owner in maps.model.modules():
            if any(isinstance(child, LQLinear) for child in owner.children()):
                owner._is_hf_initialized = True  # type: ignore[assignment] # noqa: SLF001 - of transformers
