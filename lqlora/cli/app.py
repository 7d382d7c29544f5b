"""Commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lqlora import checkpoint
from lqlora.cli import console, demo
from lqlora.cli.settings import Settings

__all__ = ["app"]

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
    make = Settings.fast if fast else Settings
    settings = make(rank=rank, seed=seed, budgets=(None, bits))
    demo.run(settings, output, model_file=model, text_file=text, force=force)


@app.command("verify")
def verify_command(path: Annotated[Path, typer.Argument(help="Checkpoint file.")]) -> None:
    """Check every length, code and byte of a checkpoint."""
    content = checkpoint.verify(path)
    count = len(content.matrices)
    console.say(f"{path}: {count} quantized matrices, {len(content.tensors)} other tensors, all as written.")
