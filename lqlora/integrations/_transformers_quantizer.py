"""The classes that transformers calls to load and save models with quantized layers."""

from __future__ import annotations

import copy
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
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.integrations.quantization_config import METHOD, MatrixFormat, describe_matrices, read_matrices
from lqlora.nn.linear import LQLinear
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.merging import dequantize_model
from lqlora.nn.model import quantize_model, quantized_layer, quantized_layers, replace_modules
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
        Formats of quantized matrices, see :mod:`lqlora.integrations.quantization_config`.
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
        self._asked = dtype if isinstance(dtype, torch.dtype) else None
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
            for layer in model.modules():
                if isinstance(layer, LQLinear):
                    layer.lora_A.requires_grad = layer.lora_B.requires_grad = True
            if self._asked is not None:
                _cast_dense(model, self._asked)
        else:
            quantize_model(model, BlockFormat.parse(config.format), rank=config.rank, **(config.options or {}))
        attach(model, self)
        return model

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


def attach(model: Any, quantizer: LqloraQuantizer | None = None) -> None:
    """Describe the layers of a model in its configuration, so that ``save_pretrained`` writes what ``from_pretrained`` reads.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model with quantized layers.
    quantizer : LqloraQuantizer, optional
        The one that has loaded the model.
    """
    layers = quantized_layers(model)
    rows = {name: MatrixFormat(own.quantized.format, own.rank, own.scaling) for name, own in layers.items()}
    config = LqloraConfig(groups=describe_matrices(rows)["groups"])
    model.hf_quantizer = quantizer or LqloraQuantizer(config, pre_quantized=True)
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    model.hf_quantizer.pre_quantized = True
    model.is_quantized, model.quantization_method = True, METHOD
    # transformers 5 writes some tensors under the names of older versions, and arrays of experts one by one. It does not know how to do
    # that with codes and scales. Without conversions it writes the names of the state dict.
    model._weight_conversions = []  # noqa: SLF001 - no public function says it


def _names_in_the_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names of layers in a model by those in its file, which may be of an older version of transformers."""
    if _IS_VERSION_4:
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - of transformers 5
    from transformers.core_model_loading import WeightRenaming  # noqa: PLC0415

    renamings = [own for own in get_model_conversion_mapping(model) if isinstance(own, WeightRenaming)]
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        renamed = f"{name}.weight"
        for own in renamings if name not in modules else ():
            renamed, _ = own.rename_source_key(renamed)
        found[name] = renamed.removesuffix(".weight")
    return found


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
    for listed, row in matrices.items():
        name = names.get(listed, listed)
        layer = maps.layers.get(name)
        if layer is None or name in maps.faults:
            why = f"{maps.faults[name].sentence}" if layer is not None else "is not a linear layer of the model"
            if layer is None and ".experts." in name:
                why += ", which keeps experts in one array. Decompose the model without them (exclude='*.experts.*')"
            raise CheckpointError(shortened(f"quantization_config does not fit the model: {shown(name)} {why}."))
        rows, columns = matrix_of(layer).shape
        with torch.device("meta"):
            arrays = {
                key: torch.empty(shape, dtype=getattr(torch, dtype))
                for key, (dtype, shape) in row.format.stored_arrays((rows, columns)).items()
            }
            factors = torch.empty(row.rank, columns), torch.empty(rows, row.rank)
        quantized = nest(arrays, row.format, (rows, columns), 0)
        replacements[layer] = quantized_layer(StoredMatrix(quantized, *factors, row.scaling), layer)
    maps.split_stacks(replacements)
    replace_modules(maps.model, replacements)
    if _IS_VERSION_4:
        # It would draw random numbers into weights of layers whose owner initializes them, as CLIP does. Version 5 looks at the tensor.
        for owner in maps.model.modules():
            if any(isinstance(child, LQLinear) for child in owner.children()):
                owner._is_hf_initialized = True  # type: ignore[assignment] # noqa: SLF001 - of transformers
