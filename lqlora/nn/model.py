"""Conversion of torch models: replace selected linear layers by quantized ones, and report the storage."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lqlora._annotations import annotated
from lqlora._parallel import map_matrices
from lqlora._patterns import values_by_name
from lqlora._printable import printable
from lqlora._progress import bars_hidden, reported
from lqlora._shared_settings import collection_paused
from lqlora.allocation import Plan
from lqlora.decomposition import Decomposition, decompose
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.nn.embedding import QuantizedEmbedding, QuantizedHead
from lqlora.nn.embedding_tables import EmbeddingTable, choose_tables, scale_of
from lqlora.nn.linear import LQLinear, require_dropout
from lqlora.nn.linear_maps import matrix_of
from lqlora.nn.report import DensePart, QuantizationReport, QuantizedLayer, QuantizedTable
from lqlora.nn.selection import LinearMaps, refuse_distributed
from lqlora.nn.sharding import keep_codes_local
from lqlora.quantized import quantize
from lqlora.quantized._rows import decode_rows
from lqlora.quantized.quantization import with_fitted_levels

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable
    from concurrent.futures import Executor

    from lqlora._patterns import Pattern, Patterns
    from lqlora.checkpoint import StoredMatrix
    from lqlora.quantized import Fit, QuantizedArray
    from lqlora.weighting import AbstractWeighting

__all__ = ["quantize_model", "weight_arrays"]

_log = logging.getLogger("lqlora")

#: Classes that replace dense layers and embeddings.
QUANTIZED = LQLinear, QuantizedEmbedding, QuantizedHead

#: Entries of a table that are compared with their decoded values together.
_ROWS_AT_ONCE = 2**20

#: Entries of a module that hold its hooks of the forward and the backward pass, by the names that torch gives them.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@annotated
def weight_arrays(layers: Mapping[str, nn.Module]) -> dict[str, Callable[[], Any]]:
    """Return a loader of each layer's matrix, the input of :func:`lqlora.cost_table`.

    Parameters
    ----------
    layers : mapping of str to torch.nn.Module
        Linear layers by name, as :func:`select_linears` returns them.

    Returns
    -------
    dict of str to callable
        A loader returns the matrix in shape (out_features, in_features), also of layers that store it transposed. In host
        memory it is a NumPy view, because NumPy is the faster backend there; bfloat16, which NumPy does not have, is
        widened to float32. On other devices it is a tensor.
    """
    return {name: functools.partial(_weight_array, layer) for name, layer in layers.items()}


def _weight_array(layer: nn.Module) -> Any:
    return fast_array(matrix_of(layer))


def fast_array(matrix: torch.Tensor) -> Any:
    """Return a matrix in the library that computes fastest on its device.

    Parameters
    ----------
    matrix : Tensor
        Matrix of any dtype.

    Returns
    -------
    array
        A view for NumPy in host memory, and the tensor itself on a device.
    """
    if matrix.device.type != "cpu":
        return matrix
    return (matrix.float() if matrix.dtype == torch.bfloat16 else matrix).numpy()


@annotated
@torch.inference_mode(mode=False)  # the new layers train
def quantize_model(
    model: nn.Module,
    formats: BlockFormat | Mapping[Pattern, BlockFormat] | Callable[[str], BlockFormat] | Plan,
    *,
    rank: int | Mapping[Pattern, int] | Callable[[str], int] | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    weighting: Mapping[Pattern, AbstractWeighting] | Callable[[str], AbstractWeighting | None] | None = None,
    scaling: float | Mapping[Pattern, float] | Callable[[str], float] = 1.0,
    dropout: float = 0.0,
    embeddings: BlockFormat | Mapping[Pattern, BlockFormat] | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> QuantizationReport:
    """Replace linear layers by :class:`LQLinear`, in place, and freeze the rest of the body.

    Heads of a classifier and adapters of other libraries keep training if they did before. Each finished layer is logged by
    the logger ``lqlora`` at level INFO.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. It is changed only after every layer was decomposed.
    formats : BlockFormat, mapping of pattern to BlockFormat, callable, or Plan
        One format for all selected layers, a function of the name, or formats by pattern, such as
        ``{"*.q_proj": nf4, "*": nf3}``. The keys of a mapping, and the names of a plan, select the layers as ``include``
        does.
    rank : int, mapping of pattern to int, or callable, optional
        Rank of the low-rank parts. If it is not given, the plan's ranks are used. A rank above the smaller side of a matrix
        is clipped to it, and the report says so.
    include, exclude : patterns
        See :func:`select_linears`. ``include`` is not used when ``formats`` selects the layers.
    weighting : mapping of pattern to AbstractWeighting, or callable, optional
        Norms, such as ``{name: lq.weighting.Elementwise(f.numpy()) for name, f in fisher.items()}`` with the result of
        :func:`collect_fisher`. They hold NumPy arrays for a model in host memory, and tensors for one on a device. Layers
        without one have the Frobenius norm.
    scaling : float, mapping of pattern to float, or callable, default 1.0
        Factor of the low-rank part, see :func:`lqlora.decompose`. Layers that no pattern matches have 1.
    dropout : float, default 0.0
        Probability of dropout before the low-rank parts, in training only, see :class:`LQLinear`. It is not stored in files.
        Experts that are stored in one array have none, because the model multiplies by their weights itself.
    embeddings : BlockFormat, or mapping of pattern to BlockFormat, optional
        Format of the embeddings of tokens, or formats of embeddings by name. They become :class:`QuantizedEmbedding`, without
        factors and with the ``fit`` of the options. An output embedding that is tied to one uses the same table, unless
        ``include`` selects it. By default embeddings stay dense. A model whose linear layers are quantized already takes them
        with one format for ``formats`` and no ``include``: that format is not used then.
    seed : int, default 0
        See :func:`lqlora.decompose`.
    executor : concurrent.futures.Executor, optional
        See :func:`lqlora.cost_table`.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts layers and embeddings.
    **options
        Further options of :func:`lqlora.decompose`, such as ``fit``, ``quantizer``, ``init`` or ``max_iter``.

    Returns
    -------
    QuantizationReport
        Numbers of the quantized layers, what was left dense and why, and the exact storage.

    Raises
    ------
    InvalidArgumentError
        If neither a layer nor an embedding is selected, a pattern matches nothing or only layers that cannot be quantized, a
        layer has no rank, or no embedding that was asked for can be quantized.
    NonFiniteError
        If a weight holds NaN or infinity. In this case the model is unchanged.

    Notes
    -----
    In a mapping from patterns, the name of a layer is preferred to patterns, and of several patterns the first one holds.

    ``DistributedDataParallel`` does not send codes and scales. So the weights must be the same in all processes before this is called,
    and weights that were drawn without a seed are not. No error is raised then, and each process trains another model.
    """
    require_dropout(dropout)
    refuse_distributed(model)
    maps = LinearMaps(model)
    fit, fits_levels = options.get("fit", "absmax"), options.get("fit") == "levels+scale"
    is_for_tables = embeddings is not None and include is None and isinstance(formats, BlockFormat)
    by_name = {} if is_for_tables and maps.are_converted else formats_by_name(maps, formats, include, exclude)
    for fmt in {*by_name.values()} if fits_levels else ():
        with_fitted_levels(fmt)  # a format that stores no levels is found before the work
    layers = {name: layer for name, layer in maps.layers.items() if name in by_name}
    if "" in layers:
        raise InvalidArgumentError(
            "model must contain its linear layers, but is one itself. Wrap it in torch.nn.Sequential."
        )
    ranks = ranks_by_name(layers, rank, formats.ranks if isinstance(formats, Plan) else {})
    scalings = _values(scaling, layers, "scaling") if _is_by_name(scaling) else dict.fromkeys(layers, scaling)
    weightings = {} if weighting is None else _values(weighting, layers, "weighting")
    tables = {} if embeddings is None else choose_tables(maps, embeddings, {*layers.values()}, fits_levels=fits_levels)
    items = [
        (name, load, by_name[name], ranks[name], weightings.get(name), scalings.get(name, 1.0))
        for name, load in weight_arrays(layers).items()
    ]
    # All layers are decomposed before the first one is replaced, so that an error leaves the model as it was.
    work = functools.partial(_decompose_one, options={**options, "seed": seed})
    quantized = {}
    with reported(progress, "Quantizing", len(items) + len(tables), "layer") as report:
        found: list[Any] = map_matrices(work, items, executor, report, _log_layer)
        for name, (own, fmt) in tables.items():
            quantized[name] = _quantize_table(name, own, fmt, fit)
            _log_table(name, quantized[name][1])
            report(len(items) + len(quantized))
    before = bytes_of(maps.model)
    numbers: dict[str, QuantizedLayer] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    with collection_paused():
        # Frozen before the layers are replaced: factors are created afterwards, as parameters that require gradients.
        maps.freeze()
        for index, (name, layer) in enumerate(layers.items()):
            # Codes and factors are copied into the layer. The report has numbers only, so that no second copy stays alive.
            (_, decomposition, seconds), found[index] = found[index], None
            numbers[name] = _numbers(decomposition, rank=ranks[name], seconds=seconds, dense=matrix_of(layer).nbytes)
            replacements[layer] = quantized_layer(decomposition, layer, dropout)
        for name, (own, _) in tables.items():
            replacements |= table_modules(own, quantized[name][0])
        maps.split_stacks(replacements)
        replace_modules(maps.model, replacements)
        return report_of(maps, numbers, {name: own for name, (_, own) in quantized.items()}, before)


def _quantize_table(
    name: str, table: EmbeddingTable, fmt: BlockFormat, fit: Fit
) -> tuple[QuantizedArray, QuantizedTable]:
    """Quantize the table of an embedding."""
    start = time.perf_counter()
    dense = table.weight.detach()
    found = quantize(fast_array(dense), fmt, fit=fit, name=f"weight of {name!r}")
    numbers = QuantizedTable(
        found.format,
        (dense.shape[0], dense.shape[1]),
        (*table.embeddings, *table.heads),
        _table_error(found.to(torch), dense),
        found.nbytes,
        dense.nbytes,
        time.perf_counter() - start,
    )
    return found, numbers


def _log_table(name: str, numbers: QuantizedTable) -> None:
    if _log.isEnabledFor(logging.INFO):
        values = numbers.format, numbers.relative_error, numbers.seconds
        with bars_hidden():
            _log.info("%s: %s, embedding, relative error %.4f, %.2f s", printable(name), *values)


def _table_error(found: QuantizedArray, dense: torch.Tensor) -> float:
    """Return the relative error of a quantized table, from some rows at a time."""
    step = max(1, _ROWS_AT_ONCE // max(1, dense.shape[1]))
    error = norm = 0.0
    for start in range(0, len(dense), step):
        part = dense[start : start + step].double()
        index = torch.arange(start, start + len(part), device=dense.device)
        error += float((decode_rows(found, index, "float64") - part).square().sum())
        norm += float(part.square().sum())
    return (error / norm) ** 0.5 if norm else 0.0


def table_modules(table: EmbeddingTable, quantized: QuantizedArray) -> dict[nn.Module, nn.Module]:
    """Return the modules that replace those of a table.

    Parameters
    ----------
    table : EmbeddingTable
        The dense table and its modules.
    quantized : QuantizedArray
        The quantized table.

    Returns
    -------
    dict of torch.nn.Module to torch.nn.Module
        New modules by the old ones, on the device of the dense table, or of the quantized one if that is the meta device. The first embedding owns the quantized table.
    """
    found: dict[nn.Module, nn.Module] = {}
    given: Any = quantized
    for old in table.embeddings.values():
        scale, rounds_scale = scale_of(old) or (1.0, False)
        new = QuantizedEmbedding(given, old.padding_idx, scale, rounds_scale=rounds_scale)
        given, found[old] = new.quantized, new
    given.dtype = table.weight.dtype
    if not table.weight.is_meta:
        given.to(table.weight.device)
    for layer in table.heads.values():
        found[layer] = head = QuantizedHead(given)
        if layer.bias is not None:
            # The same parameter, so that it stays shared with other modules.
            head.bias = layer.bias
            head.bias.requires_grad = False
    for dense, own in found.items():
        move_attributes(own, dense)
    return found


def _is_by_name(value: object) -> bool:
    return isinstance(value, Mapping) or callable(value)


def _values(given: Any, layers: Iterable[str], parameter: str) -> dict[str, Any]:
    """Return the values of layers, from a mapping of patterns or a function of the name."""
    if not _is_by_name(given):
        raise InvalidArgumentError(
            f"{parameter} must be a mapping of patterns or a function of names, got {given!r:.80}."
        )
    return values_by_name(given, [*layers], parameter=parameter, what="layer that is quantized")


def formats_by_name(
    maps: LinearMaps, formats: Any, include: Patterns | None, exclude: Patterns
) -> dict[str, BlockFormat]:
    """Return the format of each layer to replace.

    Parameters
    ----------
    maps : LinearMaps
        Linear layers of the model.
    formats, include, exclude : object and patterns
        See :func:`quantize_model`.

    Returns
    -------
    dict of str to BlockFormat
        Formats in the order of the model.

    Raises
    ------
    InvalidArgumentError
        If no layer is selected, or a format is not one.
    """
    if isinstance(formats, BlockFormat):
        return dict.fromkeys(maps.choose(include, exclude), formats)
    by_name = formats.formats if isinstance(formats, Plan) else formats
    if not by_name or not _is_by_name(by_name):
        raise InvalidArgumentError(
            "formats must be a BlockFormat, a Plan, a mapping of layer names or patterns to formats, or a function of names, "
            f"got {formats!r:.80}."
        )
    if isinstance(by_name, Mapping):
        found = _values(by_name, maps.choose([*by_name], exclude, "formats"), "formats")
    else:
        found = _values(by_name, maps.choose(include, exclude), "formats")
    for name, fmt in found.items():
        if not isinstance(fmt, BlockFormat):
            raise InvalidArgumentError(f"formats must give {name!r} a BlockFormat, got {fmt!r:.80}.")
    return found


def ranks_by_name(layers: Mapping[str, Any], rank: Any, planned: Mapping[str, int | None]) -> dict[str, int]:
    """Return the rank of each layer that was asked for.

    Parameters
    ----------
    layers : mapping of str to object
        Layers by name.
    rank : object
        See :func:`quantize_model`.
    planned : mapping of str to int
        Ranks of a plan.

    Returns
    -------
    dict of str to int
        Ranks, before they are clipped.

    Raises
    ------
    InvalidArgumentError
        If a layer has no rank.
    """
    if rank is None:
        found = dict(planned)
    else:
        found = {**planned, **(_values(rank, layers, "rank") if _is_by_name(rank) else dict.fromkeys(layers, rank))}
    for name in layers:
        if found.get(name) is None:
            raise InvalidArgumentError(f"rank must be given for {name!r}. Pass rank=, or a plan that has ranks.")
    return found  # type: ignore[return-value]


def _decompose_one(item: tuple[Any, ...], *, options: dict[str, Any]) -> tuple[str, Decomposition, float]:
    name, load, fmt, rank, weighting, scaling = item
    start = time.perf_counter()
    matrix = load()
    # A rank that is not an integer is refused by decompose.
    rank = min(rank, *matrix.shape) if isinstance(rank, int) else rank
    found = decompose(matrix, fmt, rank, weighting=weighting, scaling=scaling, name=f"weight of {name!r}", **options)
    return name, found, time.perf_counter() - start


def _log_layer(result: tuple[str, Decomposition, float]) -> None:
    if _log.isEnabledFor(logging.INFO):
        name, found, seconds = result
        values = found.quantized.format, found.rank, found.relative_error, seconds
        with bars_hidden():
            _log.info("%s: %s, rank %d, relative error %.4f, %.2f s", printable(name), *values)


def _numbers(found: Decomposition, *, rank: int, seconds: float, dense: int) -> QuantizedLayer:
    rows, columns = found.quantized.shape
    return QuantizedLayer(
        found.quantized.format,
        (rows, columns),
        found.rank,
        rank if rank > found.rank else None,
        found.errors,
        found.relative_error,
        found.quantized.nbytes,
        dense,
        seconds,
    )


def quantized_layer(matrix: Decomposition | StoredMatrix, layer: nn.Module, dropout: float = 0.0) -> LQLinear:
    """Return the quantized layer that replaces a linear one.

    Parameters
    ----------
    matrix : Decomposition or StoredMatrix
        Parts of the matrix.
    layer : torch.nn.Module
        Layer to replace.
    dropout : float, default 0.0
        See :class:`LQLinear`.

    Returns
    -------
    LQLinear
        Layer on the device of the old one, or of the parts if that is the meta device, with its bias, hooks and further attributes. The bias is the same parameter, so
        that it stays shared with other modules that have it.
    """
    weight, bias = cast("nn.Parameter", layer.weight), cast("nn.Parameter | None", getattr(layer, "bias", None))
    found = LQLinear.from_decomposition(matrix, bias, dropout)
    found.quantized.dtype = weight.dtype
    if found.lora_A.device != weight.device and not weight.is_meta:
        found.to(weight.device)
    if bias is not None:
        bias.requires_grad = False
        found.bias = bias
    if not isinstance(layer, nn.Linear | LQLinear):
        found.transposed_class = type(layer)  # what dequantize_model makes again
    move_attributes(found, layer)
    return found


def move_attributes(new: nn.Module, old: nn.Module, without: Collection[str] = ()) -> None:
    """Give a layer that replaces another one its hooks, and the attributes that others have set on it.

    Parameters
    ----------
    new, old : torch.nn.Module
        The layers.
    without : collection of str
        Attributes to leave behind.
    """
    # The dicts of hooks are shared: a handle that removes a hook knows its dict, not the module.
    own, given = vars(new), vars(old)
    own.update({key: given[key] for key in _HOOKS if key in given})
    # Attributes that others have set, such as _is_hf_initialized of transformers. A compiled call is of the old layer.
    own.update({key: given[key] for key in given.keys() - own.keys() - {"_compiled_call_impl", *without}})


def report_of(
    maps: LinearMaps, numbers: dict[str, QuantizedLayer], tables: dict[str, QuantizedTable], before: int
) -> QuantizationReport:
    """Return the report of a model whose layers were just replaced.

    Parameters
    ----------
    maps : LinearMaps
        Linear layers of the model.
    numbers : dict of str to QuantizedLayer
        Numbers of the new layers.
    tables : dict of str to QuantizedTable
        Numbers of the new embeddings.
    before : int
        Bytes of the model before.

    Returns
    -------
    QuantizationReport
        The report.
    """
    state = _first_tensors(maps.model)
    of_tables = {name for table in tables.values() for name in table.modules}
    for name in keys_inside(state, {*numbers, *of_tables}):
        del state[name]
    left: dict[str, list[str]] = {}
    for name in maps.layers:
        if name not in numbers and name not in of_tables:
            left.setdefault(maps.group_of(f"{name}.weight"), []).append(name)
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        tensors.setdefault(maps.group_of(name), []).append(tensor)
    dense = {
        group: DensePart(
            tuple(left.get(group, ())),
            sum(tensor.numel() for tensor in tensors.get(group, ())),
            sum(tensor.nbytes for tensor in tensors.get(group, ())),
            sum(tensor.numel() for tensor in tensors.get(group, ()) if tensor.requires_grad),
        )
        for group in {**left, **tensors}
    }
    trainable = sum(parameter.numel() for parameter in maps.model.parameters() if parameter.requires_grad)
    kept = {name: tensor.nbytes for name, tensor in state.items()}
    return QuantizationReport(numbers, dense, kept, trainable, before, tables)


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
    keep_codes_local(model)


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of the parameters and persistent buffers of a model. Tied ones count once.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    int
        Bytes.
    """
    return sum(tensor.nbytes for tensor in _first_tensors(model).values())


def _first_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of a model. Tied ones are listed once, under their first name."""
    # A module may have a state of its own that is not a tensor, see get_extra_state. Sparse tensors do not know their bytes.
    state = {
        name: own
        for name, own in model.state_dict(keep_vars=True).items()
        if isinstance(own, torch.Tensor) and own.layout == torch.strided
    }
    return {name: state[name] for name, first in first_names(state).items() if name == first}


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


def quantized_layers(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> dict[str, LQLinear]:
    """Return the quantized layers of a model by name.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is not wrapped.
    modules : iterable of (str, torch.nn.Module), optional
        Names and modules to look through, if the caller has listed them. By default all of the model.

    Returns
    -------
    dict of str to LQLinear
        Layers in the order of the model. A layer with several names is listed under the first.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, is one itself, or another library has taken away the values of a layer.
    """
    names: dict[LQLinear, str] = {}
    for name, module in model.named_modules() if modules is None else modules:
        if isinstance(module, LQLinear):
            names.setdefault(module, name)
    layers = {name: layer for layer, name in names.items()}
    if not layers:
        raise InvalidArgumentError("model must have a quantized layer, got none. Call quantize_model first.")
    if "" in layers:
        raise InvalidArgumentError(
            "model must contain its quantized layers, but is one itself. Wrap it in torch.nn.Sequential."
        )
    for name, layer in layers.items():
        # accelerate brings tensors back for the time of a forward method that it sets. Until then they are meta tensors.
        own = [module for module in layer.modules() if "forward" in vars(module)]
        if any(tensor.is_meta for module in own for tensor in module.state_dict(keep_vars=True).values()):
            raise InvalidArgumentError(
                f"model must hold its values, but those of {printable(name)!r} are on the meta device and come with hooks of another "
                "library. Remove the hooks, for example with accelerate.hooks.remove_hook_from_submodules."
            )
    return layers


def keys_inside(state: Iterable[str], layers: Container[str]) -> set[str]:
    """Return the names of a state dict's entries that belong to some modules, without biases.

    Parameters
    ----------
    state : iterable of str
        Keys of ``model.state_dict()``.
    layers : container of str
        Names of the modules. A module with several names has keys under each of them.

    Returns
    -------
    set of str
        Some of the keys.
    """
    found = set()
    for key in state:
        owner, _, own = key.rpartition(".")
        if owner in layers and own == "bias":
            continue
        while owner and owner not in layers:
            owner = owner.rpartition(".")[0]
        if owner in layers:
            found.add(key)
    return found
