"""Command ``lqlora decompose``: a model file into a checkpoint, matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lqlora as lq
from lqlora._messages import shortened
from lqlora.cli import console
from lqlora.cli.parsing import parse_bytes, parse_pattern
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.sources import open_model
from lqlora.integrations.statistics import norms_for, open_statistics

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora.integrations.streaming_report import CheckpointReport

__all__ = ["DecomposeOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class DecomposeOptions:
    """Values of the options, as they were typed.

    Parameters
    ----------
    format : str, optional
        Format of all matrices. Exactly one of it and ``plan`` is given.
    plan : Path, optional
        Plan that ``lqlora plan`` wrote.
    rank : int, optional
        Rank of all matrices, instead of the plan's ranks.
    statistics : Path, optional
        Folder of statistics, which weight the errors.
    fit, quantizer, factor_dtype : str
        See :func:`lqlora.decompose_checkpoint`.
    iterations, seed : int
        See :func:`lqlora.decompose`.
    shard_size : str
        Largest size of a file, such as ``"512MiB"``.
    include, exclude : tuple of str
        Patterns of names.
    strict, dry_run : bool
        See :func:`lqlora.decompose_checkpoint`.
    """

    format: str | None
    plan: Path | None
    rank: int | None
    statistics: Path | None
    fit: Literal["absmax", "scale", "levels+scale"]
    quantizer: Literal["nearest", "gptq"]
    factor_dtype: Literal["float32", "float16", "bfloat16"]
    iterations: int
    seed: int
    shard_size: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    strict: bool
    dry_run: bool


def run(source: Path, folder: Path, options: DecomposeOptions, *, as_json: bool) -> None:
    """Decompose a model and print the numbers of the checkpoint.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, or the folder cannot be written. Finished matrices are kept.
    """
    if (options.format is None) == (options.plan is None):
        found = "neither" if options.format is None else "both"
        raise InvalidArgumentError(f"format must be given, or --plan instead of it, got {found}.")
    formats = lq.BlockFormat.parse(options.format) if options.format is not None else _read_plan(options.plan)
    if options.rank is None and options.plan is None:
        raise InvalidArgumentError("rank must be given with --format.")
    patterns: dict[str, Any] = {"include": [parse_pattern(own) for own in options.include] or "*"}
    if options.exclude:
        patterns["exclude"] = [parse_pattern(own) for own in options.exclude]
    if options.statistics is not None:
        patterns["weighting"] = norms_for(open_statistics(options.statistics), open_model(source).weights)
    with console.stage("Decomposing") as show:
        report = lq.decompose_checkpoint(
            source, folder, formats, rank=options.rank, fit=options.fit, quantizer=options.quantizer, factor_dtype=options.factor_dtype,
            max_iter=options.iterations, seed=options.seed, shard_bytes=parse_bytes(options.shard_size, "--shard-size"),
            strict=options.strict, dry_run=options.dry_run, progress=show, **patterns,
        )  # fmt: skip
    if as_json:
        console.say_json(_as_json(report))
        return
    for line in str(report).splitlines():
        console.say(line)
    console.say(f"{'Would write' if options.dry_run else 'Wrote'} {folder} ({sum(report.files.values()):,} bytes).")


def _read_plan(path: Path | None) -> lq.Plan:
    assert path is not None
    try:
        return lq.Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # invalid plans and invalid UTF-8 are ValueErrors
        raise CheckpointError(shortened(f"{path} is not a readable plan: {error}")) from error


def _as_json(report: CheckpointReport) -> dict[str, Any]:
    return {
        "matrices": {
            name: {
                "format": str(own.format), "shape": list(own.shape), "rank": own.rank, "bytes": own.nbytes,
                "factor_bytes": own.factor_bytes, "relative_error": own.relative_error,
            }
            for name, own in report.matrices.items()
        },
        "copied": report.copied,
        "left_out": {name: {"reason": own.reason, "bytes": own.nbytes} for name, own in report.left_out.items()},
        "files": report.files,
        "bits_per_weight": report.bits_per_weight,
        "total_bytes": report.total_bytes,
        "source_bytes": report.source_bytes,
        "estimated_seconds": report.seconds,
        "estimated_memory_bytes": report.memory_bytes,
    }  # fmt: skip
