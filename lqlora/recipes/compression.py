"""``compress``: one call from a dense language model to a quantized one that distillation has repaired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from lqlora._annotations import annotated
from lqlora._files import check_writable
from lqlora._options import require_choice, require_integer, require_number
from lqlora._progress import reported
from lqlora.allocation import allocate
from lqlora.checkpoint.runs import read_run
from lqlora.costs import cost_table
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.nn import (
    BlockTuning,
    collect_kronecker,
    collect_outputs,
    distill,
    freeze_scales,
    quantize_blocks,
    weight_arrays,
)
from lqlora.nn.blocks import layers_in_blocks
from lqlora.nn.model import fast_array
from lqlora.quantized.quantization import with_fitted_levels
from lqlora.recipes.evaluation import perplexity
from lqlora.recipes.text import check_sequences
from lqlora.weighting import InputGram

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from lqlora._patterns import Patterns
    from lqlora.allocation import Plan
    from lqlora.integrations.streaming_report import CheckpointReport
    from lqlora.nn import DistillationReport, QuantizationReport
    from lqlora.nn.block_tuning import TunedPart
    from lqlora.quantized import Fit
    from lqlora.recipes.text import Split

__all__ = ["Codes", "CompressionReport", "compress"]

Codes: TypeAlias = Literal["trellis", "scalar"]

_SCALES = "u8/256:float32"
FITS: dict[str, Fit] = {"trellis": "scale", "scalar": "levels+scale"}

#: Budgets that are larger than a format by less than this many bits per weight get that format for all layers.
_CLOSE = 0.1

#: Mean squared gradient of layers without gradients: next to nothing.
NOTHING = 2.0**-60

#: Sequences of a calibration batch.
_BATCH = 4
#: Largest learning rate of factors of rank 16 at two bits. Rates of 4e-4 at rank 16 and 1.5e-4 at rank 64 were found by experiments, and the
#: power of the rank goes through both. So was 1e-4 at three bits: with 4e-4 nothing is gained. The error has a quarter of the energy there.
_RATE, _RATE_RANK, _RATE_POWER, _RATE_BITS = 4e-4, 16, 0.7, 2.127


@dataclass(frozen=True)
class CompressionReport:
    """Formats, errors, sizes and perplexities of a model that :func:`compress` quantized.

    Parameters
    ----------
    formats : Plan or BlockFormat
        Plan of formats, or the one format of all layers.
    quantization : QuantizationReport or CheckpointReport
        Layers with their errors and bytes.
    distillation : DistillationReport or None
        Training of factors or scales, if there was any.
    perplexities : dict of str to float
        Perplexity on the sequences for evaluation, by ``"dense"``, ``"quantized"``, and ``"distilled"`` if there was distillation. Empty without such sequences.
    """

    formats: Plan | BlockFormat
    quantization: QuantizationReport | CheckpointReport
    distillation: DistillationReport | None
    perplexities: dict[str, float]

    def __str__(self) -> str:
        lines = [str(self.quantization)]
        if self.distillation is not None:
            lines.append(str(self.distillation))
        if self.perplexities:
            lines.append("perplexity: " + ", ".join(f"{value:.4g} {name}" for name, value in self.perplexities.items()))
        return "\n".join(lines)


@annotated
@torch.inference_mode(mode=False)  # factors train
def compress(
    model: torch.nn.Module,
    split: Split,
    bits: float | Fraction,
    *,
    rank: int = 16,
    codes: Codes = "trellis",
    iterations: int = 4,
    tuning_steps: int = 0,
    include: Patterns | None = None,
    exclude: Patterns = (),
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> CompressionReport:
    """Quantize the linear layers of a language model within a budget of bits, and repair it by distillation, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Dense causal language model of blocks that run one after another, on the device of the sequences. It returns logits, or an
        object that has ``logits``.
    split : Split
        Token sequences: see :func:`split_sequences`. Inputs of layers are collected on ``calibration``, distillation takes ``training``,
        one sequence a step, and stops early by ``evaluation``. Without sequences for training there is no distillation.
    bits : float or Fraction
        Budget in bits per weight of the quantized layers, codes and scales included, factors not included. If one format takes as much,
        or up to 0.1 less, all layers get that format: 2.13 and 3.13 are such budgets for most models. With others formats are chosen
        for each layer.
    rank : int, default 16
        Rank of the low-rank factors, which distillation trains. With rank 0 it trains the scales instead, and rounds them to their storage
        at the end.
    codes : {"trellis", "scalar"}
        ``"trellis"``: trellis codes of 1 to 4 bits, with less error. ``"scalar"``: levels for each weight, of 2 to 8 bits, with fitted
        scales. They are found faster, on CUDA devices above all, where the search for trellis codes has no kernel.
    iterations : int, default 4
        Iterations of each decomposition.
    tuning_steps : int, default 0
        Steps of gradients for each block right after it was quantized, on four sequences each: see :class:`lqlora.nn.BlockTuning`. They
        train scales, scalar codes, and factors.
    include, exclude : patterns
        Layers to quantize, of those in the blocks: see :func:`lqlora.nn.select_linears`. Layers outside the blocks stay dense.
    checkpoint : path-like, optional
        File that keeps the state of the distillation: see :func:`lqlora.nn.distill`.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts batches, matrices, blocks and steps together.

    Returns
    -------
    CompressionReport
        Formats, errors, sizes and perplexities.

    Raises
    ------
    InvalidArgumentError
        If an option is out of its range, no layer can be quantized, or there is no sequence for calibration or evaluation.
    InfeasibleBudgetError
        If the smallest format is not within the budget.
    CheckpointError
        If ``checkpoint`` cannot be written, or is the file of another run.
    NonFiniteError
        If a weight, an input or a loss is NaN or infinite.

    Notes
    -----
    The stages, each of which is a function of its own:

    1. :func:`lqlora.nn.collect_outputs` keeps the outputs of the dense model.
    2. For budgets between two formats, :func:`lqlora.cost_table` and :func:`lqlora.allocate` choose formats. The cost of an error is the
       change of the loss that it makes to be expected: the error of the outputs times the mean squared gradient there.
    3. :func:`lqlora.nn.quantize_blocks` quantizes block after block. Without factors weights are rotated and get error feedback.
    4. :func:`lqlora.nn.distill` trains factors or scales.

    After an error or interrupt before the end of the third stage the model is as it was before. All parameters that do not train are
    frozen. Training takes the mode that the model is in, so that a model in training mode has its dropout.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> _ = torch.manual_seed(0)
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.head = torch.nn.Embedding(20, 32), torch.nn.Linear(32, 20)
    ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))
    ...     def forward(self, ids):
    ...         x = self.embed(ids)
    ...         for block in self.blocks:
    ...             x = block(x)
    ...         return self.head(x)
    >>> tokens = torch.randint(20, (12, 16))
    >>> split = lq.recipes.split_sequences(tokens, calibration=4, training=4, evaluation=4)
    >>> report = compress(Model(), split, bits=3.2, rank=2, include="blocks.*")
    >>> str(report.formats), sorted(report.perplexities)
    ('tcq3/64:u8/256:float32', ['dense', 'distilled', 'quantized'])
    """
    require_number(bits, "bits", "above 0 and finite", lambda own: 0 < own < math.inf)
    require_integer(rank, "rank")
    require_integer(iterations, "iterations", 1)
    require_integer(tuning_steps, "tuning_steps")
    require_choice(codes, "codes", ("trellis", "scalar"))
    for name in ("calibration", "evaluation", *(("training",) if len(split.training) else ())):
        try:
            check_sequences(getattr(split, name))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"split must have sequences for {name}: {error}") from None
    rank = int(rank)
    training, tests = [part[None] for part in split.training], list(split.evaluation.split(1))
    if checkpoint is not None:
        _check_checkpoint(checkpoint, training)
    tuning = _tuning(int(tuning_steps), codes, rank)
    calibration = list(split.calibration.split(1 if tuning else _BATCH))
    blocks = layers_in_blocks(model, include, exclude)
    layers = {name: layer for own in blocks.values() for name, layer in own.items()}
    shapes = [tuple(load().shape) for load in weight_arrays(layers).values()]
    known = fitting_format(candidates(codes, rank), bits, shapes, FITS[codes])
    size = sum(map(math.prod, shapes))
    counts = {
        "dense": len(tests),
        "teacher": len(training) + len(tests) if training else 0,
        "plan": 0 if known else len(calibration) + len(layers),
        "blocks": len(blocks),
        "quantized": len(tests),
        "training": len(training),
        "distilled": len(tests) if training else 0,
    }
    with reported(progress, "Compressing", sum(counts.values()), "step") as report:
        step = steps(counts, report)

        def measured(stage: str) -> float:
            return perplexity(model, split.evaluation, progress=step(stage))

        perplexities, outputs, distillation = {"dense": measured("dense")}, None, None
        if training:
            outputs = collect_outputs(model, [*training, *tests], progress=step("teacher"))
        formats = known or _planned(model, layers, calibration, bits, rank, codes, step("plan"))
        quantization = quantize_blocks(
            model, formats, calibration, rank=rank, include=list(layers), progress=step("blocks"), fit=FITS[codes],
            quantizer="nearest" if rank else "gptq", max_iter=iterations, rtol=0.0, held_out=tests, tuning=tuning,
        )  # fmt: skip
        perplexities["quantized"] = measured("quantized")
        if outputs is not None:
            stored = sum(8 * own.nbytes for own in quantization.layers.values())
            distillation = distill(
                model, outputs, training, held_out=tests, train=("factors",) if rank else ("scales",), checkpoint=checkpoint,
                learning_rate=learning_rate(min(rank, max(map(min, shapes))), stored / size), progress=step("training"),
            )  # fmt: skip
            if not rank:
                freeze_scales(model, candidates(codes, rank)[0].scales)
            perplexities["distilled"] = measured("distilled")
    return CompressionReport(formats, quantization, distillation, perplexities)


def _tuning(steps: int, codes: Codes, rank: int) -> BlockTuning | None:
    """Return the training of each block, if there is any."""
    parts: list[TunedPart] = ["scales"]
    parts += ["codes"] if codes == "scalar" else []
    parts += ["factors"] if rank else []
    return BlockTuning(steps=steps, train=parts, batch=_BATCH) if steps else None


def learning_rate(rank: int, bits: float) -> float:
    """Return the largest learning rate of factors of a rank, beside codes and scales of some bits per weight."""
    of_rank: float = (_RATE_RANK / max(1, rank)) ** _RATE_POWER
    of_bits: float = 4.0 ** -max(0.0, bits - _RATE_BITS)
    return _RATE * of_rank * of_bits


def steps(
    counts: Mapping[str, int], report: Callable[[int], None]
) -> Callable[[str], Callable[[int, int | None], None]]:
    """Return a function that gives each stage its own function for progress, within the steps of all stages."""
    stages = list(counts)

    def step(stage: str) -> Callable[[int, int | None], None]:
        """Return the function of one stage."""
        before = sum(counts[own] for own in stages[: stages.index(stage)])
        return lambda done, _: report(before + done)

    return step


def candidates(codes: Codes, rank: int) -> list[BlockFormat]:
    """Return the formats to choose from, the smallest first.

    Parameters
    ----------
    codes : {"trellis", "scalar"}
        Kind of the codes.
    rank : int
        Rank of the factors. Without factors formats rotate the matrix, and those of trellis codes have blocks down the columns, which
        error feedback needs.

    Returns
    -------
    list of BlockFormat
        One format for each number of bits.
    """
    names = ["tcq1", "tcq2", "tcq3", "tcq4"] if codes == "trellis" else ["nf2", "nf3", "nf4", "nf6", "nf8"]
    place = "" if rank else ("@0~both" if codes == "trellis" else "@-1~both")
    return [BlockFormat.parse(f"{name}/64{place}:{_SCALES}") for name in names]


def _check_checkpoint(path: str | os.PathLike[str], training: list[torch.Tensor]) -> None:
    """Raise unless a file can keep the state of the distillation, before any work is done."""
    if not training:
        raise InvalidArgumentError(
            "checkpoint must not be given without sequences for training, because nothing is distilled."
        )
    check_writable(path)
    if Path(path).exists():
        read_run(path)


def fitting_format(
    formats: list[BlockFormat], bits: float | Fraction, shapes: list[tuple[int, ...]], fit: Fit
) -> BlockFormat | None:
    """Return the largest format within a budget if it nearly fills it, or is the largest of all."""
    size = sum(map(math.prod, shapes))
    stored = [with_fitted_levels(own) if fit == "levels+scale" else own for own in formats]
    sizes = [Fraction(sum(map(own.storage_bits, shapes)), size) for own in stored]
    if sizes[0] > bits:
        message = (
            f"bits must be at least {float(sizes[0]):.4f}, which the smallest format takes, got {float(bits):.4f}."
        )
        raise InfeasibleBudgetError(message, asked=Fraction(bits), minimum=sizes[0], maximum=sizes[-1])
    best = max(index for index, own in enumerate(sizes) if own <= bits)
    return formats[best] if best == len(formats) - 1 or bits - sizes[best] < _CLOSE else None


def _planned(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    batches: list[torch.Tensor],
    bits: float | Fraction,
    rank: int,
    codes: Codes,
    progress: Callable[[int, int | None], None],
) -> Plan:
    """Return a plan of formats within a budget."""
    moments = collect_kronecker(model, batches, include=list(layers), progress=progress)
    weights, norms = weight_arrays(layers), {}
    for name, load in weights.items():
        # Half of tr(G E R E^T) is the change of the loss to be expected. G is noisy, so that its mean diagonal stands for it. A
        # layer without gradients has a moment of almost nothing.
        outputs, inputs = moments.get(name, (torch.zeros(1, 1), torch.eye(load().shape[1])))
        norms[name] = InputGram(fast_array(inputs * (float(outputs.diagonal().mean()) or NOTHING)))
    table = cost_table(
        weights, candidates(codes, rank), rank=rank, clip_rank=True, weighting=norms, fit=FITS[codes], max_iter=1,
        progress=lambda done, total: progress(len(batches) + done, total),
    )  # fmt: skip
    return allocate(table, bits_per_weight=bits)
