"""Locks on files that end with the process, and are not kept by processes that it forked."""

from __future__ import annotations

import io
import os
import sys
import threading
import weakref

__all__ = ["lock", "open_unshared"]

#: Files of :func:`open_unshared` that are open in this process.
_OPEN: weakref.WeakSet[io.FileIO] = weakref.WeakSet()

#: Held while a file is opened and noted, and while the process forks: no copy of a file is missed.
_opening = threading.RLock()


def open_unshared(path: str | os.PathLike[str], mode: str) -> io.FileIO:
    """Open a file without a buffer, and close the copies of it that forked processes inherit.

    A lock on the file then ends with this process: otherwise it would end when the last copy is closed.

    Parameters
    ----------
    path : path-like
        The file.
    mode : str
        Mode of a binary file, as :func:`open` has it.

    Returns
    -------
    io.FileIO
        The file.
    """
    with _opening:
        file = io.FileIO(path, mode)
        _OPEN.add(file)
    return file


def _close_in_child() -> None:
    _opening.release()
    for file in list(_OPEN):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_close_in_child)


def lock(file: io.FileIO) -> None:
    """Lock an open file until it is closed.

    Parameters
    ----------
    file : io.FileIO
        A file of :func:`open_unshared` that may be written.

    Raises
    ------
    BlockingIOError
        If another process, or another open file of this one, has locked it.
    OSError
        If the file system has no locks.
    """
    # The system releases these locks when their process ends, however it ends. A lock file would outlive a crash.
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - exists on this system only

        file.seek(1 << 40)  # a byte far beyond the end: other processes cannot read bytes that are locked
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl  # noqa: PLC0415 - exists on other systems only

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
