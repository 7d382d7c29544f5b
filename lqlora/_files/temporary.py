"""Temporary folders beside files that are written: made, locked, and removed if their process was killed."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lqlora._files.locks import lock, open_unshared

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

__all__ = [
    "OLD",
    "cut_name",
    "is_being_written",
    "left_over",
    "remove_left_over",
    "renaming",
    "settle",
    "temporary_folder",
]

#: Number of temporary folders to try: one is lost only if another writer comes within microseconds.
_ATTEMPTS = 8

#: Name of the file in a temporary folder that is locked while its process lives.
_LOCK = "lock"

#: Name in a temporary folder of the folder that is replaced.
OLD = "old"

#: Seconds to wait for another process that renames a folder to the same name, which takes milliseconds.
_PATIENCE = 10.0


def is_being_written(path: str | os.PathLike[str]) -> bool:
    """Return whether a process replaces a file or folder at this moment.

    Parameters
    ----------
    path : path-like
        A file or folder that :func:`replace_file` or :func:`replace_folder` writes.

    Returns
    -------
    bool
        False on file systems without locks.
    """
    for folder in _temporary_folders(Path(os.path.realpath(path))):
        with suppress(OSError), open_unshared(folder / _LOCK, "rb+") as held:
            try:
                lock(held)
            except BlockingIOError:
                return True
    return False


def remove_left_over(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left beside a path, and bring back a folder that had stepped aside.

    Parameters
    ----------
    path : path-like
        A file or folder that :func:`replace_file` or :func:`replace_folder` writes.
    """
    target = Path(os.path.realpath(path))
    for folder in left_over(target):
        _discard(folder, target)
    with suppress(OSError):
        if _lock_of_renames(target).exists():  # its process was killed, or another one renames at this moment
            with renaming(target):
                pass


def _temporary_folders(target: Path) -> list[Path]:
    """Return the temporary folders of a target, of living processes and of dead ones."""
    found = list[Path]()
    prefix = _prefix(target)
    with suppress(OSError):  # a folder that cannot be listed may be written all the same
        found = [folder for folder in target.parent.iterdir() if folder.name.startswith(prefix)]
    return [folder for folder in found if folder.name.endswith(".partial") and not folder.is_symlink()]


def left_over(target: Path) -> Iterator[Path]:
    """Yield the temporary folders of a target whose processes are dead, each locked meanwhile."""
    for folder in _temporary_folders(target):
        with suppress(OSError):
            folder.rmdir()  # its process was killed before it could lock anything; one that has just begun tries again
        with ExitStack() as stack:
            try:
                held = stack.enter_context(open_unshared(folder / _LOCK, "rb+"))
                lock(held)
            except OSError:  # a living process has locked it
                continue
            yield folder


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside a file, and remove it at the end, with those that dead processes left.

    Libraries put temporary files of their own beside what they write. In a folder these are found, whatever their names.
    The process holds a lock on a file in the folder, which ends with it: a folder that is not locked is left over. A
    process that is forked inside the block neither holds the lock nor removes the folder.
    """
    remove_left_over(target)
    # The random part keeps two writers of one path apart: each renames a whole file, and the later one wins. A dot in
    # front hides what a killed process leaves behind, since `finally` does not run then.
    for _ in range(_ATTEMPTS):
        folder, process = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}.partial", os.getpid()
        folder.mkdir(mode=0o700)
        try:
            held = _locked(folder / _LOCK)
            if held is not None:
                with held:
                    yield folder
                return
        finally:
            if os.getpid() == process:  # not in a child that was forked inside the block
                _discard(folder, target)
    raise OSError(f"a temporary folder in {target.parent} could not be locked")


def _locked(path: Path, mode: str = "xb") -> io.FileIO | None:
    """Return a new file that is locked, or None if another process has locked or removed it before that."""
    # That writer either holds the lock at this moment, or has removed the file that is locked here: then the name is
    # gone. Once the lock and the name belong together, nobody else removes the folder.
    with ExitStack() as stack, suppress(FileNotFoundError, BlockingIOError):
        file = stack.enter_context(open_unshared(path, mode))
        try:
            lock(file)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks: then no other writer can lock it to remove it
            pass
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            stack.pop_all()
            return file
    return None


def _discard(folder: Path, target: Path) -> None:
    """Remove a temporary folder; first bring back what stepped aside in it, if nothing took its place."""
    # This also runs after an error or Ctrl-C between the two renames of `replace_folder`. If the old folder cannot be
    # brought back, the temporary one stays with it.
    with suppress(OSError):
        if (folder / OLD).exists():
            with renaming(target):
                settle(folder, target)
        # The lock goes last: without it, a folder that is not empty could not be told from one of a living process.
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def settle(folder: Path, target: Path) -> None:
    """Decide on what stepped aside in a temporary folder: it comes back, or is renamed if something took its place."""
    # A folder of another name is never brought back. So one that was deleted in part, by a process that was killed
    # meanwhile, does not return as a whole one.
    old = folder / OLD
    if old.exists():
        old.rename(folder / "replaced" if target.exists() else target)


def _lock_of_renames(target: Path) -> Path:
    """Return the file that is locked while a folder is renamed to a name."""
    return target.parent / f"{_prefix(target)}lock"


@contextmanager
def renaming(target: Path) -> Iterator[None]:
    """Exclude other processes that rename a folder to one name, so that they find the old folder or the new one."""
    # Without permission for the lock, on a full disk, or if another process has stopped while it holds the lock, the
    # work goes on without it: two writers at the same moment are rarer than that, and the work would be lost.
    path, held, until = _lock_of_renames(target), None, time.monotonic() + _PATIENCE
    with suppress(OSError):
        while (held := _locked(path, "ab")) is None and time.monotonic() < until:
            time.sleep(0.005)
    try:
        yield
    finally:
        if held is not None:
            if sys.platform == "win32":  # an open file cannot be removed there
                held.close()
            with suppress(OSError):
                path.unlink()
            held.close()


def _prefix(target: Path) -> str:
    """Return the begin of the names of temporary folders of one target."""
    # The hash of the whole name stands for the part that is cut.
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return f".{cut_name(target, 200)}.{digest}."


def cut_name(target: Path, length: int) -> str:
    """Return the begin of the name of a target, so that a longer name has at most the 255 bytes of names of files."""
    return os.fsencode(target.name)[:length].decode(errors="ignore")
