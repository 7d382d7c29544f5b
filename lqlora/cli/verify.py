"""Command ``lqlora verify``: check a checkpoint, also against the model that it was made from."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from lqlora import checkpoint
from lqlora._printable import printable
from lqlora.cli import console
from lqlora.integrations.comparison import compare_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["run"]


def run(path: Path, source: Path | None, *, as_json: bool) -> None:
    """Check a checkpoint, and print what was found.

    Raises
    ------
    LQLoRAError
        If a file is missing, damaged or was changed, or the checkpoint was not made from the source.
    """
    content = checkpoint.verify(path)
    count, others = len(content.matrices), len(content.tensors)
    del content
    errors = None
    if source is not None:
        with console.stage("Comparing") as show:
            errors = compare_checkpoint(path, source, progress=show)
    if as_json:
        console.say_json({"matrices": count, "tensors": others, "relative_errors": errors})
        return
    console.say(f"{path}: {count} quantized matrices, {others} other tensors, no fault found.")
    if errors:
        worst = max(errors, key=errors.__getitem__)
        console.say(
            f"Relative error: median {statistics.median(errors.values()):.4f}, largest {errors[worst]:.4f} ({printable(worst)})."
        )
