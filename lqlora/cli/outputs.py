"""Files that a command writes, decided on before any work is done."""

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
    """Refuse what could not be written in the end.

    Raises
    ------
    CheckpointError
        If a file exists and is not to be replaced, its folder does not exist, or two are one file.
    """
    seen = set()
    for path in paths:
        if path.absolute() in seen:
            raise CheckpointError(f"Two outputs are to be written to {path}.")
        seen.add(path.absolute())
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: name a file.")
        if path.exists() and not force:
            raise CheckpointError(f"{path} exists already: name another file, or replace it with --force.")
        if not path.parent.is_dir():
            raise CheckpointError(f"There is no folder {path.parent}.")


def write_outputs(files: Mapping[Path, bytes], *, dry_run: bool) -> None:
    """Write files, or say what would be written."""
    for path, data in files.items():
        if not dry_run:
            write_whole(path, data)
        console.say(f"{'Would write' if dry_run else 'Wrote'} {path} ({len(data):,} bytes).")
