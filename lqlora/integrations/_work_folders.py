"""Folders that long work is kept in: one process at a time, and only with the settings that it was begun with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lqlora._files import lock, open_unshared
from lqlora._messages import shortened, shown
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    import io
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["compare_settings", "hold"]


def hold(path: Path, folder: Path) -> io.FileIO:
    """Return an open file whose lock says that a process works in a folder. Closing it ends the lock.

    Parameters
    ----------
    path : Path
        The file, which is made if it does not exist.
    folder : Path
        The folder, for the error.

    Returns
    -------
    io.FileIO
        The file.

    Raises
    ------
    CheckpointError
        If another process holds the lock.
    """
    held = open_unshared(path, "ab")
    try:
        lock(held)
    except BlockingIOError as error:
        held.close()
        raise CheckpointError(
            shortened(f"{folder} is in use by another process. Wait for it, or name another folder.")
        ) from error
    except OSError:  # some network file systems have no locks
        pass
    return held


def compare_settings(
    folder: Path, found: Mapping[str, Any], own: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Raise if work in a folder was begun with other settings.

    Parameters
    ----------
    folder : Path
        The folder, for the error.
    found, own : mapping of str to object
        Settings in the folder, and those of this call.
    digests : mapping of str to str
        What another value of a setting is that is kept as a digest, such as ``"a model of other tensors"``.

    Raises
    ------
    CheckpointError
        If a setting differs.
    """
    for name in [*own, *found]:
        if (name in own) != (name in found) or own[name] != found[name]:
            what = digests.get(name, f"another {name}: {shown(found.get(name))} and not {shown(own.get(name))}")
            raise CheckpointError(shortened(f"{folder} was begun with {what}. Name another folder."))
