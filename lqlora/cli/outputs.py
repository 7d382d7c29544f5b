"""Output files of a command: checked before any work is done, written when all of it has succeeded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._files import write_whole
from lqlora.cli import console
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["check_outputs", "write_outputs"]


def check_outputs(paths: Iterable[Path], *, force: bool) -> None:
    """Check that each output file can be written at the end.

    Raises
    ------
    CheckpointError
        If a file exists and ``force`` is false, its folder does not exist, it is a folder, or two outputs are one file.
    """
    seen = set()
    for path in paths:
        if path.absolute() in seen:
            raise CheckpointError(f"{path} is named for two outputs. Name a different file for each output.")
        seen.add(path.absolute())
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder. Name a file.")
        if path.exists() and not force:
            raise CheckpointError(f"{path} exists. Name another file, or replace it with --force.")
        if not path.parent.is_dir():
            raise CheckpointError(f"{path.parent} is not a folder. Make it first, or name another file.")


def write_outputs(files: Mapping[Path, bytes], *, dry_run: bool) -> None:
    """Write files and print their sizes; with ``dry_run`` only print what would be written."""
    for path, data in files.items():
        if not dry_run:
            write_whole(path, data)
        console.say(f"{'Would write' if dry_run else 'Wrote'} {path} ({len(data):,} bytes).")
