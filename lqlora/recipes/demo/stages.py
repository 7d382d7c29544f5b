"""Stages of the demo: Fisher information, cost table, plans, decompositions, fine-tuning, checkpoints, measurements."""

from __future__ import annotations

import copy
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

import lqlora as lq
from lqlora import nn
from lqlora._documents import Reader, Text
from lqlora._files import is_being_written, remove_left_over, replace_folder
from lqlora._messages import given
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.gguf import load_llama, packaged_smollm2
from lqlora.recipes.demo.report import Row, draw, tabulate
from lqlora.recipes.demo.settings import NF3, NF4, Settings
from lqlora.recipes.evaluation import perplexity
from lqlora.recipes.fine_tuning import fine_tune
from lqlora.recipes.text import Split, packaged_text, read_text, split_sequences, token_sequences
from lqlora.weighting import Elementwise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from lqlora.allocation import Plan
    from lqlora.reports.tables import Table

__all__ = ["Stage", "run_demo"]

#: File in an output folder with the names of the others. Only a folder that holds nothing else is replaced.
_NAMES = ".lqlora-demo.json"

#: A function of the title of a stage. It returns a context manager around the stage, which yields a callback for
#: progress: it takes the number of steps done and the number of all.
Stage: TypeAlias = "Callable[[str], AbstractContextManager[Callable[[int, int | None], None]]]"


def _silent(_: str) -> AbstractContextManager[Callable[[int, int | None], None]]:
    """Show no progress: the default :data:`Stage`."""
    return nullcontext(lambda *_: None)


@dataclass
class _Work:
    """Inputs and results that the stages share."""

    settings: Settings
    base: torch.nn.Module
    split: Split
    folder: Path
    stage: Stage
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)


def run_demo(
    settings: Settings,
    output: Path,
    *,
    model_file: Path | None = None,
    text_file: Path | None = None,
    force: bool = False,
    stage: Stage = _silent,
) -> Table:
    """Compress, fine-tune, save, reload and measure a model; leave plans, checkpoints, table and picture in a folder.

    Parameters
    ----------
    settings : Settings
        Sizes, formats and budgets.
    output : Path
        Folder to make. It appears, complete, when every stage has succeeded.
    model_file, text_file : Path, optional
        GGUF model of architecture ``llama``, and UTF-8 text. The defaults are the packaged model and text.
    force : bool, default False
        Replace an existing folder, if it holds nothing but files of an earlier demo.
    stage : callable, optional
        Called with the title of each stage, to show progress; returns a context manager that yields a function of the
        number of steps done and the number of all.

    Returns
    -------
    Table
        The table of results.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, a budget is infeasible, or another process writes the folder. In this case the
        folder is unchanged. If another process has filled it meanwhile, the results are beside it, where the error says.
    """
    if settings.rank < 1:
        raise InvalidArgumentError(
            f"rank must be at least 1, because the demo fine-tunes low-rank factors, got {settings.rank}."
        )
    _check_inputs(output, model_file=model_file, text_file=text_file)
    text = packaged_text() if text_file is None else read_text(text_file)
    model_file = model_file or packaged_smollm2()
    with _folder(output, force=force) as folder:
        with stage("Reading the model"):
            base, tokenizer = load_llama(model_file)
        work = _Work(settings, base, _split(tokenizer, text, settings), folder, stage)
        _check_budgets(work)
        work.rows.append(Row("fp32", 32.0, _parameter_bytes(base) / 1e6, 0.0, _measure(work, base, "fp32")))
        fisher = _fisher(work)
        plans = _plans(work, fisher)
        _compare(work, plans, fisher)
        table = tabulate(work.rows)
        (folder / "table.md").write_text(f"{table.markdown()}\n", encoding="utf-8")
        draw(folder / "picture.png", plans, work.curves)
    return table


def _split(tokenizer: Any, text: str, settings: Settings) -> Split:
    return split_sequences(
        token_sequences(tokenizer, text, settings.length),
        calibration=settings.calibration,
        training=settings.steps * settings.batch,
        evaluation=settings.evaluation,
    )


def _check_inputs(output: Path, **files: Path | None) -> None:
    """Raise if an input would be replaced together with the output folder."""
    folder = _real(output, "output")
    for name, file in files.items():
        if file is not None and _real(file, name).is_relative_to(folder):
            raise CheckpointError(
                f"{name} {file} is inside the output folder {output}, which the demo replaces. Pass another folder."
            )


def _real(path: Path, name: str) -> Path:
    """Return the path without links; raise if it has a zero byte."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise CheckpointError(f"{name} must be a path, got {given(str(path))}: {error}.") from error


@contextmanager
def _folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder beside the output, which replaces the output at the end and is removed after an error."""

    def check() -> None:
        if output.exists() and not force:
            raise CheckpointError(f"{output} exists. Pass another folder, or force=True to replace it.")
        if output.exists() and not _is_ours(output):
            raise CheckpointError(
                f"{output} holds files that no demo wrote, and is not replaced. Pass another folder, or empty this one."
            )

    if not force and is_being_written(output):
        raise CheckpointError(f"{output} is being written by another process. Wait for it, or pass another folder.")
    with replace_folder(output, check) as folder:  # checked at the end too: a demo takes minutes
        yield folder
        for entry in tuple(folder.iterdir()):  # what is left over of a write must not be listed as a file of the demo
            remove_left_over(entry)
        names = sorted(entry.name for entry in folder.iterdir())
        text = Reader(_NAMES, CheckpointError).write(names, list[Text])
        (folder / _NAMES).write_text(text, encoding="utf-8")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is empty, or holds nothing but files that a demo has listed in it."""
    if not folder.is_dir():
        return False
    found = {entry.name: entry.is_file() and not entry.is_symlink() for entry in folder.iterdir()}
    try:
        listed = Reader(_NAMES, CheckpointError).read((folder / _NAMES).read_bytes(), list[Text])
    except OSError:  # CheckpointError is one
        return not found
    return all(own and (name == _NAMES or name in listed) for name, own in found.items())


def _measure(work: _Work, model: torch.nn.Module, name: str) -> float:
    with work.stage(f"Perplexity of {name}") as progress:
        return perplexity(model, work.split.evaluation, progress=progress)


def _fisher(work: _Work) -> dict[str, Elementwise]:
    sequences = work.split.calibration
    with work.stage("Fisher information") as progress:
        found = nn.collect_fisher(work.base, sequences.split(1), progress=progress)
    # sweeps=0 is the rank-one surrogate of the paper. With so few sequences the Fisher information of single weights
    # is too noisy: minimizing the elementwise norm itself (sweeps=1) gave a higher perplexity after fine-tuning.
    return {name: Elementwise(values.numpy(), sweeps=0) for name, values in found.items()}


def _plans(work: _Work, fisher: Mapping[str, Elementwise]) -> dict[str, Plan]:
    """Build the cost table, make a plan for each budget, and write the plans."""
    settings = work.settings
    weights = nn.weight_arrays(nn.select_linears(work.base))
    with work.stage(f"Cost table of {len(weights)} matrices x {len(settings.formats)} formats") as progress:
        table = lq.cost_table(
            weights,
            settings.formats,
            rank=settings.rank,
            weighting=fisher,
            seed=settings.seed,
            progress=progress,
        )
    plans = _solve(table, settings)
    for name, plan in plans.items():
        (work.folder / f"{_file_name(name)}.plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    return plans


def _solve(table: lq.CostTable, settings: Settings) -> dict[str, Plan]:
    uniform = Fraction(sum(NF3.storage_bits(shape) for shape in table.shapes), table.weight_count)
    plans: dict[str, Plan] = {}
    for budget in settings.budgets:
        bits = uniform if budget is None else budget
        name = f"LQ-LoRA {float(bits):.4g}"
        if name in plans:
            raise InvalidArgumentError(
                f"budgets must differ in their first four digits, got {float(bits):.4g} bits per weight twice. "
                f"None is NF3 and takes {float(uniform):.4g}. Change one of the two."
            )
        plans[name] = lq.allocate(table, bits_per_weight=bits)
    return plans


def _check_budgets(work: _Work) -> None:
    """Solve with costs of zero, so that an infeasible budget is found before any work is done."""
    formats = work.settings.formats
    shapes = {name: load().shape for name, load in nn.weight_arrays(nn.select_linears(work.base)).items()}
    sizes = np.array([[fmt.storage_bits(shape) for fmt in formats] for shape in shapes.values()], dtype=np.int64)
    configurations = tuple(lq.Configuration(fmt, work.settings.rank) for fmt in formats)
    zeros = np.zeros(sizes.shape)
    table = lq.CostTable(tuple(shapes), tuple(shapes.values()), configurations, zeros, sizes, zeros.astype(np.int64))
    _solve(table, work.settings)


def _file_name(name: str) -> str:
    return name.lower().replace(" ", "-")


def _compare(work: _Work, plans: Mapping[str, Plan], fisher: Mapping[str, Elementwise]) -> None:
    """Make and measure each quantized model; fine-tune some of them, save and reload the planned ones."""
    iterations = work.settings.iterations
    _variant(work, "QLoRA NF4", NF4, {"init": "zero"})
    _tune(work, _variant(work, "QLoRA NF3", NF3, {"init": "zero"}))
    # LoftQ as published: it starts from the quantized matrix and takes five plain alternations, without a stopping rule.
    _variant(
        work, "LoftQ NF3", NF3, {"init": "quantize", "extrapolation": 0.0, "max_iter": min(5, iterations), "rtol": 0.0}
    )
    for name, plan in plans.items():
        model = _variant(work, name, plan, {"weighting": fisher, "max_iter": iterations})
        _tune(work, model)
        _save_and_reload(work, name, model)


def _variant(work: _Work, name: str, formats: Any, options: dict[str, Any]) -> torch.nn.Module:
    model = _clone(work.base)
    start = time.perf_counter()
    with work.stage(f"Decomposing for {name}") as progress:
        report = nn.quantize_model(
            model, formats, rank=work.settings.rank, seed=work.settings.seed, progress=progress, **options
        )
    seconds = time.perf_counter() - start
    error = _relative_error(work.base, model)
    before = _measure(work, model, name)
    work.rows.append(Row(name, report.bits_per_weight, report.total_bytes / 1e6, error, before, seconds=seconds))
    if options.get("init") != "zero":
        work.curves[name] = _mean_curve(report)
    return model


def _clone(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the modules that shares their tensors, so that unquantized tensors are in memory once."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo=dict(shared))


def _relative_error(base: torch.nn.Module, model: torch.nn.Module) -> float:
    """Return the relative Frobenius error of all matrices together, also if they were decomposed in another norm."""
    squares = np.zeros(2)
    for name, load in nn.weight_arrays(nn.select_linears(base)).items():
        weight = load()
        layer = cast("nn.LQLinear", model.get_submodule(name))
        approximation = layer.quantized.dequantize() + layer.scaling * layer.lora_B @ layer.lora_A
        residual = weight - approximation.detach().numpy()
        squares += lq.ops.sum_of_squares(residual), lq.ops.sum_of_squares(weight)
    return float(np.sqrt(squares[0] / squares[1]))


def _mean_curve(report: nn.QuantizationReport) -> list[float]:
    """Return the mean over matrices of the error by iteration; a curve that ended early continues at its best error."""
    layers = report.layers.values()
    longest = max(len(layer.errors) for layer in layers)
    padded = [[*layer.errors, *[layer.relative_error] * (longest - len(layer.errors))] for layer in layers]
    return [float(x) for x in np.mean(padded, axis=0)]


def _tune(work: _Work, model: torch.nn.Module) -> None:
    row = work.rows[-1]
    # Each model sees the same sequences in the same order, so that differences between rows are those of the methods.
    with work.stage(f"Fine-tuning {row.name}") as progress:
        fine_tune(
            model,
            work.split.training,
            learning_rate=work.settings.learning_rate,
            batch_size=work.settings.batch,
            progress=progress,
        )
    row.after = _measure(work, model, f"{row.name} after fine-tuning")


def _save_and_reload(work: _Work, name: str, model: torch.nn.Module) -> None:
    """Save and verify a checkpoint, load it into a fresh model, and compare the outputs bit for bit."""
    path = work.folder / f"{_file_name(name)}.safetensors"
    with work.stage(f"Saving and reloading {name}"):
        nn.save_model(path, model, {"model": name, "seed": work.settings.seed})
        lq.verify(path)
        fresh = copy.deepcopy(work.base)
        with torch.no_grad():  # a parameter that the file lacks would give other outputs
            for parameter in fresh.parameters():
                parameter.zero_()
        nn.load_model(path, fresh)
        with torch.inference_mode():
            sequence = work.split.evaluation[:1]
            same = torch.equal(fresh(sequence).logits, model(sequence).logits)
    if not same:
        raise CheckpointError(f"{path.name}: the outputs of {name} changed when it was saved and loaded.")


def _parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
