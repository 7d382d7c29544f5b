"""Experts whose matrices a model stores in one array: each becomes a layer of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["ExpertMatrix", "ExpertStack", "Experts", "find_stacks", "join_dense", "split_stacks"]


class ExpertMatrix(nn.Linear):
    """Matrix of one expert, a view of the array of all experts. Nobody calls it: its owner reads the weight.

    Parameters
    ----------
    weight : Tensor, shape (m, n)
        The view.
    requires_grad : bool
        Whether the array trains.
    """

    def __init__(self, weight: torch.Tensor, *, requires_grad: bool) -> None:
        nn.Module.__init__(self)  # without the random matrix of nn.Linear
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)
        self.register_parameter("bias", None)


class Experts(nn.ModuleList):
    """Matrices of the experts of one layer. An index gives the weight, as that of the array does.

    Parameters
    ----------
    matrices : iterable of torch.nn.Module
        One layer for each expert.
    config : object
        Configuration that the owner had.
    """

    def __init__(self, matrices: Iterable[nn.Module], config: Any) -> None:
        super().__init__(matrices)
        self.config = config

    # As torch.compiler.disable, which would import the compiler with this module: it cannot read an index that is a tensor.
    @_disable_dynamo
    def __getitem__(self, index: Any) -> Any:
        """Return the weight of an expert: dense, or a :class:`QuantizedTensor`."""
        return self._modules[str(range(len(self))[int(index)])].weight


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
    """

    name: str
    owner: nn.Module
    key: str
    matrices: dict[str, ExpertMatrix]


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
        for key, array in module._parameters.items():  # noqa: SLF001 - named_parameters leaves out second names
            if array is not None and array.ndim == 3:
                own = f"{name}.{key}" if name else key
                matrices = {
                    f"{own}.{index}": ExpertMatrix(array.detach()[index], requires_grad=array.requires_grad)
                    for index in range(len(array))
                }
                found.append(ExpertStack(own, module, key, matrices))
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
        before = next((own.config for own in owner.children() if isinstance(own, Experts)), owner.config)
        delattr(owner, stack.key)
        owner.add_module(stack.key, Experts(stack.matrices.values(), before).train(owner.training))
        # The other implementations multiply by the whole array. The configuration of the model stays as it is.
        owner.config = copy.copy(before)
        owner.config._experts_implementation_internal = "eager"  # noqa: SLF001 - the public setter changes sub-configurations


def join_dense(model: nn.Module) -> None:
    """Turn lists of dense matrices of experts back into one array each.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    """
    owner: Any
    for owner in list(model.modules()):
        for key, experts in list(owner.named_children()):
            if isinstance(experts, Experts) and all(isinstance(own, nn.Linear) for own in experts.children()):
                weights = [cast("nn.Linear", own).weight for own in experts.children()]
                delattr(owner, key)
                array = nn.Parameter(torch.stack([own.detach() for own in weights]), weights[0].requires_grad)
                owner.register_parameter(key, array)
                if not any(isinstance(own, Experts) for own in owner.children()):
                    owner.config = experts.config
