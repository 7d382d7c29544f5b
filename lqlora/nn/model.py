"""Replacing the linear layers of a model by quantized ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora._parallel import map_matrices
from lqlora._patterns import as_patterns, matches
from lqlora.allocation import Plan
from lqlora.decomposition import Decomposition, decompose
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.nn.linear import LQLinear

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from lqlora._patterns import Patterns
    from lqlora.weighting import AbstractWeighting

__all__ = ["QuantizationReport", "quantize_model", "select_linears", "weight_arrays"]

#: Output heads stay as they are unless asked for: they are few, often tied to the embedding, and sensitive.
_KEPT: tuple[str, ...] = ("lm_head", "*.lm_head")


def select_linears(model: nn.Module, include: Patterns = "*", exclude: Patterns = _KEPT) -> dict[str, nn.Linear]:
    """Find linear layers by name.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    include, exclude : str, compiled regular expression, callable, or several of them
        Shell patterns (``"*.q_proj"``), expressions that match the whole name, or functions of the name. A layer is
        selected if one of ``include`` matches and none of ``exclude`` does.

    Returns
    -------
    dict of str to torch.nn.Linear
        By name, in the order of the model. Layers of derived classes are not among them: their owners may use the
        weight without calling the layer, as torch's own attention does.

    Raises
    ------
    InvalidArgumentError
        If nothing matches.
    """
    wanted, unwanted = as_patterns(include), as_patterns(exclude)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    found = {
        name: module
        for name, module in linears.items()
        if any(matches(name, p) for p in wanted) and not any(matches(name, p) for p in unwanted)
    }
    if not found:
        some = ", ".join(list(linears)[:5]) or "none"
        raise InvalidArgumentError(f"No linear layer matches {include!r}; the model has {len(linears)} ({some}, …).")
    return found


def weight_arrays(linears: Mapping[str, nn.Linear]) -> dict[str, Callable[[], Any]]:
    """Return a loader of each layer's weight, the input of :func:`lqlora.cost_table`.

    Parameters
    ----------
    linears : mapping of str to torch.nn.Linear
        Layers by name.

    Returns
    -------
    dict of str to callable
        A loader returns a NumPy view of a weight in host memory (NumPy is the faster backend there; bfloat16 is widened
        to float32), or the tensor itself elsewhere.
    """
    return {name: functools.partial(_weight_array, module) for name, module in linears.items()}


def _weight_array(module: nn.Linear) -> Any:
    weight = module.weight.detach()
    if weight.device.type != "cpu":
        return weight
    return (weight.float() if weight.dtype == torch.bfloat16 else weight).numpy()


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_model` did.

    Parameters
    ----------
    decompositions : dict of str to Decomposition
        By layer.
    kept : dict of str to int
        Parameters that stayed as they were, and their bytes. Tied ones are listed once.
    """

    decompositions: dict[str, Decomposition]
    kept: dict[str, int]

    @property
    def storage_bits(self) -> int:
        """Exact bits of the quantized parts."""
        return sum(8 * d.quantized.nbytes for d in self.decompositions.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized parts, scales and padding included, low-rank factors not."""
        return self.storage_bits / sum(
            d.quantized.shape[0] * d.quantized.shape[1] for d in self.decompositions.values()
        )

    @property
    def factor_bytes(self) -> int:
        """Bytes of the low-rank factors, in float32."""
        return sum(4 * d.rank * sum(d.quantized.shape) for d in self.decompositions.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model: quantized parts, factors and everything kept."""
        return self.storage_bits // 8 + self.factor_bytes + sum(self.kept.values())


def quantize_model(
    model: nn.Module,
    formats: BlockFormat | Mapping[str, BlockFormat] | Plan,
    *,
    rank: int | None = None,
    include: Patterns = "*",
    exclude: Patterns = _KEPT,
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
        Any model; changed only after every layer was decomposed.
    formats : BlockFormat, mapping of str to BlockFormat, or Plan
        One format for all selected layers, or one by name; with names, exactly those layers are replaced.
    rank : int, optional
        Rank of the low-rank parts; taken from the plan if not given.
    include, exclude : patterns
        See :func:`select_linears`; not used when ``formats`` names the layers.
    weighting : mapping of str to AbstractWeighting, optional
        Norms by layer, such as ``lq.weighting.Elementwise(fisher[name].numpy())`` of what :func:`collect_fisher`
        returns: of NumPy arrays for a model in host memory, of tensors elsewhere.
    scaling, seed : float, int
        See :func:`lqlora.decompose`.
    executor, progress : Executor and callable, optional
        See :func:`lqlora.cost_table`.
    **options
        Further options of :func:`lqlora.decompose`, such as ``fit``, ``quantizer``, ``init`` or ``max_iter``.

    Returns
    -------
    QuantizationReport
        Decompositions, what was kept, and the exact storage.

    Raises
    ------
    InvalidArgumentError
        If no layer matches, a name is not a linear layer of the model, or there is no rank.
    NonFiniteError
        If a weight holds NaN or infinity; the model is then unchanged.
    """
    by_name = _resolve(model, formats, include, exclude)
    ranks = formats.ranks if isinstance(formats, Plan) and rank is None else dict.fromkeys(by_name, rank)
    linears = select_linears(model, include=by_name.__contains__, exclude=())
    if "" in linears:
        raise InvalidArgumentError("The model is itself a linear layer: wrap it in torch.nn.Sequential first.")
    if unknown := sorted(set(weighting or {}) - set(linears)):
        raise InvalidArgumentError(f"Weightings for layers that are not quantized: {', '.join(unknown[:5])}.")
    options = {**options, "scaling": scaling, "seed": seed}
    items = []
    for name, load in weight_arrays(linears).items():
        layer_rank = ranks[name]
        if layer_rank is None:
            raise InvalidArgumentError("Give a rank, or a plan that has ranks.")
        items.append((name, load, by_name[name], layer_rank, (weighting or {}).get(name)))
    found = map_matrices(functools.partial(_decompose_one, options=options), items, executor, progress)
    decompositions = dict(zip(linears, found, strict=True))
    model.requires_grad_(requires_grad=False)
    for name, decomposition in decompositions.items():
        replace_module(model, linears[name], LQLinear.from_decomposition(decomposition, linears[name].bias))
    return QuantizationReport(decompositions, _kept(model))


def _resolve(
    model: nn.Module,
    formats: BlockFormat | Mapping[str, BlockFormat] | Plan,
    include: Patterns,
    exclude: Patterns,
) -> dict[str, BlockFormat]:
    if isinstance(formats, BlockFormat):
        return dict.fromkeys(select_linears(model, include, exclude), formats)
    by_name = formats.formats if isinstance(formats, Plan) else formats
    if not isinstance(by_name, Mapping) or not by_name:
        raise InvalidArgumentError(f"Formats are a BlockFormat, a Plan, or a format for each layer, not {formats!r}.")
    linears = select_linears(model, "*", ())
    if unknown := sorted(set(by_name) - set(linears)):
        raise InvalidArgumentError(f"The model has no linear layer {unknown[0]!r} ({len(unknown)} unknown in all).")
    return dict(by_name)


def _decompose_one(item: tuple[Any, ...], *, options: dict[str, Any]) -> Decomposition:
    name, load, fmt, rank, weighting = item
    return decompose(load(), fmt, rank, weighting=weighting, name=f"weight of {name!r}", **options)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under each of its names.

    Parameters
    ----------
    model : torch.nn.Module
        Root.
    old : torch.nn.Module
        The module to replace; not the root.
    new : torch.nn.Module
        The replacement; takes over the training flag.
    """
    new.train(old.training)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def _kept(model: nn.Module) -> dict[str, int]:
    """List parameters and persistent buffers outside quantized layers."""
    inside = quantized_keys(model)
    found = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: t.numel() * t.element_size() for name, t in reversed(found.values()) if name not in inside}


def quantized_keys(model: nn.Module) -> set[str]:
    """Name the entries of a state dict that belong to quantized layers, under each of their names; biases do not.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    set of str
        Keys of ``model.state_dict()``.
    """
    return {
        f"{name}.{key}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LQLinear)
        for key in module.state_dict()
        if key != "bias"
    }
