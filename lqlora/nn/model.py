"""Conversion of torch models: select linear layers, replace them by quantized ones, and report the storage."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora._parallel import map_matrices
from lqlora._patterns import OUTPUT_HEADS, list_names, select
from lqlora.allocation import Plan
from lqlora.decomposition import Decomposition, decompose
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.nn.linear import LQLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Executor

    from lqlora._patterns import Patterns
    from lqlora.weighting import AbstractWeighting

__all__ = ["QuantizationReport", "quantize_model", "select_linears", "weight_arrays"]


def select_linears(model: nn.Module, include: Patterns = "*", exclude: Patterns = OUTPUT_HEADS) -> dict[str, nn.Linear]:
    """Return the linear layers of a model whose names match patterns.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    include, exclude : str, compiled regular expression, callable, or several of them
        Shell patterns (``"*.q_proj"``), regular expressions that match the whole name, or functions of the name. A layer
        is selected if one of ``include`` matches and none of ``exclude`` does. By default the output head is excluded.

    Returns
    -------
    dict of str to torch.nn.Linear
        Layers by name, in the order of the model. Layers of derived classes are not selected: their owners may use the
        weight without calling the layer, as torch's own attention does.

    Raises
    ------
    InvalidArgumentError
        If nothing matches.
    """
    linears = linear_layers(model)
    return {
        name: linears[name] for name in select(linears, include, exclude, what="linear layer", where=" of the model")
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all layers of exactly the class :class:`torch.nn.Linear`, by name.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    dict of str to torch.nn.Linear
        Layers in the order of the model; a layer with several names is listed under the first.
    """
    # The exact class, not isinstance: a derived layer may compute something else, and the owner of torch's
    # NonDynamicallyQuantizableLinear passes its weight to a function, which a replacement would break.
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def weight_arrays(linears: Mapping[str, nn.Linear]) -> dict[str, Callable[[], Any]]:
    """Return a loader of each layer's weight, the input of :func:`lqlora.cost_table`.

    Parameters
    ----------
    linears : mapping of str to torch.nn.Linear
        Layers by name.

    Returns
    -------
    dict of str to callable
        In host memory a loader returns a NumPy view of the weight, because NumPy is the faster backend there; bfloat16,
        which NumPy does not have, is widened to float32. On other devices it returns the tensor.
    """
    return {name: functools.partial(_weight_array, module) for name, module in linears.items()}


def _weight_array(module: nn.Linear) -> Any:
    weight = module.weight.detach()
    if weight.device.type != "cpu":
        return weight
    return (weight.float() if weight.dtype == torch.bfloat16 else weight).numpy()


@dataclass(frozen=True)
class QuantizationReport:
    """Decompositions of the layers that :func:`quantize_model` replaced, with the exact storage of the model.

    Parameters
    ----------
    decompositions : dict of str to Decomposition
        Decompositions by name of the layer.
    kept : dict of str to int
        Bytes of each parameter and buffer that was not replaced. Tied parameters are listed once.
    """

    decompositions: dict[str, Decomposition]
    kept: dict[str, int]

    @property
    def storage_bits(self) -> int:
        """Exact number of bits of the quantized parts, scales and padding included."""
        return sum(8 * d.quantized.nbytes for d in self.decompositions.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized parts, scales and padding included. Low-rank factors are not counted."""
        return self.storage_bits / sum(
            d.quantized.shape[0] * d.quantized.shape[1] for d in self.decompositions.values()
        )

    @property
    def factor_bytes(self) -> int:
        """Bytes of the low-rank factors, in float32."""
        # B and A of an (m, n) matrix have rank * m and rank * n entries of 4 bytes.
        return sum(4 * d.rank * sum(d.quantized.shape) for d in self.decompositions.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model: quantized parts, low-rank factors, and everything that was not replaced."""
        return self.storage_bits // 8 + self.factor_bytes + sum(self.kept.values())


def quantize_model(
    model: nn.Module,
    formats: BlockFormat | Mapping[str, BlockFormat] | Plan,
    *,
    rank: int | None = None,
    include: Patterns = "*",
    exclude: Patterns = OUTPUT_HEADS,
    weighting: Mapping[str, AbstractWeighting] | None = None,
    scaling: float = 1.0,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> QuantizationReport:
    """Replace linear layers by :class:`LQLinear`, in place, and freeze everything but the low-rank factors.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. It is changed only after every layer was decomposed.
    formats : BlockFormat, mapping of str to BlockFormat, or Plan
        One format for all selected layers, or a format for each name. With names, exactly those layers are replaced.
    rank : int, optional
        Rank of the low-rank parts. If it is not given, the plan's ranks are used.
    include, exclude : patterns
        See :func:`select_linears`. They are not used when ``formats`` names the layers.
    weighting : mapping of str to AbstractWeighting, optional
        Norms by name of the layer, such as ``lq.weighting.Elementwise(fisher[name].numpy())`` with the result of
        :func:`collect_fisher`. They hold NumPy arrays for a model in host memory, and tensors for one on a device.
    scaling, seed : float, int
        See :func:`lqlora.decompose`.
    executor, progress : Executor and callable, optional
        See :func:`lqlora.cost_table`.
    **options
        Further options of :func:`lqlora.decompose`, such as ``fit``, ``quantizer``, ``init`` or ``max_iter``.

    Returns
    -------
    QuantizationReport
        Decompositions, parameters that were kept, and the exact storage.

    Raises
    ------
    InvalidArgumentError
        If no layer matches, a name is not a linear layer of the model, or a layer has no rank.
    NonFiniteError
        If a weight holds NaN or infinity. In this case the model is unchanged.
    """
    by_name = _resolve(model, formats, include, exclude)
    ranks = formats.ranks if isinstance(formats, Plan) and rank is None else dict.fromkeys(by_name, rank)
    linears = {name: module for name, module in linear_layers(model).items() if name in by_name}
    if "" in linears:
        raise InvalidArgumentError(
            "model must contain its linear layers, but is one itself. Wrap it in torch.nn.Sequential."
        )
    if unknown := sorted(set(weighting or {}) - set(linears)):
        raise InvalidArgumentError(f"weighting must name layers that are quantized, got {list_names(unknown)}.")
    options = {**options, "scaling": scaling, "seed": seed}
    items = []
    for name, load in weight_arrays(linears).items():
        layer_rank = ranks[name]
        if layer_rank is None:
            raise InvalidArgumentError(f"rank must be given for {name!r}. Pass rank=, or a plan that has ranks.")
        items.append((name, load, by_name[name], layer_rank, (weighting or {}).get(name)))
    # All layers are decomposed before the first one is replaced, so that an error leaves the model as it was.
    found = map_matrices(functools.partial(_decompose_one, options=options), items, executor, progress)
    decompositions = dict(zip(linears, found, strict=True))
    # Frozen before the layers are replaced: factors are created afterwards, as parameters that require gradients.
    model.requires_grad_(requires_grad=False)
    replace_modules(
        model,
        {module: LQLinear.from_decomposition(decompositions[name], module.bias) for name, module in linears.items()},
    )
    return QuantizationReport(decompositions, _kept(model))


def _resolve(
    model: nn.Module,
    formats: BlockFormat | Mapping[str, BlockFormat] | Plan,
    include: Patterns,
    exclude: Patterns,
) -> dict[str, BlockFormat]:
    """Return the format of each layer to replace."""
    if isinstance(formats, BlockFormat):
        return dict.fromkeys(select_linears(model, include, exclude), formats)
    by_name = formats.formats if isinstance(formats, Plan) else formats
    if not isinstance(by_name, Mapping) or not by_name:
        raise InvalidArgumentError(
            f"formats must be a BlockFormat, a Plan, or a mapping of layer names to formats, got {formats!r:.80}."
        )
    if unknown := sorted(set(by_name) - set(linear_layers(model))):
        raise InvalidArgumentError(f"formats must name linear layers of the model, got {list_names(unknown)}.")
    return dict(by_name)


def _decompose_one(item: tuple[Any, ...], *, options: dict[str, Any]) -> Decomposition:
    name, load, fmt, rank, weighting = item
    return decompose(load(), fmt, rank, weighting=weighting, name=f"weight of {name!r}", **options)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace submodules by others, each under all of its names.

    Parameters
    ----------
    model : torch.nn.Module
        Root of the modules. It cannot be replaced.
    replacements : mapping of torch.nn.Module to torch.nn.Module
        The new module by the old one. Its training flag is set to that of the old module.
    """
    for old, new in replacements.items():
        if new.training != old.training:
            new.train(old.training)
    # A module with several names is an attribute of several parents. Modules are hashed and compared by identity, and
    # listing all parents first visits each module once: a walk for each replacement would take quadratic time. Children
    # are read from _modules, because named_children() lists a child with two names in one parent once.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001 - no public function lists both names
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def _kept(model: nn.Module) -> dict[str, int]:
    """Return the bytes of each parameter and persistent buffer outside quantized layers; tied ones count once."""
    state = model.state_dict(keep_vars=True)
    inside = quantized_keys(model, state)
    kept = [name for name, first in first_names(state).items() if name == first and name not in inside]
    return {name: state[name].numel() * state[name].element_size() for name in kept}


def first_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return for each entry of a state dict the first name of the same tensor.

    Tied weights are one tensor under several names. They are found by identity, not by equal values or shared memory:
    two tensors that are equal now may be trained apart.

    Parameters
    ----------
    state : mapping of str to Tensor
        ``model.state_dict(keep_vars=True)``. Without ``keep_vars``, torch makes a new tensor for each name, and ties are
        not found.

    Returns
    -------
    dict of str to str
        The name itself, unless an earlier name is tied to it.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def quantized_keys(model: nn.Module, state: Iterable[str]) -> set[str]:
    """Return the names of a state dict's entries that belong to quantized layers, without biases.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    state : iterable of str
        Keys of ``model.state_dict()``.

    Returns
    -------
    set of str
        Some of the keys. A layer with several names has keys under each of them.
    """
    # The names are compared: a state dict of each layer would be made a second time.
    layers = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LQLinear)}
    return {key for key in state if _is_inside(key, layers)}


def _is_inside(key: str, layers: set[str]) -> bool:
    owner, _, own = key.rpartition(".")
    if owner in layers:
        return own != "bias"
    while owner and owner not in layers:
        owner = owner.rpartition(".")[0]
    return owner in layers
