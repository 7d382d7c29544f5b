"""Selection of the linear layers of a model: which are quantized by default, which are left dense, and why."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lqlora._annotations import annotated
from lqlora._patterns import as_patterns, list_names, predicate_of_any, shown_patterns
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.nn.embedding import QuantizedEmbedding, QuantizedHead
from lqlora.nn.experts import ExpertMatrix, find_stacks, split_stacks
from lqlora.nn.heads import Heads, names_above
from lqlora.nn.holders import find_holders
from lqlora.nn.linear import LQLinear
from lqlora.nn.linear_maps import computes_product_alone, has_more_than_weight_and_bias, is_linear_map
from lqlora.nn.peqa.linear import ScaledWeight

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lqlora._patterns import Pattern, Patterns
    from lqlora.nn.experts import ExpertStack

__all__ = ["DenseReason", "LinearMaps", "refuse_distributed", "select_linears", "unwrapped"]

#: Components that wrappers put into names: torch.compile, activation checkpoints, FSDP, and the layers of PEFT.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"})

#: Last components of names that are routers if experts are near.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class DenseReason:
    """Reason why a linear layer is left dense.

    Parameters
    ----------
    group : str
        Short plural noun, under which a report groups layers.
    sentence : str
        Predicate that an error adds to the name of the layer, such as ``"is on the meta device"``.
    """

    group: str
    sentence: str


_ADAPTER = DenseReason(
    "adapters of other libraries", "belongs to an adapter of another library. Quantize the layer below"
)
_HEAD = DenseReason("heads", "is an output head")
_OUTPUT = DenseReason("output embeddings", "is the output embedding of the model")
_ROUTER = DenseReason("routers", "is a router of experts")
_FORWARD = DenseReason(
    "replaced forward methods", "has a forward method of its own, which conversion would drop. Remove it first"
)
_CLASS = DenseReason("layers of other classes", "is of a class that does not compute x @ weight.T + bias alone")
_COMPUTED = DenseReason(
    "computed weights",
    "has a weight that is not its own parameter, such as one of weight_norm or a parametrization. Make it a parameter first",
)
_TENSORS = DenseReason("layers with further tensors", "has tensors or hooks of its state beside weight and bias")
_META = DenseReason("layers on the meta device", "is on the meta device and holds no values. Load the model first")
_SHARED_OUT = DenseReason(
    "weights that are spread over processes",
    "has a weight that is spread over processes, as fully_shard and parallelize_module do. Convert or load the model first",
)
_DTYPE = DenseReason(
    "weights of other kinds", "has a weight that is not a plain matrix of float16, bfloat16, float32 or float64"
)


@annotated
def select_linears(model: nn.Module, include: Patterns | None = None, exclude: Patterns = ()) -> dict[str, nn.Module]:
    """Return the linear layers of a model that :func:`quantize_model` would replace.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Names are those of the model inside ``torch.compile`` or ``DataParallel``.
    include : str, compiled regular expression, callable, or several of them, optional
        Names or their ends (``"q_proj"``), shell patterns (``"*.attention.*"``), regular expressions that match the whole
        name, or functions of the name. By default all linear layers of the body are selected, see the notes.
    exclude : str, compiled regular expression, callable, or several of them
        Patterns of layers to leave out.

    Returns
    -------
    dict of str to torch.nn.Module
        Layers by name, in the order of the model: ``torch.nn.Linear``, derived classes that compute the same, and
        ``Conv1D`` of transformers, whose weight is transposed. The matrices of experts follow.

    Raises
    ------
    InvalidArgumentError
        If nothing is selected, or a pattern matches only layers that cannot be quantized.

    Notes
    -----
    The body is everything but output embeddings, layers that share their weight with another one, heads, and routers of
    experts. A pattern that matches a layer of the body selects only such layers;
    a pattern that matches none of them selects the other layers that it matches. So ``include=["*", "lm_head"]`` adds the
    output embedding.

    Experts of transformers that are stored as one array ``"experts.up_proj"`` are matrices ``"experts.up_proj.0"``,
    ``"experts.up_proj.1"`` and so on, of shape (out_features, in_features). A pattern that matches the name of the array
    selects all of them.

    Layers that cannot be quantized are never selected: adapters of other libraries, weights that are computed from other
    tensors, layers on the meta device, and layers that compute something else.
    """
    return LinearMaps(model).choose(include, exclude)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Parameters
    ----------
    model : torch.nn.Module
        Any model, wrapped or not.

    Returns
    -------
    torch.nn.Module
        The innermost model. Its modules have the names they had before it was wrapped.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def refuse_distributed(model: nn.Module) -> None:
    """Raise if a model is wrapped in ``DistributedDataParallel``, before parameters are added to it.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Raises
    ------
    InvalidArgumentError
        If it is, or a part of it.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise InvalidArgumentError(
            "model must not be wrapped in DistributedDataParallel, which would not see new parameters. Convert it first."
        )


def _refuse_lazy(modules: Mapping[str, nn.Module]) -> None:
    """Raise if a module has no parameters before its first call, as ``torch.nn.LazyLinear``."""
    for name, module in modules.items():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise InvalidArgumentError(
                f"model must have all its parameters, but {printable(name)!r} makes its own in its first call. Call the model once first."
            )


def _inner(model: nn.Module) -> nn.Module | None:
    """Return the model directly inside a wrapper, or None."""
    children = model._modules  # noqa: SLF001 - a compiled model forwards other attributes to the model inside
    return children.get("module" if isinstance(model, DataParallel | DistributedDataParallel) else "_orig_mod")


class LinearMaps:
    """Linear layers of a model by name, each with the reason why it is left dense, if there is one.

    Parameters
    ----------
    model : torch.nn.Module
        Any model, wrapped or not.
    to_fill : bool, default False
        Whether the weights come from a file, so that layers may be on the meta device.

    Attributes
    ----------
    layers : dict of str to torch.nn.Module
        All linear layers in the order of the model, then the matrices of experts that are stored in one array. A layer with
        several names is listed under the first.
    stacks : list of ExpertStack
        Arrays of experts.
    modules : dict of str to torch.nn.Module
        All modules of the model, each under its first name.
    dense_tables : dict of str to DenseReason
        Embeddings that were to be quantized and cannot be, as far as that was asked for.
    """

    def __init__(self, model: nn.Module, *, to_fill: bool = False) -> None:
        self.model = unwrapped(model)
        self._to_fill = to_fill
        self.modules = dict(self.model.named_modules())
        _refuse_lazy(self.modules)
        self.dense_tables: dict[str, DenseReason] = {}
        self.layers = {name: m for name, m in self.modules.items() if is_linear_map(m)}
        self.stacks = find_stacks(self.modules)
        for stack in self.stacks:
            self.layers |= stack.matrices

    @functools.cached_property
    def roles(self) -> dict[str, DenseReason]:
        """Layers that are left dense by default, but can be quantized."""
        return {name: reason for name in self.layers if (reason := self._role(name))}

    @functools.cached_property
    def faults(self) -> dict[str, DenseReason]:
        """Layers that cannot be quantized."""
        return {name: reason for name in self.layers if (reason := self._fault(name))}

    @functools.cached_property
    def _before(self) -> int:
        """Number of layers that were quantized before."""
        return sum(isinstance(own, LQLinear) for own in self.modules.values())

    @property
    def are_converted(self) -> bool:
        """True if layers were quantized before, and none is left that would be by default."""
        return self._before > 0 and self.layers.keys() <= self.roles.keys() | self.faults.keys()

    @functools.cached_property
    def heads(self) -> Heads:
        """Input and output embeddings, and heads."""
        return Heads(self.modules)

    @functools.cached_property
    def _held(self) -> dict[nn.Module, str]:
        return find_holders(self.modules, self.layers.values())

    @functools.cached_property
    def _shared(self) -> dict[nn.Module, str]:
        arrays = ((stack, self._uses[_memory(getattr(stack.owner, stack.key))]) for stack in self.stacks)
        experts = {
            matrix: next(other for _, other in uses if other != stack.name)
            for stack, uses in arrays
            if len(uses) > 1
            for matrix in stack.matrices.values()
        }
        return _shared_weights(self._uses) | experts

    @functools.cached_property
    def _uses(self) -> dict[Any, list[tuple[nn.Module, str]]]:
        return _uses(self.modules)

    def uses_of(self, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
        """Return the modules that have a parameter, or another one in the same memory, with its name in each.

        Parameters
        ----------
        parameter : torch.nn.Parameter
            Parameter of the model.

        Returns
        -------
        list of (torch.nn.Module, str)
            Uses in the order of the model.
        """
        return self._uses[_memory(parameter)]

    def choose(
        self, include: Patterns | None = None, exclude: Patterns = (), parameter: str = "include"
    ) -> dict[str, nn.Module]:
        """Return the layers that patterns select, see :func:`select_linears`.

        Parameters
        ----------
        include, exclude : patterns
            Patterns as for :func:`select_linears`.
        parameter : str, default "include"
            Argument that the patterns of ``include`` come from, for errors.

        Returns
        -------
        dict of str to torch.nn.Module
            Layers in the order of the model.

        Raises
        ------
        InvalidArgumentError
            If nothing is selected, or a pattern matches only layers that cannot be quantized.
        """
        include = None if include is None else as_patterns(include, parameter)
        exclude = as_patterns(exclude, "exclude")
        is_excluded = predicate_of_any(exclude, self.layers)
        # An expert has the name of its array, too.
        plain = {
            name: _plain(name.rpartition(".")[0] if isinstance(layer, ExpertMatrix) else name)
            for name, layer in self.layers.items()
        }
        names = {name: own for name, own in plain.items() if not is_excluded(name) and not is_excluded(own)}
        body = [name for name in names if name not in self.roles and name not in self.faults]
        if include is None:
            chosen = set(body)
        else:
            in_body, chosen = frozenset(body), set()
            for pattern in include:
                # A mapping may name thousands of layers. A dict finds one without a comparison with all others.
                if isinstance(pattern, str) and pattern in names:
                    found = [pattern]
                else:
                    is_wanted = predicate_of_any([pattern], ())
                    found = [name for name, plain in names.items() if is_wanted(name) or is_wanted(plain)]
                own = in_body.intersection(found) or [name for name in found if name not in self.faults]
                if found and not own:
                    self.refuse_fault(found[0], parameter)
                chosen.update(own)
        if not chosen:
            self._refuse_nothing(include, exclude, parameter)
        return {name: layer for name, layer in self.layers.items() if name in chosen}

    def split_stacks(self, layers: Collection[nn.Module]) -> None:
        """Make matrices of experts a part of the model, where some of an array are to be replaced.

        Parameters
        ----------
        layers : collection of torch.nn.Module
            The layers to replace.
        """
        split_stacks(self.stacks_of(layers))

    def stacks_of(self, layers: Collection[nn.Module]) -> list[ExpertStack]:
        """Return the arrays of experts that some layers are matrices of.

        Parameters
        ----------
        layers : collection of torch.nn.Module
            Layers of the model.

        Returns
        -------
        list of ExpertStack
            Arrays in the order of the model.
        """
        return [stack for stack in self.stacks if any(own in layers for own in stack.matrices.values())]

    def group_of(self, parameter: str) -> str:
        """Return the group of a tensor that is left dense, for reports.

        Parameters
        ----------
        parameter : str
            Name of a parameter or buffer.

        Returns
        -------
        str
            Group of the layer that the tensor belongs to, or the kind of the tensor.
        """
        owner, _, own = parameter.rpartition(".")
        of_layer = self.faults.get(owner) or self.roles.get(owner) or self.dense_tables.get(owner)
        if reason := of_layer or self.roles.get(f"{parameter}.0"):  # an array of experts has the role of its matrices
            return reason.group
        module = self.modules.get(owner)
        quantized = LQLinear, QuantizedEmbedding, QuantizedHead
        before = any(isinstance(self.modules.get(above), quantized) for above, _ in names_above(parameter))
        groups = {
            "layers that were quantized before": before,
            _ADAPTER.group: self._is_adapter(parameter),
            "linear layers that were not selected": owner in self.layers and own == "weight",
            "embeddings": isinstance(module, nn.Embedding),
            "experts stored as one array": _is_expert_stack(parameter, module, own),
            _ROUTER.group: self._is_router(owner),
            _HEAD.group: self.heads.is_head(parameter),
        }
        return next((group for group, applies in groups.items() if applies), "norms, biases and others")

    def freeze(self) -> None:
        """Switch off the gradients of the model, except those of heads, adapters, low-rank factors and trainable scales.

        Heads of a task are often initialized anew, and adapters were made to be trained. They keep their flags. Libraries of
        adapters freeze the rest of a model themselves, so a model with adapters keeps all of its flags.
        """
        if self._adapted:
            return
        for name, module in self.modules.items():
            if not isinstance(module, LQLinear | ScaledWeight):
                for key, parameter in module.named_parameters(recurse=False):
                    if not self.heads.trains(f"{name}.{key}"):
                        parameter.requires_grad_(requires_grad=False)

    def refuse_fault(self, name: str, parameter: str) -> None:
        """Raise if a layer cannot be quantized.

        Parameters
        ----------
        name : str
            Name of the layer.
        parameter : str
            Argument that the name comes from.

        Raises
        ------
        InvalidArgumentError
            If it cannot. The message gives the reason.
        """
        if reason := self.faults.get(name):
            raise InvalidArgumentError(
                f"{parameter} must name layers that can be quantized, but {name!r} {reason.sentence}."
            )

    def _refuse_nothing(
        self, include: Sequence[Pattern] | None, exclude: Sequence[Pattern], parameter: str
    ) -> NoReturn:
        but = f" without exclude={shown_patterns(exclude)}" if exclude else ""
        left = {**self.faults, **self.roles}
        before = f" Linear layers that are quantized already: {self._before}." * (self._before > 0)
        if include is None and not self.layers:
            raise InvalidArgumentError(f"model must have a linear layer that is dense, got none.{before}")
        if include is not None or not left:
            what = "it" if include is None else shown_patterns(include)
            raise InvalidArgumentError(
                f"{parameter} must select a linear layer of the model, but {what}{but} selects none of {len(self.layers)} "
                f"({list_names(self.layers)}).{before}"
            )
        name, reason = next(iter(left.items()))
        raise InvalidArgumentError(
            f"{parameter} must name a linear layer of the model, because all {len(self.layers)}{but} are left dense by default, "
            f"such as {name!r}, which {reason.sentence}.{before}"
        )

    def _role(self, name: str) -> DenseReason | None:
        """Return why a layer is left dense by default, or None if it belongs to the body."""
        layer = self.layers[name]
        if layer in self.heads.outputs:
            return _OUTPUT
        if self.heads.is_head(name):
            return _HEAD
        if name.rpartition(".")[2] == "lm_head":
            return _OUTPUT
        if self._is_router(name):
            return _ROUTER
        if other := self._shared.get(layer):
            return DenseReason("shared weights", f"shares its weight with {other!r}")
        return None

    def _fault(self, name: str) -> DenseReason | None:
        """Return why a layer cannot be quantized, or None if it can."""
        layer = self.layers[name]
        if reason := self.common_fault(name, layer, self._held):
            return reason
        return None if isinstance(layer, ExpertMatrix) or computes_product_alone(layer) else _CLASS

    def common_fault(
        self, name: str, layer: nn.Module, held: Mapping[nn.Module, str], buffers: Collection[str] = ()
    ) -> DenseReason | None:
        """Return why a layer of any class cannot be quantized, or None.

        Parameters
        ----------
        name : str
            Name of the layer.
        layer : torch.nn.Module
            Linear layer or embedding.
        held : mapping of torch.nn.Module to str
            Layers that attributes hold beside the tree of modules, see :func:`find_holders`.
        buffers : collection of str
            Buffers that the layer may have.

        Returns
        -------
        DenseReason or None
            The first reason that applies.
        """
        if self._is_adapter(name):
            return _ADAPTER
        if "forward" in vars(layer):
            return _FORWARD
        if reason := _weight_fault(layer, to_fill=self._to_fill):
            return reason
        if has_more_than_weight_and_bias(layer, buffers):
            return _TENSORS
        if holder := held.get(layer):
            return DenseReason(
                "layers held elsewhere",
                f"is also held by {holder}, which conversion would not change. Look the layer up when you call it",
            )
        return None

    @functools.cached_property
    def _adapted(self) -> dict[str, bool]:
        """Modules that hold a layer and its adapters, with whether the layer is ``base_layer``."""
        children = {name: module._modules for name, module in self.modules.items()}  # noqa: SLF001
        return {
            name: "base_layer" in own
            for name, own in children.items()
            if "base_layer" in own or ("modules_to_save" in own and "original_module" in own)
        }

    def _is_adapter(self, name: str) -> bool:
        """Return whether a module or parameter is part of an adapter, but not of the layer below it."""
        return bool(self._adapted) and any(
            above in self._adapted and not (self._adapted[above] and own == "base_layer")
            for above, own in names_above(name)
        )

    def _is_router(self, name: str) -> bool:
        """Return whether a module chooses experts."""
        parts = name.split(".")
        if "router" in parts or (name and "Router" in type(self.modules.get(name)).__name__):
            return True
        if parts[-1] not in _ROUTERS:
            return False
        near = [self.modules[above] for above, _ in list(names_above(name))[:2]]
        return any("expert" in key for module in near for key in (*module._modules.keys(), *module._parameters.keys()))  # noqa: SLF001


def _weight_fault(layer: nn.Module, *, to_fill: bool) -> DenseReason | None:
    """Return why the weight of a layer cannot be decomposed, or filled from a file, or None."""
    # A computed weight is an attribute, but no parameter of the layer.
    weight, bias = (layer._parameters.get(key) for key in ("weight", "bias"))  # noqa: SLF001 - of torch
    if weight is None or (bias is None and getattr(layer, "bias", None) is not None):
        return _COMPUTED
    if not to_fill and (weight.is_meta or (bias is not None and bias.is_meta)):
        return _META
    if hasattr(weight, "full_tensor"):
        return _SHARED_OUT
    plain = _is_dense(weight) and weight.dtype in _FLOATS and weight.ndim == 2
    return None if plain else _DTYPE


def _is_dense(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a plain dense tensor with entries."""
    return type(parameter) is nn.Parameter and parameter.layout == torch.strided and parameter.numel() > 0


def _has_memory(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a plain dense tensor with entries in memory."""
    return _is_dense(parameter) and not parameter.is_meta


def _is_expert_stack(name: str, module: nn.Module | None, key: str) -> bool:
    """Return whether a parameter holds the matrices of several experts."""
    array = getattr(module, key, None)
    return (
        isinstance(array, torch.Tensor) and array.ndim > 1 and ("expert" in name or "Expert" in type(module).__name__)
    )


def _uses(modules: Mapping[str, nn.Module]) -> dict[Any, list[tuple[nn.Module, str]]]:
    """Return the modules that have each parameter, with its name in each."""
    uses: dict[Any, list[tuple[nn.Module, str]]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():  # noqa: SLF001 - named_parameters leaves out second names
            if parameter is not None:
                uses.setdefault(_memory(parameter), []).append((module, f"{name}.{key}"))
    return uses


def _memory(parameter: nn.Parameter) -> Any:
    # Two parameters may share memory. Subclasses of tensors and tensors without memory are known by identity.
    return (parameter.device, parameter.data_ptr()) if _has_memory(parameter) else id(parameter)


def _shared_weights(uses: Mapping[Any, Sequence[tuple[nn.Module, str]]]) -> dict[nn.Module, str]:
    """Return the modules whose weight is a parameter of another module too, with the other name."""
    shared: dict[nn.Module, str] = {}
    for own in uses.values():
        for module, name in own if len(own) > 1 else ():
            if name.endswith(".weight"):
                shared[module] = next(other for user, other in own if other != name)
    return shared


def _plain(name: str) -> str:
    """Return a name without the components that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
