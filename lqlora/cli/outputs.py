"""Output files of a command: checked before any work is done, written when all of it has succeeded, and then listed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lqlora._files import check_writable, write_whole
from lqlora._messages import shortened
from lqlora.cli import console
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["check_outputs", "list_outputs", "write_outputs"]


def check_outputs(paths: Iterable[Path], *, force: bool, others: Iterable[Path] = ()) -> None:
    """Check that each output file can be written at the end, and is none of the other files of the command.

    Parameters
    ----------
    paths : iterable of path
        Output files.
    force : bool
        Whether output files may exist, and are replaced.
    others : iterable of path
        Files and folders that are read, and files that are continued, such as a store.

    Raises
    ------
    CheckpointError
        If a file exists and ``force`` is false, its folder does not exist, it is a folder, two outputs are one file, or
        an output is another file of the command or replaces one in a folder that is read, or the system refuses to
        write it.
    """
    used = {_identity(path) for path in others}
    used |= {_identity(file) for folder in others for file in _files_in(folder)}
    seen = set[object]()
    for path in paths:
        own = _identity(path)
        if own in seen:
            raise CheckpointError(f"{path} is named for two outputs. Name a different file for each output.")
        seen.add(own)
        try:
            _check_output(path, used, force=force)
        except CheckpointError:  # a subclass of OSError whose message is complete
            raise
        except (
            OSError,
            ValueError,
        ) as error:  # such as a name that is too long, a folder without permission, a zero byte
            raise CheckpointError(shortened(f"{path} cannot be written: {error}. Name another file.")) from error


def _check_output(path: Path, used: set[object], *, force: bool) -> None:
    # A file in a folder that is read may be a link out of it, and another link may lead into it.
    folders = {*path.absolute().parents, *Path(os.path.realpath(path)).parents}
    if _identity(path) in used or (path.exists() and not used.isdisjoint(map(_identity, folders))):
        raise CheckpointError(f"{path} is read or continued by this command. Name another file for the output.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. Name a file.")
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists. Name another file, or replace it with --force.")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a folder. Make it first, or name another file.")
    check_writable(path)


def _files_in(folder: Path) -> list[Path]:
    """Return the files in a folder; none if it is not a folder, or cannot be read, which its reader will say."""
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):
        return []


def _identity(path: Path) -> object:
    """Return a value that is equal for two names of one file: links and other spellings of a path count as one."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # the path has a zero byte, which its reader or writer will say
        return path
    return found.st_dev, found.st_ino


def write_outputs(files: Mapping[Path, bytes]) -> None:
    """Write files. Nothing is printed before all of them are complete, because standard output may fail."""
    for path, data in files.items():
        write_whole(path, data)


def list_outputs(files: Mapping[Path, bytes], *, dry_run: bool = False) -> None:
    """Print the names and sizes of files that were written, or with ``dry_run`` of those that would be."""
    for path, data in files.items():
        console.say(f"{'Would write' if dry_run else 'Wrote'} {path} ({len(data):,} bytes).")
