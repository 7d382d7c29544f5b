"""Experts whose matrices a model stores in one array: each becomes a layer of its own."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn import functional

from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "ExpertMatrix",
    "ExpertStack",
    "Experts",
    "JoinedExperts",
    "find_stacks",
    "join_dense",
    "split_for_a_while",
    "split_into_rows",
    "split_stacks",
]


class ExpertMatrix(nn.Linear):
    """Matrix of one expert, a view of the array of all experts.

    The owner of the array reads the weight and multiplies by it. While hooks of the forward pass are registered on the layer,
    the product is a call of the layer, so that the hooks see its input and output.

    Parameters
    ----------
    weight : Tensor, shape (out_features, in_features)
        The view.
    requires_grad : bool
        Whether the array trains.
    """

    def __init__(self, weight: torch.Tensor, *, requires_grad: bool) -> None:
        nn.Module.__init__(self)  # without the random matrix of nn.Linear
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)
        self.register_parameter("bias", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
        """Return the product that the owner computes, which may cast the weight to the dtype of rows.

        Parameters
        ----------
        input : Tensor, shape (..., in_features)
            Rows.

        Returns
        -------
        Tensor, shape (..., out_features)
            Product.
        """
        return functional.linear(input, self.weight.to(input.dtype))


class Experts(nn.ModuleList):
    """Matrices of the experts of one layer. An index gives the weight, as that of the array does.

    Parameters
    ----------
    matrices : iterable of torch.nn.Module
        One layer for each expert.
    config : object
        Configuration that the owner had.
    is_transposed : bool
        Whether the owner stores matrices of shape (in_features, out_features).
    """

    def __init__(self, matrices: Iterable[nn.Module], config: Any, *, is_transposed: bool) -> None:
        super().__init__(matrices)
        self.config, self.is_transposed = config, is_transposed

    # As torch.compiler.disable, which would import the compiler with this module: it cannot read an index that is a tensor.
    @_disable_dynamo
    def __getitem__(self, index: Any) -> Any:
        """Return the weight of an expert: dense, or a :class:`QuantizedTensor`."""
        layer: Any = self._modules[str(range(len(self))[int(index)])]
        # A layer of another library may add to the weight of the layer below.
        weight = layer.expert_weight if hasattr(type(layer), "expert_weight") else layer.weight
        if isinstance(layer, nn.Linear) and layer._forward_hooks:  # noqa: SLF001 - no public function tells
            weight = _watched(weight.detach(), layer, is_transposed=False)
        return weight.mT if self.is_transposed else weight


class JoinedExperts:
    """Experts of which each has several layers, whose outputs stand side by side. An index gives the weight, as that of the array does.

    It stands for an array whose experts are one by one in files. The layers are modules of the owner, under the names that they have
    in the files: ``"3.gate_proj"`` and ``"3.up_proj"``.

    Parameters
    ----------
    owner : torch.nn.Module
        Module of the array.
    keys : sequence of str
        Names of the layers of an expert, in the order of their rows.
    experts : int
        Number of experts.
    config : object
        Configuration that the owner had.
    """

    #: What transformers looks for before it draws random numbers into an array that was in no file.
    _is_hf_initialized = True

    def __init__(self, owner: nn.Module, keys: Sequence[str], experts: int, config: Any) -> None:
        self.owner, self.keys, self.experts, self.config = owner, tuple(keys), experts, config

    def layers(self, expert: int) -> list[nn.Module]:
        """Return the layers of an expert.

        Parameters
        ----------
        expert : int
            Index.

        Returns
        -------
        list of torch.nn.Module
            Layers in the order of their rows.
        """
        return [self.owner.get_submodule(f"{expert}.{key}") for key in self.keys]

    @_disable_dynamo
    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the weight of an expert: products with it are calls of its layers."""
        return _joined_rows(self.layers(range(self.experts)[int(index)]))


class _Watched(torch.Tensor):
    """Weight of an expert while hooks watch its layer. A product with it is a call of the layer."""

    layer: Callable[[torch.Tensor], torch.Tensor]
    is_transposed: bool

    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls, func: Callable[..., Any], _: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the layer for a product, and refuse functions that compute other tensors from the weight."""
        kwargs = kwargs or {}
        if (found := _call_of_layer(func, args, kwargs)) is not None:
            return found
        own = next(x for x in _entries((args, *kwargs.values())) if isinstance(x, _Watched))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - what torch documents for subclasses
            found = func(*args, **kwargs)
        if not any(isinstance(x, torch.Tensor) for x in _entries([found])):
            return found  # such as the shape
        # A view of all entries, or a cast of them, is known by its strides.
        layouts = [(own.shape, own.stride()), (own.shape[::-1], own.stride()[::-1])]
        is_whole = isinstance(found, torch.Tensor) and (found.shape, found.stride()) in layouts
        if is_whole and (found.data_ptr() == own.data_ptr() or (func in _CASTS and found.is_floating_point())):
            is_turned = (found.shape, found.stride()) != layouts[0]
            return _watched(found, own.layer, is_transposed=own.is_transposed != is_turned)
        raise InvalidArgumentError(
            f"model must multiply rows by the matrices of experts while statistics are collected, but calls {_name_of(func)} with one "
            f"of shape {tuple(own.shape)}. Exclude the experts."
        )


class _JoinedRows(_Watched):
    """Weight of several layers, without values. A product with it calls all of them."""

    @classmethod
    @_disable_dynamo
    def __torch_function__(
        cls, func: Callable[..., Any], _: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the layers for a product, and refuse functions that need values."""
        kwargs = kwargs or {}
        if (found := _call_of_layer(func, args, kwargs)) is not None:
            return found
        own = next(x for x in _entries((args, *kwargs.values())) if isinstance(x, _JoinedRows))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as above
            if func in _CASTS:
                return own
            found = func(*args, **kwargs)
        if not any(isinstance(x, torch.Tensor) for x in _entries([found])):
            return found  # such as the shape
        if func in _TURNS:
            turned: _JoinedRows = found.as_subclass(_JoinedRows)
            turned.layer, turned.is_transposed = own.layer, not own.is_transposed
            return turned
        raise InvalidArgumentError(
            f"model must multiply rows by the matrices of its experts, which are quantized in parts, but calls {_name_of(func)} with one of "
            f"shape {tuple(own.shape)}. Decompose it without them (exclude='*.experts.*')."
        )


def _joined_rows(layers: Sequence[nn.Module]) -> torch.Tensor:
    rows, columns = sum(int(cast("Any", own).out_features) for own in layers), int(cast("Any", layers[0]).in_features)
    found = torch.empty((rows, columns), dtype=cast("Any", layers[0]).weight.dtype, device="meta").as_subclass(
        _JoinedRows
    )
    found.layer = lambda x: torch.cat([own(x) for own in layers], -1)
    found.is_transposed = False
    return found


def _entries(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values, and those of lists and tuples among them."""
    for value in values:
        yield from _entries(value) if isinstance(value, list | tuple) else (value,)


def _watched(weight: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor], *, is_transposed: bool) -> _Watched:
    found = weight.as_subclass(_Watched)
    found.layer, found.is_transposed = layer, is_transposed
    return found


def _call_of_layer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the output of the layer for a function that multiplies rows by its weight, or None for other functions."""
    is_linear = func is functional.linear
    if not is_linear and func not in _PRODUCTS:
        return None
    given = {**dict(zip(("input", "weight" if is_linear else "other", "bias"), args, strict=False)), **kwargs}
    x, weight, bias = given["input"], given.get("weight", given.get("other", given.get("mat2"))), given.get("bias")
    if isinstance(x, _Watched) or not isinstance(weight, _Watched) or weight.is_transposed == is_linear:
        return None
    y: torch.Tensor = weight.layer(x)
    return y if bias is None else y + bias


def _name_of(func: Callable[..., Any]) -> str:
    # A property has the method __get__ of a descriptor.
    return printable(getattr(getattr(func, "__self__", None), "__name__", "") or func.__name__)


_CASTS = frozenset({torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16})

_TURNS = frozenset({torch.Tensor.mT.__get__, torch.Tensor.T.__get__, torch.Tensor.t, torch.t})  # type: ignore[attr-defined]

#: Products of rows with a matrix on their right.
_PRODUCTS = frozenset({torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__})


@dataclass(frozen=True)
class ExpertStack:
    """Array with the matrices of all experts of one layer.

    Parameters
    ----------
    name : str
        Name of the parameter.
    owner : torch.nn.Module
        Module that holds it.
    key : str
        Attribute of the owner.
    matrices : dict of str to ExpertMatrix
        One layer for each expert, by name: ``"experts.up_proj.0"``. They are not part of the model.
    is_transposed : bool
        Whether the array has matrices of shape (in_features, out_features), as in GPT-OSS.
    """

    name: str
    owner: nn.Module
    key: str
    matrices: dict[str, ExpertMatrix]
    is_transposed: bool


def find_stacks(modules: Mapping[str, nn.Module]) -> list[ExpertStack]:
    """Return the arrays of experts whose owners read them one matrix at a time.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        All modules of a model by name.

    Returns
    -------
    list of ExpertStack
        Arrays in the order of the model. Modules of transformers with a choice of implementations have such arrays.
    """
    found = []
    for name, module in modules.items():
        if not _reads_one_by_one(module):
            continue
        is_transposed = bool(getattr(module, "is_transposed", False))
        for key, array in module._parameters.items():  # noqa: SLF001 - named_parameters leaves out second names
            if array is not None and array.ndim == 3:
                own = f"{name}.{key}" if name else key
                requires_grad = (
                    array.requires_grad and not array.is_inference()
                )  # whose views torch does not let require one
                matrices = {
                    f"{own}.{index}": ExpertMatrix(matrix, requires_grad=requires_grad)
                    for index, matrix in enumerate(array.detach().mT if is_transposed else array.detach())
                }
                found.append(ExpertStack(own, module, key, matrices, is_transposed))
    return found


def _reads_one_by_one(module: nn.Module) -> bool:
    """Return whether the eager implementation of a module reads one matrix at a time, by the index of the expert."""
    # The decorator use_experts_implementation of transformers sets these attributes, and keeps the eager method below its own.
    # All 65 classes that have it in transformers 5.23 read their arrays by index alone.
    return (
        hasattr(module, "is_concatenated")
        and hasattr(type(module).forward, "__wrapped__")
        and hasattr(module, "config")
    )


def split_stacks(stacks: Iterable[ExpertStack]) -> None:
    """Replace arrays by lists of their matrices, which share the memory, and choose the eager implementation.

    Parameters
    ----------
    stacks : iterable of ExpertStack
        Arrays of a model.
    """
    for stack in stacks:
        owner: Any = stack.owner
        requires_grad = getattr(owner, stack.key).requires_grad
        for matrix in stack.matrices.values():
            matrix.weight.requires_grad_(requires_grad)
        before = _choose_eager(owner)
        delattr(owner, stack.key)
        experts = Experts(stack.matrices.values(), before, is_transposed=stack.is_transposed)
        owner.add_module(stack.key, experts.train(owner.training))


def split_into_rows(stack: ExpertStack, layers: Mapping[str, nn.Module], keys: Sequence[str]) -> None:
    """Replace an array by layers that have its rows, and choose the eager implementation.

    Parameters
    ----------
    stack : ExpertStack
        Array of a model.
    layers : mapping of str to torch.nn.Module
        Layers by their names below the owner, such as ``"3.up_proj"``.
    keys : sequence of str
        Names of the layers of an expert, in the order of their rows.
    """
    owner: Any = stack.owner
    before = _choose_eager(owner)
    delattr(owner, stack.key)
    for name, layer in layers.items():
        number, _, key = name.partition(".")
        if number not in owner._modules:  # noqa: SLF001 - of torch
            owner.add_module(number, nn.Module().train(owner.training))
        owner.get_submodule(number).add_module(key, layer.train(owner.training))
    setattr(owner, stack.key, JoinedExperts(owner, keys, len(stack.matrices), before))


def _choose_eager(owner: Any) -> Any:
    """Let the module of an array read matrices one by one, and return the configuration that it had."""
    before = next((own.config for own in _indexes(owner).values()), owner.config)
    # The other implementations multiply by the whole array. The configuration of the model stays as it is.
    owner.config = copy.copy(before)
    owner.config._experts_implementation_internal = "eager"  # noqa: SLF001 - the public setter changes sub-configurations
    return before


def _indexes(owner: nn.Module) -> dict[str, Experts | JoinedExperts]:
    """Return what stands for arrays of a module, by attribute."""
    known = {**dict(owner.named_children()), **vars(owner)}
    return {key: own for key, own in known.items() if isinstance(own, Experts | JoinedExperts)}


@contextmanager
def split_for_a_while(stacks: Sequence[ExpertStack]) -> Iterator[None]:
    """Replace arrays by lists of their matrices, so that hooks of the matrices see products; restore the arrays at the end.

    Parameters
    ----------
    stacks : sequence of ExpertStack
        Arrays of a model.
    """
    owners: dict[Any, tuple[dict[str, Any], Any]] = {}
    for stack in stacks:
        # The order of parameters is that of state_dict().
        owners.setdefault(stack.owner, (dict(stack.owner._parameters), stack.owner.config))  # noqa: SLF001
    try:
        split_stacks(stacks)
        yield
    finally:
        for stack in stacks:
            stack.owner._modules.pop(stack.key, None)  # noqa: SLF001 - of torch
        for owner, (parameters, config) in owners.items():
            owner._parameters.clear()  # noqa: SLF001
            owner._parameters.update(parameters)  # noqa: SLF001
            owner.config = config


def join_dense(model: nn.Module) -> None:
    """Turn dense matrices of experts back into arrays.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    """
    owner: Any
    for owner in list(model.modules()):
        for key, experts in _indexes(owner).items():
            if (weights := _dense_weights(experts)) is None:
                continue
            delattr(owner, key)
            if isinstance(experts, JoinedExperts):
                _remove_layers(experts)
            owner.register_parameter(key, nn.Parameter(torch.stack([own for own, _ in weights]), weights[0][1]))
            if not _indexes(owner):
                owner.config = experts.config


def _dense_weights(experts: Experts | JoinedExperts) -> list[tuple[torch.Tensor, bool]] | None:
    """Return the matrix of each expert and whether it trains, or None if they are not all dense."""
    found = []
    for number in range(len(experts) if isinstance(experts, Experts) else experts.experts):
        layers = experts.layers(number) if isinstance(experts, JoinedExperts) else [experts.get_submodule(str(number))]
        if not all(isinstance(own, nn.Linear) for own in layers):
            return None
        weights = [cast("nn.Linear", own).weight for own in layers]
        dense = torch.cat([own.detach() for own in weights]) if len(weights) > 1 else weights[0].detach()
        is_transposed = isinstance(experts, Experts) and experts.is_transposed
        found.append((dense.mT if is_transposed else dense, weights[0].requires_grad))
    return found


def _remove_layers(experts: JoinedExperts) -> None:
    for number in range(experts.experts):
        own = experts.owner.get_submodule(str(number))
        for key in experts.keys:
            delattr(own, key)
        if not own._modules:  # noqa: SLF001 - of torch
            delattr(experts.owner, str(number))
