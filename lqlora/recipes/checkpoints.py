"""``compress_checkpoint``: one call from the files of a language model to a folder that transformers opens."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lqlora._annotations import annotated
from lqlora._documents import Reader
from lqlora._files import replace_folder, write_whole
from lqlora._messages import given, shortened
from lqlora._optional import require
from lqlora._options import require_choice, require_integer, require_number
from lqlora._progress import reported
from lqlora.allocation import allocate
from lqlora.costs import cost_table
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._calibration_folder import DIGESTS, described, source_digest
from lqlora.integrations._disk_models import list_layers
from lqlora.integrations._streaming_folder import small_files
from lqlora.integrations._streaming_tasks import tensor_digest
from lqlora.integrations._work_folders import compare_settings
from lqlora.integrations.calibration import calibrate_checkpoint
from lqlora.integrations.language_models import load_causal_model, load_language_model
from lqlora.integrations.sources import open_model
from lqlora.integrations.streaming import decompose_checkpoint
from lqlora.nn import collect_outputs, distill, freeze_scales
from lqlora.nn.model import quantized_layers
from lqlora.recipes.compression import (
    FITS,
    CompressionReport,
    candidates,
    fitting_format,
    learning_rate,
    steps,
)
from lqlora.recipes.evaluation import perplexity
from lqlora.recipes.text import Split, check_sequences

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from lqlora._patterns import Patterns
    from lqlora.allocation import Plan
    from lqlora.integrations.statistics import Statistics
    from lqlora.integrations.streaming_report import CheckpointReport
    from lqlora.nn import DistillationReport, TeacherOutputs
    from lqlora.recipes.compression import Codes

__all__ = ["compress_checkpoint"]

#: Sequences of a calibration batch.
_BATCH = 4

_SETTINGS, _SOURCE = "settings.json", "source"


@annotated
@torch.inference_mode(mode=False)  # factors train
def compress_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    bits: float | Fraction,
    split: Split,
    *,
    work: str | os.PathLike[str] | None = None,
    rank: int = 16,
    codes: Codes = "trellis",
    iterations: int = 4,
    include: Patterns | None = None,
    exclude: Patterns = (),
    progress: bool | Callable[[int, int], None] = True,
) -> CompressionReport:
    """Quantize the files of a language model within a budget of bits, into a folder that transformers opens.

    The stages up to the decomposition have one block, or a few matrices, of the model in memory. Distillation and perplexities need all
    of it; without sequences for training and evaluation there are none. The result of each stage is kept in ``work``. If the process is
    killed, the same call goes on from there.

    Parameters
    ----------
    source : path-like
        Folder of a causal language model of transformers, in safetensors files, or GGUF file of architecture ``llama``. The model of a
        file is decoded in memory.
    folder : path-like
        Folder to write. ``from_pretrained`` reads it after :func:`lqlora.integrations.transformers.register`.
    bits : float or Fraction
        See :func:`compress`.
    split : Split
        Token sequences: see :func:`split_sequences`. Statistics are collected on ``calibration``. Distillation takes ``training``, one
        sequence a step, and stops early by ``evaluation``. Both may be empty.
    work : path-like, optional
        Folder of the results of the stages; by default the one beside ``folder`` whose name has ``-work`` at the end. It may be removed
        afterwards.
    rank : int, default 16
        See :func:`compress`. Factors are stored in bfloat16.
    codes : {"trellis", "scalar"}
        See :func:`compress`.
    iterations : int, default 4
        Iterations of each decomposition.
    include, exclude : patterns
        Layers of the model to quantize, of those in the blocks: see :func:`lqlora.nn.select_linears`.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts runs of blocks, matrices, sequences and steps together.

    Returns
    -------
    CompressionReport
        Formats, errors, sizes, and perplexities if there are sequences for evaluation.

    Raises
    ------
    InvalidArgumentError
        If an option is out of its range, no layer can be quantized, or there are sequences for training and none for evaluation.
    InfeasibleBudgetError
        If the smallest format is not within the budget.
    CheckpointError
        If a file cannot be read or written, or ``work`` or ``folder`` hold something else.
    NonFiniteError
        If a weight, an input or a loss is NaN or infinite.

    Notes
    -----
    The stages, each of which is a function of its own, and what they leave in ``work``:

    0. A GGUF file becomes a folder of transformers in bfloat16: ``source``.
    1. :func:`calibrate_checkpoint <lqlora.integrations.calibration.calibrate_checkpoint>`: ``statistics``.
    2. For budgets between two formats, :func:`lqlora.cost_table` and :func:`lqlora.allocate` choose formats by the change of the loss that
       they make to be expected: ``costs.jsonl`` and ``plan.json``.
    3. :func:`lqlora.decompose_checkpoint`: ``folder``, or ``decomposed`` if it is distilled.
    4. :func:`lqlora.nn.distill` trains factors or scales: ``distillation.safetensors``.

    :func:`compress` does the same with a model in memory. There each block is quantized on the inputs that the quantized blocks before
    it give, and can be tuned by gradients.
    """
    require_number(bits, "bits", "above 0 and finite", lambda own: 0 < own < math.inf)
    require_integer(rank, "rank")
    require_integer(iterations, "iterations", 1)
    require_choice(codes, "codes", ("trellis", "scalar"))
    _check_tokens(split)
    parts = ["calibration", *(("evaluation",) if len(split.training) or len(split.evaluation) else ())]
    for name in (*parts, *(("training",) if len(split.training) else ())):
        try:
            check_sequences(getattr(split, name))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"split must have sequences for {name}: {error}") from None
    path, target = Path(source).absolute(), Path(folder).absolute()
    stages = target.with_name(f"{target.name}-work") if work is None else Path(work).absolute()
    _check_folders(path, target, stages, is_distilled=len(split.training) > 0)
    settings = {
        "bits": str(bits), "rank": int(rank), "codes": codes, "iterations": int(iterations), "include": described(include),
        "exclude": described(exclude), "source": source_digest(path),
        **{name: tensor_digest(getattr(split, name).cpu().numpy()) for name in split._fields},
    }  # fmt: skip
    with _begun(stages, settings):
        path = path if path.is_dir() else _as_folder(path, stages / _SOURCE)
        budget = bits if isinstance(bits, Fraction) else float(bits)
        run = _Stages(
            path, stages, split, budget, rank=int(rank), codes=codes, iterations=int(iterations), include=include, exclude=exclude
        )  # fmt: skip
        with reported(progress, "Compressing", sum(run.counts.values()), "step") as report:
            return run.report(target, steps(run.counts, report))


def _check_tokens(split: Split) -> None:
    """Raise unless all parts hold numbers of tokens."""
    for name in split._fields:
        own = getattr(split, name)
        if not isinstance(own, torch.Tensor) or own.is_floating_point() or own.is_complex():
            raise InvalidArgumentError(f"split must have a tensor of whole numbers for {name}, got {given(own)}.")


def _check_folders(source: Path, folder: Path, work: Path, *, is_distilled: bool) -> None:
    """Raise if a folder to write is in use for something else, before any work is done."""
    try:
        places = {"source": source.resolve(), "folder": folder.resolve(), "work": work.resolve()}
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        # A decomposition that was begun goes on.
        is_begun = folder.is_dir() and any((folder / own).exists() for own in ("lqlora.json", "unfinished/run.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}.")) from error
    for first, second in itertools.permutations(places, 2):
        if places[first].is_relative_to(places[second]):
            raise InvalidArgumentError(
                shortened(f"{first} must not be, or be in, {second}, got {places[first]} and {places[second]}.")
            )
    if not is_free and (is_distilled or not is_begun):
        raise CheckpointError(shortened(f"{folder} exists. Name another folder."))


@contextlib.contextmanager
def _begun(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Write what the results of the stages depend on, or compare it with what is there; remove it if an error leaves no result."""
    is_new = not work.exists()
    try:
        _begin(work, settings)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{work} cannot be written: {error}.")) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if {path.name for path in work.iterdir()} <= {_SETTINGS, _SOURCE}:
                (work / _SETTINGS).unlink()
                shutil.rmtree(work / _SOURCE, ignore_errors=True)
                if is_new:
                    work.rmdir()
        raise


def _begin(work: Path, settings: dict[str, Any]) -> None:
    path = work / _SETTINGS
    names = {own.name for own in work.iterdir()} if work.exists() else set()
    if names <= {_SETTINGS}:  # nothing is finished, and other settings may be tried
        work.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{json.dumps(settings)}\n".encode())
        return
    if _SETTINGS not in names:
        raise CheckpointError(shortened(f"{work} is not empty, and holds no results of stages. Name another folder."))
    found = Reader(f"{path} is damaged", CheckpointError).read(path.read_bytes(), dict[str, Any])
    compare_settings(work, found, settings, DIGESTS | dict.fromkeys(Split._fields, DIGESTS["batches"]))


def _as_folder(path: Path, folder: Path) -> Path:
    """Return a folder of transformers with the model of a GGUF file."""
    if not folder.exists():
        model, tokenizer = load_language_model(path)
        with replace_folder(folder) as beside:
            model.to(torch.bfloat16).save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    return folder


class _Stages:
    """Stages of one compression."""

    def __init__(
        self,
        source: Path,
        work: Path,
        split: Split,
        bits: float | Fraction,
        *,
        rank: int,
        codes: Codes,
        iterations: int,
        include: Patterns | None,
        exclude: Patterns,
    ) -> None:
        self._source, self._work, self._split, self._bits = source, work, split, bits
        self._rank, self._codes, self._iterations = rank, codes, iterations
        self._include, self._exclude = include, exclude
        transformers = require("transformers", "demo", "Compression of models in files")
        blocks, shapes = list_layers(source, transformers.AutoModelForCausalLM, include, exclude)
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        _check_vocabulary(split, config.get_text_config().vocab_size)
        # One format for all needs no gradients, and no table.
        self._known = fitting_format(candidates(codes, rank), bits, shapes, FITS[codes])
        training, tests = len(split.training), len(split.evaluation)
        self.counts = {
            "calibration": len(blocks) * (1 if self._known else 2),
            "table": 0 if self._known else len(shapes),
            "decomposition": len(shapes),
            "dense": tests,
            "teacher": training + tests if training else 0,
            "quantized": tests,
            "training": training,
            "distilled": tests if training else 0,
        }

    def report(self, folder: Path, step: Callable[[str], Callable[[int, int | None], None]]) -> CompressionReport:
        """Run all stages."""
        statistics = calibrate_checkpoint(
            self._source, self._work / "statistics", list(self._split.calibration.split(_BATCH)), gradients=self._known is None,
            include=self._include, exclude=self._exclude, progress=step("calibration"),
        )  # fmt: skip
        formats = self._known or self._planned(statistics, step("table"))
        is_distilled = len(self._split.training) > 0
        decomposed = self._work / "decomposed" if is_distilled else folder
        decomposition = decompose_checkpoint(
            self._source, decomposed, formats, rank=self._rank, include=list(statistics.inputs), weighting=statistics.weighting(),
            fit=FITS[self._codes], quantizer="nearest" if self._rank else "gptq", max_iter=self._iterations, rtol=0.0,
            factor_dtype="bfloat16", progress=step("decomposition"),
        )  # fmt: skip
        tests, perplexities, distillation = self._split.evaluation, dict[str, float](), None
        if len(tests):
            model = load_causal_model(self._source)
            dtype = getattr(torch, str(model.config.dtype or "float32").removeprefix("torch."))
            perplexities["dense"] = perplexity(model, tests, progress=step("dense"))
            batches = [own[None] for own in self._split.training]
            outputs = collect_outputs(model, [*batches, *tests.split(1)], progress=step("teacher")) if batches else None
            del model
            model = load_causal_model(decomposed, may_be_quantized=True)
            perplexities["quantized"] = perplexity(model, tests, progress=step("quantized"))
            if outputs is not None:
                distillation = self._distill(model, outputs, decomposition, step("training"))
                perplexities["distilled"] = perplexity(model, tests, progress=step("distilled"))
                with replace_folder(folder) as beside:
                    model.to(dtype).save_pretrained(beside)
                    for path in small_files(decomposed):
                        if not (beside / path.name).exists():
                            shutil.copyfile(path, beside / path.name)
        return CompressionReport(formats, decomposition, distillation, perplexities)

    def _planned(self, statistics: Statistics, progress: Callable[[int, int | None], None]) -> Plan:
        """Choose a format for each matrix."""
        weights = open_model(self._source).weights
        table = cost_table(
            {name: weights[name] for name in statistics.inputs}, candidates(self._codes, self._rank), rank=self._rank, clip_rank=True,
            fit=FITS[self._codes], max_iter=1, weighting=statistics.weighting(), store=self._work / "costs.jsonl", progress=progress,
        )  # fmt: skip
        plan = allocate(table, bits_per_weight=self._bits)
        write_whole(self._work / "plan.json", f"{plan.to_json()}\n".encode())
        return plan

    def _distill(
        self,
        model: torch.nn.Module,
        outputs: TeacherOutputs,
        decomposition: CheckpointReport,
        progress: Callable[[int, int | None], None],
    ) -> DistillationReport:
        """Train factors or scales, and round them to what is stored."""
        matrices = decomposition.matrices.values()
        stored = 8 * sum(own.nbytes for own in matrices) / sum(own.size for own in matrices)
        report = distill(
            model, outputs, [own[None] for own in self._split.training], held_out=list(self._split.evaluation.split(1)),
            train=("factors",) if self._rank else ("scales",), checkpoint=self._work / "distillation.safetensors",
            learning_rate=learning_rate(max(own.rank for own in matrices), stored), progress=progress,
        )  # fmt: skip
        if not self._rank:
            freeze_scales(model, candidates(self._codes, self._rank)[0].scales)
        for layer in quantized_layers(model).values():
            for own in (layer.lora_A, layer.lora_B):
                own.data.copy_(own.detach().bfloat16())
        return report


def _check_vocabulary(split: Split, known: int) -> None:
    """Raise if a token is not one of the model."""
    for name, own in split._asdict().items():
        if own.numel() and not 0 <= int(own.min()) <= int(own.max()) < known:
            raise InvalidArgumentError(
                f"split must have tokens from 0 to {known - 1} for {name}, those of the model, got {int(own.min())} to {int(own.max())}."
            )
