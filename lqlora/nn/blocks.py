"""Calibration block after block: each block of a model is quantized on the inputs that the quantized blocks before it give."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lqlora._annotations import annotated
from lqlora._messages import given
from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora._progress import bars_hidden, reported
from lqlora.allocation import Plan
from lqlora.decomposition import relative_error
from lqlora.errors import InvalidArgumentError
from lqlora.nn.block_tuning import require_tunable, tune_block
from lqlora.nn.experts import Experts
from lqlora.nn.merging import merged_weight
from lqlora.nn.model import (
    bytes_of,
    fast_array,
    formats_by_name,
    quantize_model,
    quantized_layers,
    ranks_by_name,
    report_of,
    weight_arrays,
)
from lqlora.nn.selection import LinearMaps, refuse_distributed, select_linears
from lqlora.nn.statistics.batches import parts_of, run_model
from lqlora.nn.statistics.gram import collect_gram
from lqlora.nn.undoing import unchanged_on_error
from lqlora.weighting import InputGram

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from lqlora._patterns import Pattern, Patterns
    from lqlora.formats import BlockFormat
    from lqlora.nn.block_tuning import BlockTuning
    from lqlora.nn.report import QuantizationReport, QuantizedLayer
    from lqlora.weighting import AbstractWeighting

__all__ = ["layers_in_blocks", "quantize_blocks"]

_log = logging.getLogger("lqlora")


class _Call(NamedTuple):
    """Arguments of one call of a block. The first one, of either kind, is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Any:
        """The hidden state."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def with_hidden(self, hidden: torch.Tensor) -> _Call:
        """Return the same call with another hidden state."""
        if self.args:
            return _Call((hidden, *self.args[1:]), self.kwargs)
        return _Call((), {**self.kwargs, next(iter(self.kwargs)): hidden})


@annotated
@torch.inference_mode(mode=False)  # the new layers train
def quantize_blocks(
    model: nn.Module,
    formats: BlockFormat | Mapping[Pattern, BlockFormat] | Callable[[str], BlockFormat] | Plan,
    batches: Iterable[Any],
    *,
    rank: int | Mapping[Pattern, int] | Callable[[str], int] | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    blocks: str | None = None,
    weighting: Callable[[Any], AbstractWeighting] = InputGram,
    held_out: Iterable[Any] = (),
    tuning: BlockTuning | None = None,
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> QuantizationReport:
    """Quantize the blocks of a model one after another, each on the inputs that the quantized blocks before it give.

    :func:`collect_gram` and :func:`quantize_model` use the inputs of the dense model. In a quantized model each layer sees what the
    quantized layers before it make of them. Here the errors of a layer are weighted by these inputs, and second
    moments of one block are in memory at a time. On SmolLM2-135M at two bits this gained nothing in perplexity
    (``experiments/README.md``), so take it for the memory.

    Parameters
    ----------
    model : torch.nn.Module
        A model whose body is a list of blocks that run one after another, as models of transformers have it. After an error or an
        interrupt it is as it was before. For this its dense weights stay in memory until the end.
    formats : BlockFormat, mapping of pattern to BlockFormat, callable, or Plan
        See :func:`quantize_model`. Layers outside the blocks stay dense.
    batches : iterable
        Batches for calibration, as :func:`collect_gram` takes them. Padding is cut. The hidden states of all tokens stay in memory.
    rank : int, mapping of pattern to int, or callable, optional
        See :func:`quantize_model`.
    include, exclude : patterns
        See :func:`select_linears`.
    blocks : str, optional
        Name of the list of blocks, such as ``"model.layers"``. By default it is the one list whose items hold the most layers to
        quantize.
    weighting : callable, default InputGram
        Function that returns the norm of a layer from the second moment of its inputs, an array of shape (in_features, in_features), such as
        ``lambda gram: lq.weighting.InputGram(gram, damping=0.1)``.
    held_out : iterable, optional
        Other batches, on which the error of each layer is measured, too. Errors on the batches for calibration flatter: most of all
        those of error feedback on few tokens.
    tuning : BlockTuning, optional
        Training of codes, scales, fitted levels or factors of each block, right after it was quantized, to bring its output near that of the dense
        model. Stacked experts do not train. It keeps the hidden states of the dense model in memory, too.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts blocks.
    **options
        Further options of :func:`quantize_model`, but for ``embeddings``, and of :func:`lqlora.decompose`, such as ``quantizer="gptq"``.

    Returns
    -------
    QuantizationReport
        As that of :func:`quantize_model`, with ``held_out_error`` of each layer if there are held-out batches.

    Raises
    ------
    InvalidArgumentError
        If no layer of the blocks is selected, there is no batch, the list of blocks is not clear, or its items do not run one after
        another, once in each pass, on the output of the block before.
    NonFiniteError
        If a weight or an input holds NaN or infinity.

    Notes
    -----
    All layers of a block are quantized with the inputs that they see while the block is still dense. The dense model runs once, to see
    the other arguments of the blocks, such as masks. Then each block runs twice on all batches. Held-out batches take the same again.
    Tuning adds three runs, and its steps. It takes up to 100 bytes for each weight of one block.

    References
    ----------
    GPTQ, arXiv 2210.17323, section 3.3, quantizes block after block in this way.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(3))
    ...     def forward(self, x):
    ...         for block in self.blocks:
    ...             x = block(x)
    ...         return x
    >>> model = Model()
    >>> report = quantize_blocks(model, lq.BlockFormat.parse("nf3/16:float32"), [torch.randn(64, 16)], rank=2)
    >>> list(report.layers)
    ['blocks.0.0', 'blocks.1.0', 'blocks.2.0']
    """
    refuse_distributed(model)
    _require_options(batches, held_out, options)
    maps = LinearMaps(model)
    root = maps.model
    by_name = formats_by_name(maps, formats, include, exclude)
    ranks = ranks_by_name(by_name, rank, formats.ranks if isinstance(formats, Plan) else {})
    if tuning is not None:
        require_tunable(tuning, by_name, ranks, fits_levels=options.get("fit") == "levels+scale")
    path, items = _blocks(maps.modules, by_name, blocks)
    inside = [[name for name in by_name if f"{name}.".startswith(f"{path}.{key}.")] for key in items]
    before = bytes_of(root)
    numbers: dict[str, QuantizedLayer] = {}
    with _evaluated(root), unchanged_on_error(root):
        calls = _recorded(root, path, list(items.values()), batches)
        if not calls:
            raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
        count = len(calls)
        calls += _recorded(root, path, list(items.values()), held_out)
        hidden = [one[0].hidden for one in calls]
        exact = hidden[:count] if tuning is not None else []  # hidden states of the dense model
        with reported(progress, "Quantizing", len(items), "block") as report:
            for position, (key, names) in enumerate(zip(items, inside, strict=True)):
                own = [call[position].with_hidden(x) for call, x in zip(calls, hidden, strict=True)]
                name = f"{path}.{key}"
                block = root.get_submodule(name)
                exact = [_output(_run(block, call.with_hidden(x))) for call, x in zip(own, exact, strict=False)]
                if names:
                    chosen = {layer: (by_name[layer], ranks[layer]) for layer in names}
                    numbers |= _quantized_block(
                        root, name, chosen, own[:count], own[count:], exact, weighting=weighting, tuning=tuning, options=options
                    )  # fmt: skip
                block = root.get_submodule(name)  # another one, if the block was a linear layer
                hidden = [_output(_run(block, call)) for call in own]
                report(position + 1)
    return report_of(LinearMaps(root), numbers, {}, before)


def _quantized_block(
    root: nn.Module,
    name: str,
    chosen: Mapping[str, tuple[BlockFormat, int]],
    calls: Sequence[_Call],
    held_out: Sequence[_Call],
    exact: Sequence[torch.Tensor],
    *,
    weighting: Callable[[Any], AbstractWeighting],
    tuning: BlockTuning | None,
    options: Mapping[str, Any],
) -> dict[str, QuantizedLayer]:
    """Quantize the layers of a block in place, given formats and ranks, and train them if that is asked for.

    ``exact`` holds the outputs of the dense model for ``calls``, which only training needs.
    """
    norms = _norms(root, name, chosen, calls, weighting)
    tests = [call for call in held_out if call.hidden.numel()]
    others = _norms(root, name, chosen, tests, weighting) if tests else {}
    dense = _weights(root, chosen) if others or tuning is not None else {}
    found = quantize_model(
        root,
        {layer: fmt for layer, (fmt, _) in chosen.items()},
        rank={layer: rank for layer, (_, rank) in chosen.items()},
        weighting=norms.get,
        progress=False,
        **options,
    ).layers
    if tuning is not None:
        _tune(root, name, dense, calls, exact, tuning)
        errors = _errors(root, dense, {layer: norms.get(layer) for layer in found})
        found = {layer: dataclasses.replace(own, relative_error=errors[layer]) for layer, own in found.items()}
    if others:
        errors = _errors(root, dense, others)
        found = {layer: dataclasses.replace(own, held_out_error=errors.get(layer)) for layer, own in found.items()}
    return found


def _require_options(batches: Iterable[Any], held_out: Iterable[Any], options: Mapping[str, Any]) -> None:
    """Raise if an argument does not suit blocks."""
    if "embeddings" in options:
        raise InvalidArgumentError("embeddings must be quantized by quantize_model, in a call of its own.")
    if not isinstance(options.get("scaling", 1.0), Real):
        raise InvalidArgumentError(f"scaling must be one number for all layers, got {given(options['scaling'])}.")
    for name, own in {"batches": batches, "held_out": held_out}.items():
        if isinstance(own, Mapping | torch.Tensor):
            raise InvalidArgumentError(f"{name} must be several batches, such as a list, got one. Pass [batch].")


def layers_in_blocks(
    model: nn.Module, include: Patterns | None = None, exclude: Patterns = ()
) -> dict[str, dict[str, nn.Module]]:
    """Return the layers that :func:`quantize_blocks` quantizes, block by block.

    Parameters
    ----------
    model : torch.nn.Module
        A model whose body is a list of blocks.
    include, exclude : patterns
        See :func:`select_linears`.

    Returns
    -------
    dict of str to dict of str to torch.nn.Module
        Linear layers by name, for each block by its name. A block may have none.

    Raises
    ------
    InvalidArgumentError
        If no layer of the blocks is selected, or the list of blocks is not clear.
    """
    layers = select_linears(model, include=include, exclude=exclude)
    path, items = _blocks(LinearMaps(model).modules, layers, None)
    return {
        block: {name: layer for name, layer in layers.items() if f"{name}.".startswith(f"{block}.")}
        for block in (f"{path}.{key}" for key in items)
    }


def _weights(root: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Return the weights of dense layers by name."""
    layers = {name: layer for name, layer in LinearMaps(root).layers.items() if name in names}
    return {name: load() for name, load in weight_arrays(layers).items()}


def _tune(
    root: nn.Module,
    name: str,
    dense: Mapping[str, Any],
    calls: Sequence[_Call],
    targets: Sequence[torch.Tensor],
    tuning: BlockTuning,
) -> None:
    """Train the layers of a block of a name so that it gives the hidden states of the dense model."""
    layers, block = quantized_layers(root), root.get_submodule(name)
    # Experts in one array are read by the model, which does not call them.
    tuned = {own: layers[own] for own in dense if not isinstance(root.get_submodule(own.rpartition(".")[0]), Experts)}
    before, after = tune_block(
        tuned,
        {own: torch.as_tensor(dense[own]) for own in tuned},
        lambda index: _output(_run(block, calls[index])),
        targets,
        tuning,
    )
    if _log.isEnabledFor(logging.INFO):
        with bars_hidden():
            _log.info("%s: relative error of its output %.4f, %.4f after tuning", printable(name), before, after)


def _errors(
    root: nn.Module, dense: Mapping[str, Any], norms: Mapping[str, AbstractWeighting | None]
) -> dict[str, float]:
    """Return the relative errors of quantized layers, each in its norm."""
    layers = quantized_layers(root)
    return {
        name: relative_error(dense[name], fast_array(merged_weight(layers[name])), norm, name=name)
        for name, norm in norms.items()
    }


def _norms(
    root: nn.Module,
    path: str,
    names: Iterable[str],
    calls: Sequence[_Call],
    weighting: Callable[[Any], AbstractWeighting],
) -> dict[str, AbstractWeighting]:
    """Return the norms of the layers of a block, from the inputs that the calls give them."""
    block = root.get_submodule(path)
    # Modules with the names of those around the block, and nothing else of them: errors name layers as the model does, and a block
    # that is a linear layer itself has a name.
    around = holder = nn.Module()
    *parents, last = path.split(".")
    for part in parents:
        around.add_module(part, nn.Module())
        around = around.get_submodule(part)
    around.add_module(last, block)
    grams = collect_gram(holder, calls, loss=lambda _, call: _run(block, call), include=list(names), progress=False)
    device = next(block.parameters()).device
    own: dict[int, AbstractWeighting] = {}  # layers that see the same inputs share a matrix
    for gram in grams.values():
        if id(gram) not in own:
            own[id(gram)] = weighting(fast_array(gram.to(device)))
    return {name: own[id(gram)] for name, gram in grams.items()}


def _blocks(
    modules: Mapping[str, nn.Module], names: Iterable[str], chosen: str | None
) -> tuple[str, dict[str, nn.Module]]:
    """Return the name of the list of blocks, and its items."""
    lists = {
        name: own for name, own in modules.items() if isinstance(own, nn.ModuleList) and not isinstance(own, Experts)
    }
    if chosen is not None and chosen not in lists:
        raise InvalidArgumentError(
            f"blocks must be the name of a torch.nn.ModuleList of the model, got {printable(chosen)!r}. There are {list_names(lists)}."
        )
    names = list(names)
    counts = {
        name: sum(own.startswith(f"{name}.") for own in names) for name in (lists if chosen is None else [chosen])
    }
    most = max(counts.values(), default=0)
    if not most:
        raise InvalidArgumentError(
            f"include must select a layer inside of a list of blocks, but none of {len(names)} ({list_names(names)}) is in one."
        )
    # A list inside of a block holds some of its layers; the outermost list holds all of them.
    best = [name for name, count in counts.items() if count == most]
    best = [name for name in best if not any(name.startswith(f"{other}.") for other in best)]
    if len(best) > 1:
        raise InvalidArgumentError(
            f"blocks must be given, because {list_names(best)} hold {most} layers each. Quantize them one after another."
        )
    return best[0], dict(lists[best[0]].named_children())


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore the modes of the modules that are left at the end."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():
            while name not in modes:  # a new part of a quantized layer
                name = name.rpartition(".")[0]  # noqa: PLW2901
            module.training = modes[name]


def _recorded(
    model: nn.Module, path: str, blocks: Sequence[nn.Module], batches: Iterable[Any]
) -> list[dict[int, _Call]]:
    """Run the model, and return the calls of all blocks for each part of each batch. Only the first has a hidden state.

    Raises
    ------
    InvalidArgumentError
        If the blocks do not run one after another.
    """
    found: list[dict[int, _Call]] = []
    last: list[Any] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position = positions[block]
        call = _Call(tuple(map(_without_cache, args)), {key: _without_cache(own) for key, own in kwargs.items()})
        if position != len(found[-1]) or (position and call.hidden is not last[-1]):
            raise InvalidArgumentError(
                f"model must run the blocks of {printable(path)!r} one after another, each once on the output of the one before, but not so "
                f"block {position}. Name another list of blocks, or use collect_gram and quantize_model."
            )
        if not isinstance(call.hidden, torch.Tensor):
            raise InvalidArgumentError(
                f"model must pass hidden states as the first argument of the blocks of {printable(path)!r}, got {type(call.hidden).__name__}."
            )
        found[-1][position] = (
            call.with_hidden(call.hidden.clone()) if position == 0 else call.with_hidden(call.hidden.new_empty(0))
        )

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last[:] = [_output(output)]

    positions = {block: position for position, block in enumerate(blocks)}
    handles = [own for block in blocks for own in (
        block.register_forward_pre_hook(before, with_kwargs=True, prepend=True), block.register_forward_hook(after),
    )]  # fmt: skip
    try:
        for batch in batches:
            for part in parts_of(model, batch):
                found.append({})
                run_model(model, part)
                if len(found[-1]) != len(blocks):
                    raise InvalidArgumentError(
                        f"model must run all {len(blocks)} blocks of {printable(path)!r}, but ran {len(found[-1])}."
                    )
                last.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _without_cache(value: Any) -> Any:
    """Return None for a cache of keys and values, which would grow with each call, and other arguments as they are."""
    return None if hasattr(value, "get_seq_length") else value


def _run(block: nn.Module, call: _Call) -> Any:
    own = call.with_hidden(call.hidden.clone())  # a block may change its input in place
    return block(*own.args, **own.kwargs)


def _output(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
