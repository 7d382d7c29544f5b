"""PEFT over quantized models: layers of LoRA, DoRA and IA3, the tuners that choose them, and prompts over quantized embeddings."""

from __future__ import annotations

import functools
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, PeftType
from peft.tuners import ia3, lora
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from torch import nn

from lqlora._messages import shown
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn import LQLinear, QuantizedEmbedding, QuantizedHead, QuantizedTensor, merged_weight
from lqlora.nn.experts import ExpertMatrix, Experts, JoinedExperts, join_dense
from lqlora.nn.linear_maps import is_linear_map
from lqlora.nn.merging import dense_layer, usual_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["QuantizedIA3Linear", "QuantizedIA3Model", "QuantizedLoraLinear", "QuantizedLoraModel", "register_tuners"]

#: Initializations that leave the weight below as it is. The others subtract a part of it, or read it as a parameter.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")

#: Attributes by which accelerate replaces the forward method of a layer, which would go on with the quantized one.
_OF_CALLS = frozenset({"forward", "_hf_hook", "_old_forward"})


class _DenseView(nn.Module):
    """Weight and bias of a quantized layer as DoRA reads them."""

    def __init__(self, layer: LQLinear) -> None:
        super().__init__()
        weight = merged_weight(layer)
        if layer.lora_A.requires_grad or layer.lora_B.requires_grad:
            # The value is zero, and its gradient is that of the low-rank part, which the merged weight does not have.
            part = layer.scaling * (layer.lora_B @ layer.lora_A)
            weight = weight + (part - part.detach())
        self.weight = weight
        self.bias = layer.bias


def _readable(layer: nn.Module) -> nn.Module:
    return _DenseView(layer) if isinstance(layer, LQLinear) else layer


class _Dora(DoraLinearVariant):  # type: ignore[misc] # the checker of types skips PEFT
    """DoRA, which reads the norms of the rows of the weight in every call."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLinearLayer(fan_in_fan_out=False)
        layer.update_layer(
            base_layer=_readable(module.get_base_layer()),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        dropout = module.lora_dropout[active_adapter]
        drops = module.training and not isinstance(dropout, nn.Identity)
        added: torch.Tensor = module.lora_magnitude_vector[active_adapter](
            dropout(x) if drops else x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=_readable(module.get_base_layer()),
            base_result=None if drops else result,
            adapter_name=active_adapter,
        )
        return result + added


class _MergingIntoDense:
    """Merging of adapters into a dense layer that stands in for the quantized one until they are unmerged.

    Codes never change: rounding the sum to them again would lose most of what the adapters learned.
    """

    #: Dtype of the dense layer. The tuner sets it to that of the model.
    merged_dtype = torch.float32

    #: The quantized layer while adapters are merged. In a tuple, because a module would be registered and saved twice.
    _below: tuple[LQLinear, ...] = ()

    # Of PEFT's layers.
    base_layer: nn.Module
    merged_adapters: list[str]

    def _merge_into(
        self, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias with adapters merged, in their order."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002, FBT001, FBT002 - PEFT's
        """Put a dense layer with the sum in the place of the quantized one. It is checked for NaN and infinity always."""
        new = check_adapters_to_merge(self, adapter_names)
        if not new:
            return
        layer = self._below[0] if self._below else self.base_layer
        if not isinstance(layer, LQLinear):
            raise InvalidArgumentError(
                f"adapters must be merged before dequantize_model, but {shown(new)} is over a layer that is dense now. Call unload, and "
                "load the adapters again over the dense model."
            )
        adapters = [*self.merged_adapters, *new]
        with torch.no_grad():
            weight, bias = self._merge_into(merged_weight(layer), layer.bias, adapters)
            weight = weight.to(self.merged_dtype)
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"adapters must give a merged weight that {self.merged_dtype} holds, got NaN or infinity from {shown(adapters)}."
            )
        dense = dense_layer(layer, weight, bias, without=_OF_CALLS)
        self._below = (layer,)
        self.base_layer = dense.train(layer.training)
        self.merged_adapters = adapters

    def unmerge(self) -> None:
        """Put the quantized layer back, the same as before."""
        if self._below:
            (layer,), self._below = self._below, ()
            self.base_layer = layer.to(cast("torch.Tensor", self.base_layer.weight).device)
            self.merged_adapters = []


class QuantizedLoraLinear(_MergingIntoDense, LoraLinear):  # type: ignore[misc]
    """LoRA and DoRA of PEFT over a quantized layer.

    Parameters
    ----------
    base_layer : LQLinear
        Quantized layer. Its own factors are a part of the weight below.
    adapter_name : str
        Name of the first adapter.
    config : LoraConfig
        Settings of PEFT.
    r, lora_alpha : int
        Rank and alpha of this layer.
    **kwargs
        What PEFT passes on.
    """

    def __init__(
        self, base_layer: LQLinear, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT warns of classes that it does not know
            lora.LoraLayer.__init__(self, base_layer, **kwargs)
        # A quantized layer is (out_features, in_features), also where the model stored the transposed matrix.
        self.fan_in_fan_out = self.is_target_conv_1d_layer = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Variants of LoRA that work over a quantized layer."""
        return {(): None, ("use_dora",): _Dora}

    @property
    def expert_weight(self) -> torch.Tensor:
        """Weight with the active adapters. The owner of the experts multiplies by it, and does not call the layer."""
        if self._forward_pre_hooks:
            raise InvalidArgumentError(
                "adapter_names must not be passed to a model with adapters of experts, which see the tokens of all examples "
                "together. Run the examples of each adapter by themselves."
            )
        layer: Any = self.base_layer
        weight: torch.Tensor = layer.weight
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or self.disable_adapters or not adapters:
            return weight
        if not isinstance(layer, LQLinear):  # dequantized below its adapters
            return torch.stack([weight, *(self.get_delta_weight(name).to(weight) for name in adapters)]).sum(dim=0)
        # W = Q + s B A + sum_i s_i B_i A_i, and a sum of products is the product of the factors side by side.
        lora_A = [layer.lora_A, *(self.lora_A[name].weight for name in adapters)]
        lora_B = [layer.scaling * layer.lora_B, *(self.scaling[name] * self.lora_B[name].weight for name in adapters)]
        dtype = layer.lora_A.dtype
        left, right = (torch.cat([own.to(dtype) for own in parts], dim) for dim, parts in enumerate((lora_A, lora_B)))
        return QuantizedTensor(layer.quantized.operands, left, right, dtype=weight.dtype)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter, or replace one."""
        if config.init_lora_weights not in _INITIALIZATIONS:
            raise InvalidArgumentError(
                f"init_lora_weights must be True, False, 'gaussian', 'orthogonal' or 'eva' over a quantized layer, got "
                f"{shown(config.init_lora_weights)}, which changes the weight below. Use lqlora.decompose for such a start."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _merge_into(
        self, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        base = weight
        for name in adapters:
            if name not in self.lora_A:
                continue
            delta = self.get_delta_weight(name).to(weight)
            weight = weight + delta
            if name in self.lora_variant:
                magnitude = self.lora_magnitude_vector[name]
                factor = magnitude.weight / magnitude.get_weight_norm(base, delta, scaling=1)
                weight = factor.view(-1, 1) * weight
            if self.lora_bias[name]:
                added = self.lora_B[name].bias * self.scaling[name]
                bias = added if bias is None else bias + added
        return weight, bias


class QuantizedIA3Linear(_MergingIntoDense, IA3Linear):  # type: ignore[misc]
    """IA3 of PEFT over a quantized layer.

    Parameters
    ----------
    base_layer : LQLinear
        Quantized layer. Its own factors are a part of the weight below.
    adapter_name : str
        Name of the first adapter.
    config : IA3Config
        Settings of PEFT.
    is_feedforward : bool, default False
        Scale the input, not the output.
    """

    def __init__(
        self,
        base_layer: LQLinear,
        adapter_name: str,
        config: Any,
        is_feedforward: bool = False,  # noqa: FBT001, FBT002 - PEFT's
    ) -> None:
        # What the constructor of PEFT's class does after it has looked at the class of the layer below.
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self.is_feedforward = is_feedforward
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.fan_in_fan_out = self.is_target_conv_1d_layer = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def _merge_into(
        self, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        for name in adapters:
            if name not in self.ia3_l:
                continue
            scale = self.ia3_l[name].to(weight)
            weight = weight * scale
            if bias is not None and not self.is_feedforward:
                bias = bias * scale.flatten()
        return weight, bias


class _Tuner:
    """Shared part of the tuners: ``"all-linear"`` finds quantized layers, and merging uses the dtype of the model.

    Quantized embeddings are refused among the modules to train.
    """

    # Of PEFT's tuners.
    model: nn.Module
    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the layers that its settings name."""
        config = self.peft_config[adapter_name]
        targets = config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            config.target_modules = _linear_names(model)
        _require_trainable(model, config)
        _refuse_joined(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters until they are unmerged."""
        self._choose_dtype()
        super().merge_adapter(*args, **kwargs)  # type: ignore[misc]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self._choose_dtype()
        found = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[misc]
        join_dense(self.model)  # the arrays that transformers saves and loads
        return found

    def _choose_dtype(self) -> None:
        adapted = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        dtype = usual_dtype(self.model, {inner for layer in adapted for inner in layer.modules()})
        for layer in adapted:
            if isinstance(layer, _MergingIntoDense):
                layer.merged_dtype = dtype

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to a layer, or to each expert of an array that was quantized."""
        pairs = [(target_name, target)] if not isinstance(target, Experts) else [*target.named_children()]
        parent = target if isinstance(target, Experts) else parent
        for name, layer in pairs:
            if isinstance(parent, Experts):
                _require_for_experts(config, layer)
            super()._create_and_replace(config, adapter_name, layer, name, parent, current_key, **kwargs)  # type: ignore[misc]

    def _inject_parameters(self, peft_config: Any, model: nn.Module, adapter_name: str, **kwargs: Any) -> list[str]:
        """Add an adapter to parameters, and to arrays of experts that were parameters before they were quantized."""
        ends = tuple(f".{name}" for name in peft_config.target_parameters)
        arrays = {
            name: own for name, own in model.named_modules() if isinstance(own, Experts) and f".{name}".endswith(ends)
        }
        for name, own in arrays.items():
            self._create_and_replace(peft_config, adapter_name, own, name.rpartition(".")[2], model, current_key=name)
        return [*arrays, *super()._inject_parameters(peft_config, model, adapter_name, **kwargs)]  # type: ignore[misc]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, LQLinear):  # unloaded, and complete
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]


def _joined_arrays(model: nn.Module) -> list[str]:
    """Return the names of arrays of experts in whose place each expert has layers of its own."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, own in vars(module).items()
        if isinstance(own, JoinedExperts)
    ]


def _refuse_joined(model: nn.Module, config: Any) -> None:
    """Raise if an adapter is for experts whose layers were read one by one: PEFT would save it, and not find them again."""
    arrays = _joined_arrays(model)
    owners = tuple(f"{name.rpartition('.')[0]}." for name in arrays)
    layers = [name for name, own in model.named_modules() if isinstance(own, LQLinear) and name.startswith(owners)]
    ends = tuple(f".{name}" for name in getattr(config, "target_parameters", None) or ())
    found = [name for name in arrays if f".{name}".endswith(ends)] if ends else []
    if config.target_modules:
        found += [name for name in layers if check_target_module_exists(config, name)]
    if found:
        raise InvalidArgumentError(
            f"config must not have adapters for {shown(found[0])}, because its experts are quantized one by one. Train the low-rank factors of "
            "their quantized layers, or leave the experts out."
        )


def _require_for_experts(config: Any, target: nn.Module) -> None:
    """Raise if an adapter of an expert would do something else than to add a product of two factors to a quantized weight."""
    if not isinstance(target, LQLinear | QuantizedLoraLinear):
        raise InvalidArgumentError(
            "target_modules and target_parameters must name experts that are quantized, all of an array, got a dense one. Quantize "
            "it, too, or leave it out."
        )
    # DoRA scales a sum, dropout changes the rows of one part, and a bias is added to a product.
    others = ("use_dora", "lora_dropout", "lora_bias", "alora_invocation_tokens")
    wrong = next((name for name in others if getattr(config, name, None)), None)
    if config.peft_type != PeftType.LORA or wrong:
        seen = shown(config.peft_type.value) if wrong is None else f"{wrong}={shown(getattr(config, wrong))}"
        raise InvalidArgumentError(
            f"config must be of LoRA without dropout, bias and magnitudes for experts that are stored in one array, got {seen}. "
            "Change it, or leave the experts out with exclude_modules."
        )


def _require_trainable(model: nn.Module, config: Any) -> None:
    """Raise if PEFT would train copies of modules with a quantized table, or rows of them, which have no parameter to train."""
    tokens = getattr(config, "trainable_token_indices", None)
    names = {
        "modules_to_save": tuple(config.modules_to_save or ()),
        "trainable_token_indices": tuple(tokens) if isinstance(tokens, dict) else (),
    }
    embedding = _input_embedding(model) if isinstance(tokens, list) else None
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedEmbedding | QuantizedHead):
            wrong = next((option for option, ends in names.items() if name.endswith(ends)), None)
            if wrong or module is embedding:
                raise InvalidArgumentError(
                    f"{wrong or 'trainable_token_indices'} must name modules that can train, but {shown(name)} has a quantized table, "
                    "which is frozen. Pass embeddings=None to quantize_model to train it."
                )


def _linear_names(model: nn.Module) -> set[str]:
    """Return the names of the linear layers of a model, quantized or adapted ones among them, without the output embedding."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {output} if output is not None else {getattr(model, name, None) for name in ("score", "classifier")}
    modules = dict(model.named_modules())
    adapted = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    inside = {inner for name in adapted for inner in modules[name].modules()} - {modules[name] for name in adapted}
    # PEFT would look for the arrays that experts one by one had been.
    owners = {name.rpartition(".")[0] for name in _joined_arrays(model)}
    left_out |= {own for name, own in modules.items() if any(name.startswith(f"{owner}.") for owner in owners)}
    return {
        name
        for name, module in modules.items()
        if (
            isinstance(module, LQLinear)
            or (is_linear_map(module) and not isinstance(module, ExpertMatrix))
            or ("Linear" in type(module).__name__ and name in adapted)
        )
        and module not in inside
        and module not in left_out
    }


class QuantizedLoraModel(_Tuner, lora.LoraModel):  # type: ignore[misc]
    """LoRA and DoRA of PEFT for models that may have quantized layers."""

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, LQLinear):
            return QuantizedLoraLinear(target, adapter_name, lora_config, **kwargs)
        found: nn.Module = lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)  # noqa: SLF001
        return found


class QuantizedIA3Model(_Tuner, ia3.IA3Model):  # type: ignore[misc]
    """IA3 of PEFT for models that may have quantized layers."""

    @staticmethod
    def _create_new_module(ia3_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, LQLinear):
            return QuantizedIA3Linear(target, adapter_name, ia3_config, is_feedforward=kwargs["is_feedforward"])
        found: nn.Module = ia3.IA3Model._create_new_module(ia3_config, adapter_name, target, **kwargs)  # noqa: SLF001
        return found


def _input_embedding(model: nn.Module) -> Any:
    """Return the module of the input embedding, or None if the model has none or does not tell."""
    try:
        return cast("Any", model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def _listed_embedding(model: nn.Module) -> Iterator[None]:
    """List the table of a quantized input embedding among the parameters of a model, where PEFT looks for it by its size."""
    embedding = _input_embedding(model)
    if not isinstance(embedding, QuantizedEmbedding):
        yield
        return
    # One number that is expanded: PEFT reads the shape, and the device and dtype of the model from its first parameter. The
    # class has a property of this name, so ``embedding.weight`` stays the quantized table.
    table = embedding.quantized
    number = torch.empty((1, 1), device=table.device, dtype=table.dtype).expand(table.shape)
    parameters = embedding._parameters  # noqa: SLF001 - of torch; register_parameter refuses names of properties
    parameters["weight"] = nn.Parameter(number, requires_grad=False)
    try:
        yield
    finally:
        del parameters["weight"]


def _finding_embeddings(setup: Callable[[PeftModel, str], None]) -> Callable[[PeftModel, str], None]:
    """Return PEFT's method that makes the encoder of prompts, as one that finds quantized embeddings, too."""

    @functools.wraps(setup)
    def _setup(self: PeftModel, adapter_name: str) -> None:
        with _listed_embedding(self.base_model):
            setup(self, adapter_name)

    return _setup


def register_tuners() -> None:
    """Put the tuners into PEFT's table of them, and let its prompts find quantized embeddings."""
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is not QuantizedLoraModel:
        PeftModel._setup_prompt_encoder = _finding_embeddings(PeftModel._setup_prompt_encoder)  # noqa: SLF001 - has no other entrance
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QuantizedLoraModel
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.IA3] = QuantizedIA3Model
