"""Command ``lqlora merge``: the dense model of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora.cli import console
from lqlora.cli.parsing import parse_bytes
from lqlora.integrations.merging import merge_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from lqlora._typing import FloatName

__all__ = ["run"]


def run(checkpoint: Path, folder: Path, like: Path | None, dtype: FloatName, shard_size: str, *, as_json: bool) -> None:
    """Merge both parts of each matrix, and write the model.

    Raises
    ------
    LQLoRAError
        If the checkpoint cannot be read, or the folder cannot be written. In this case it is not made.
    """
    with console.stage("Merging") as show:
        sizes = merge_checkpoint(
            checkpoint,
            folder,
            like=like,
            dtype=dtype,
            shard_bytes=parse_bytes(shard_size, "--shard-size"),
            progress=show,
        )
    if as_json:
        console.say_json({"files": sizes})
        return
    console.say(f"Wrote {folder} ({sum(sizes.values()):,} bytes in {len(sizes)} file{'' if len(sizes) == 1 else 's'}).")
