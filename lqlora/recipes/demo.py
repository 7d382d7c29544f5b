"""The main job end to end: Fisher information, cost table, plans, decompositions, fine-tuning, checkpoints."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import lqlora as lq
from lqlora import nn
from lqlora.cli import console
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.gguf import load_llama, packaged_smollm2
from lqlora.recipes.settings import NF3, NF4, Settings
from lqlora.recipes.summary import Row, draw, markdown
from lqlora.recipes.text import Parts, read_text, split_tokens
from lqlora.recipes.training import fine_tune, perplexity
from lqlora.weighting import Elementwise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lqlora.allocation import Plan

__all__ = ["run"]


@dataclass
class _Work:
    """What the stages share."""

    settings: Settings
    base: torch.nn.Module
    parts: Parts
    folder: Path
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)


def run(settings: Settings, output: Path, *, model_file: Path | None, text_file: Path | None, force: bool) -> None:
    """Run the demo and leave plans, checkpoints, table and picture in a folder.

    Parameters
    ----------
    settings : Settings
        How much to do.
    output : Path
        Folder to make. It appears, complete, when everything has succeeded.
    model_file, text_file : Path, optional
        GGUF model and text; the packaged ones if not given.
    force : bool
        Replace an existing folder.

    Raises
    ------
    LQLoRAError
        One sentence on what is missing or wrong. Nothing is left behind.
    """
    if settings.rank < 1:
        raise InvalidArgumentError(f"The demo fine-tunes low-rank factors: --rank is at least 1, not {settings.rank}.")
    text = read_text(text_file)
    model_file = model_file or packaged_smollm2()
    with _folder(output, force=force) as folder:
        with console.stage("Reading the model"):
            base, tokenizer = load_llama(model_file)
        work = _Work(settings, base, split_tokens(tokenizer, text, settings), folder)
        _check_budgets(work)
        work.rows.append(Row("fp32", 32.0, _parameter_bytes(base) / 1e6, 0.0, _measure(work, base, "fp32")))
        fisher = _fisher(work)
        plans = _plans(work, fisher)
        _compare(work, plans, fisher)
        table = markdown(work.rows)
        (folder / "table.md").write_text(table, encoding="utf-8")
        draw(folder / "picture.png", plans, work.curves)
    console.show_table(table)
    console.say(f"Plans, checkpoints, table and picture are in {output}.")


@contextmanager
def _folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder beside the output that takes its place at the end, or is removed on any error."""
    output = output.absolute()
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists already: name another folder, or replace it with --force.")
    if output.exists() and not _is_ours(output):
        raise CheckpointError(f"{output} holds other things than a demo's: --force does not replace it.")
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise CheckpointError(f"Cannot write to {output.parent}: {error}.") from error
    try:
        yield staging
        staging.chmod(0o755)
        aside = Path(f"{staging}.old")
        if output.exists():
            output.rename(aside)
        staging.rename(output)
        shutil.rmtree(aside, ignore_errors=True)
    except CheckpointError:  # says it already, and is an OSError too
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot write {output}: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:  # innermost first; those that hold the output stay
            with suppress(OSError):
                parent.rmdir()


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what a demo writes."""
    names = ("table.md", "picture.png", ".plan.json", ".safetensors")
    return folder.is_dir() and all(entry.is_file() and entry.name.endswith(names) for entry in folder.iterdir())


def _measure(work: _Work, model: torch.nn.Module, name: str) -> float:
    with console.stage(f"Perplexity of {name}") as progress:
        return perplexity(model, work.parts.evaluation, progress)


def _fisher(work: _Work) -> dict[str, Elementwise]:
    sequences = work.parts.calibration
    with console.stage("Fisher information") as progress:
        found = nn.collect_fisher(
            work.base, sequences.split(1), progress=lambda examples: progress(examples, len(sequences))
        )
    # The surrogate of the paper: to minimize what so few sequences say of each weight makes no better model.
    return {name: Elementwise(values.numpy(), sweeps=0) for name, values in found.items()}


def _plans(work: _Work, fisher: Mapping[str, Elementwise]) -> dict[str, Plan]:
    """Build the cost table, and solve it for each budget."""
    settings = work.settings
    weights = nn.weight_arrays(nn.select_linears(work.base))
    with console.stage(f"Cost table of {len(weights)} matrices x {len(settings.formats)} formats") as progress:
        table = lq.cost_table(
            weights,
            settings.formats,
            rank=settings.rank,
            weighting=fisher,
            seed=settings.seed,
            progress=lambda done, total, _: progress(done, total),  # the bar has an estimate of its own
        )
    plans = _solve(table, settings)
    for name, plan in plans.items():
        (work.folder / f"{_file_name(name)}.plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    return plans


def _solve(table: lq.CostTable, settings: Settings) -> dict[str, Plan]:
    uniform = Fraction(sum(NF3.storage_bits(shape) for shape in table.shapes), table.weight_count)
    plans: dict[str, Plan] = {}
    for budget in settings.budgets:
        name = f"LQ-LoRA {float(uniform) if budget is None else budget:.4g}"
        if name in plans:
            raise InvalidArgumentError(f"--bits {budget:g} is the storage of uniform NF3, which is planned for anyway.")
        plans[name] = lq.allocate(table, bits_per_weight=uniform if budget is None else budget)
    return plans


def _check_budgets(work: _Work) -> None:
    """Solve with costs of zero: a budget that cannot be met is found before any work is done."""
    formats = work.settings.formats
    shapes = {name: tuple(layer.weight.shape) for name, layer in nn.select_linears(work.base).items()}
    sizes = np.array([[fmt.storage_bits(shape) for fmt in formats] for shape in shapes.values()], dtype=np.int64)
    configurations = tuple(lq.Configuration(fmt, work.settings.rank) for fmt in formats)
    nothing = np.zeros(sizes.shape)
    table = lq.CostTable(
        tuple(shapes), tuple(shapes.values()), configurations, nothing, sizes, nothing.astype(np.int64)
    )
    _solve(table, work.settings)


def _file_name(name: str) -> str:
    return name.lower().replace(" ", "-")


def _compare(work: _Work, plans: Mapping[str, Plan], fisher: Mapping[str, Elementwise]) -> None:
    """Make, measure, fine-tune, save and reload each quantized model."""
    iterations = work.settings.iterations
    _variant(work, "QLoRA NF4", NF4, {"init": "zero"})
    _tune(work, _variant(work, "QLoRA NF3", NF3, {"init": "zero"}))
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
    with console.stage(f"Decomposing for {name}") as progress:
        report = nn.quantize_model(
            model, formats, rank=work.settings.rank, seed=work.settings.seed, progress=progress, **options
        )
    seconds = time.perf_counter() - start
    error = _relative_error(work.base, report)
    before = _measure(work, model, name)
    work.rows.append(Row(name, report.bits_per_weight, report.total_bytes / 1e6, error, before, seconds=seconds))
    if options.get("init") != "zero":
        work.curves[name] = _mean_curve(report)
    return model


def _clone(model: torch.nn.Module) -> torch.nn.Module:
    """Copy the modules and share the tensors: what is not replaced stays one copy in memory."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo=dict(shared))


def _relative_error(base: torch.nn.Module, report: nn.QuantizationReport) -> float:
    """Frobenius error over all matrices together, whatever norm each was decomposed in."""
    squares = np.zeros(2)
    for name, load in nn.weight_arrays(nn.select_linears(base)).items():
        weight = load()
        residual = weight - report.decompositions[name].reconstruct()
        squares += lq.ops.sum_of_squares(residual), lq.ops.sum_of_squares(weight)
    return float(np.sqrt(squares[0] / squares[1]))


def _mean_curve(report: nn.QuantizationReport) -> list[float]:
    """Average the trajectories; one that stopped early stays at its best error."""
    longest = max(len(d.errors) for d in report.decompositions.values())
    padded = [[*d.errors, *[d.relative_error] * (longest - len(d.errors))] for d in report.decompositions.values()]
    return [float(x) for x in np.mean(padded, axis=0)]


def _tune(work: _Work, model: torch.nn.Module) -> None:
    row = work.rows[-1]
    with console.stage(f"Fine-tuning {row.name}") as progress:
        fine_tune(model, work.parts.training, work.settings, progress)
    row.after = _measure(work, model, f"{row.name} after fine-tuning")


def _save_and_reload(work: _Work, name: str, model: torch.nn.Module) -> None:
    """Save, verify, reload into a fresh model, and compare its outputs bit for bit."""
    path = work.folder / f"{_file_name(name)}.safetensors"
    with console.stage(f"Saving and reloading {name}"):
        nn.save_model(path, model, {"model": name, "seed": work.settings.seed})
        lq.verify(path)
        fresh = copy.deepcopy(work.base)
        with torch.no_grad():  # so that what the file lacks cannot come from the copy
            for parameter in fresh.parameters():
                parameter.zero_()
        nn.load_model(path, fresh)
        with torch.inference_mode():
            sequence = work.parts.evaluation[:1]
            same = torch.equal(fresh(sequence).logits, model(sequence).logits)
    if not same:
        raise CheckpointError(f"{name} gives other outputs after it was saved and reloaded.")


def _parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
