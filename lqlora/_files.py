"""Whole files: an old one is there until the new one is complete."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from lqlora.errors import CheckpointError

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file beside its final name, flush it, and rename it.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    data : bytes
        All of it.

    Raises
    ------
    CheckpointError
        If the file cannot be written. Nothing has changed then.
    """
    path = Path(path)
    beside = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a rename must not overtake the data
        beside.replace(path)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error}. Nothing was changed.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
