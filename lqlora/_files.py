"""Atomic writing of files: a reader finds the old content or the new content, never a part of either."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["replace_file", "write_whole"]


@contextmanager
def replace_file(path: str | os.PathLike[str], *failures: type[Exception]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to the final name when the body has written it.

    Use it for content that a library writes to a path. :func:`write_whole` is for content in memory.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    *failures : exception classes
        What the body may raise, besides :class:`OSError`, if it cannot write.

    Yields
    ------
    Path
        The temporary file. The body creates it and closes it.

    Raises
    ------
    CheckpointError
        If the file cannot be written. In this case the old file is unchanged, and the temporary one is removed.
    """
    path = Path(path)
    # The random part keeps two writers of one path apart: each renames a whole file, and the later one wins. A dot in
    # front hides what a killed process leaves behind, since `finally` does not run then.
    expected: tuple[type[Exception], ...] = (OSError, *failures)
    beside = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
        yield beside
        # A file system may commit a rename before the data it names. Without the flush, a loss of power after the
        # rename could leave the final name with an empty file. fsync flushes the file, whichever descriptor wrote it.
        # The mode is "rb+" and not "rb", because Windows flushes only descriptors that may write.
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)  # atomic in POSIX, because both names are in one folder and so on one file system
    except expected as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Nothing was changed.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    data : bytes
        The whole content.

    Raises
    ------
    CheckpointError
        If the file cannot be written. In this case nothing has changed.
    """
    with replace_file(path) as beside:
        beside.write_bytes(data)
