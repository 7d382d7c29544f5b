"""Command ``lqlora calibrate``: statistics of the layers of a model, block after block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lqlora.cli import console
from lqlora.cli.compress import token_split
from lqlora.cli.parsing import parse_pattern

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora.cli.compress import TextOptions

__all__ = ["CalibrateOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Values of the options.

    Parameters
    ----------
    gradients : bool
        Whether gradients are collected, too.
    dtype : {"float32", "float16", "bfloat16"}
        Dtype of the computation.
    blocks : str, optional
        Name of the list of blocks.
    include, exclude : tuple of str
        Patterns of names of layers.
    """

    gradients: bool
    dtype: Literal["float32", "float16", "bfloat16"]
    blocks: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]


def run(source: Path, folder: Path, options: CalibrateOptions, text: TextOptions, *, as_json: bool) -> None:
    """Collect statistics, and print what they are.

    Raises
    ------
    LQLoRAError
        If an input is missing or invalid, or the folder cannot be written. Finished blocks are kept.
    """
    from lqlora.integrations.calibration import calibrate_checkpoint  # noqa: PLC0415 - needs torch

    include, exclude = ([parse_pattern(own) for own in texts] for texts in (options.include, options.exclude))
    sequences = token_split(source, text).calibration
    with console.stage("Calibrating") as show:
        found = calibrate_checkpoint(
            source, folder, list(sequences.split(1)), gradients=options.gradients, include=include or None, exclude=exclude,
            blocks=options.blocks, dtype=options.dtype, progress=show,
        )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    numbers = {"matrices": len(found.inputs), "tokens": sequences.numel(), "bytes": size}
    if as_json:
        console.say_json(numbers)
        return
    console.say(f"Statistics of {len(found.inputs)} matrices from {sequences.numel():,} tokens.")
    console.say(f"Wrote {folder} ({size:,} bytes).")
