"""Calibration block after block: each block of a model is quantized on the inputs that the quantized blocks before it give."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora._annotations import annotated
from lqlora._messages import given
from lqlora._printable import printable
from lqlora._progress import bars_hidden, reported
from lqlora.allocation import Plan
from lqlora.decomposition import relative_error
from lqlora.errors import InvalidArgumentError
from lqlora.nn.block_calls import collect_block_gram, evaluated, find_blocks, hidden_of, record_calls, run_block
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
from lqlora.nn.statistics.hooks import living_layers
from lqlora.nn.undoing import unchanged_on_error
from lqlora.weighting import InputGram

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from lqlora._patterns import Pattern, Patterns
    from lqlora.formats import BlockFormat
    from lqlora.nn.block_calls import BlockCall
    from lqlora.nn.block_tuning import BlockTuning
    from lqlora.nn.report import QuantizationReport, QuantizedLayer
    from lqlora.weighting import AbstractWeighting

__all__ = ["layers_in_blocks", "quantize_blocks"]

_log = logging.getLogger("lqlora")


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
    path, items = find_blocks(maps.modules, by_name, blocks)
    inside = [[name for name in by_name if f"{name}.".startswith(f"{path}.{key}.")] for key in items]
    before = bytes_of(root)
    numbers: dict[str, QuantizedLayer] = {}
    with evaluated(root), unchanged_on_error(root):
        calls = [own.calls for own in record_calls(root, path, list(items.values()), batches)]
        if not calls:
            raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
        count = len(calls)
        calls += [own.calls for own in record_calls(root, path, list(items.values()), held_out)]
        hidden = [one[0].hidden for one in calls]
        exact = hidden[:count] if tuning is not None else []  # hidden states of the dense model
        with reported(progress, "Quantizing", len(items), "block") as report:
            for position, (key, names) in enumerate(zip(items, inside, strict=True)):
                own = [call[position].with_hidden(x) for call, x in zip(calls, hidden, strict=True)]
                name = f"{path}.{key}"
                block = root.get_submodule(name)
                exact = [hidden_of(run_block(block, call.with_hidden(x))) for call, x in zip(own, exact, strict=False)]
                if names:
                    chosen = {layer: (by_name[layer], ranks[layer]) for layer in names}
                    numbers |= _quantized_block(
                        root, name, chosen, own[:count], own[count:], exact, weighting=weighting, tuning=tuning, options=options
                    )  # fmt: skip
                block = root.get_submodule(name)  # another one, if the block was a linear layer
                hidden = [hidden_of(run_block(block, call)) for call in own]
                report(position + 1)
    return report_of(LinearMaps(root), numbers, {}, before)


def _quantized_block(
    root: nn.Module,
    name: str,
    chosen: Mapping[str, tuple[BlockFormat, int]],
    calls: Sequence[BlockCall],
    held_out: Sequence[BlockCall],
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
    path, items = find_blocks(LinearMaps(model).modules, layers, None)
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
    calls: Sequence[BlockCall],
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
        lambda index: hidden_of(run_block(block, calls[index])),
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
    names: Collection[str],
    calls: Sequence[BlockCall],
    weighting: Callable[[Any], AbstractWeighting],
) -> dict[str, AbstractWeighting]:
    """Return the norms of the layers of a block, from the inputs that the calls give them."""
    block = root.get_submodule(path)
    grams = collect_block_gram(path, block, names, calls)
    living_layers({name: name in grams for name in names}, "an input")
    device = next(block.parameters()).device
    own: dict[int, AbstractWeighting] = {}  # layers that see the same inputs share a matrix
    for gram in grams.values():
        if id(gram) not in own:
            own[id(gram)] = weighting(fast_array(gram.to(device)))
    return {name: own[id(gram)] for name, gram in grams.items()}
