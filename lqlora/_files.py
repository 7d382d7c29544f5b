"""Atomic writing of files and folders: a reader finds the old content or the new content, never a part of either."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lqlora._messages import fit, shown
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora.errors import LQLoRAError

__all__ = ["input_file", "lock", "remove_left_over", "replace_file", "replace_folder", "write_whole"]

#: Number of temporary folders to try: one is lost only if another writer comes within microseconds.
_ATTEMPTS = 8

#: Name of the file in a temporary folder that is locked while its process lives.
_LOCK = "lock"

#: Name in a temporary folder of the folder that is replaced.
_OLD = "old"


@contextmanager
def replace_file(path: str | os.PathLike[str], *failures: type[Exception]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to the final name when the body has written it.

    Use it for content that a library writes to a path. :func:`write_whole` is for content in memory. A link is followed:
    the file that it names is replaced. A file keeps its permissions, and a new one gets those that the umask leaves.
    What killed processes left behind at earlier writes of the same file is removed.

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
    expected: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        # A rename onto a link would replace the link, so the file that it names is written instead.
        target = Path(os.path.realpath(path))
        _check_target(target)
    except (OSError, ValueError) as error:  # ValueError: the path has a zero byte
        raise CheckpointError(f"{str(path)!r} cannot be written: {error}. Nothing was changed.") from error
    try:
        with _temporary_folder(target) as folder:
            beside = folder / "data"
            mode = _mode(target, beside)
            yield beside
            # A file system may commit a rename before the data it names. Without the flush, a loss of power after the
            # rename could leave the final name with an empty file. fsync flushes the file, whichever descriptor wrote
            # it. The mode is "rb+" and not "rb", because Windows flushes only descriptors that may write.
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            with suppress(OSError):  # some file systems have no permissions
                beside.chmod(mode)
            beside.replace(target)  # atomic in POSIX, because both names are on one file system
    except expected as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Nothing was changed.") from error


def input_file(path: str | os.PathLike[str], error: type[LQLoRAError], *, is_optional: bool = False) -> Path:
    """Return the path of a file that can be opened for reading without waiting.

    Parameters
    ----------
    path : path-like
        File to read.
    error : class
        Class of the errors.
    is_optional : bool, default False
        Accept a path at which there is nothing yet.

    Returns
    -------
    Path
        The path, which names a regular file or, if that is accepted, nothing.

    Raises
    ------
    LQLoRAError
        If the path is not one, or names nothing, a folder, a pipe or a device. Opening a pipe would wait for a writer.
    """
    try:
        own = Path(path)
        mode = own.stat().st_mode
    except FileNotFoundError:
        if is_optional:
            return own
        raise error(fit(f"{path} does not exist.")) from None
    except (OSError, TypeError, ValueError) as fault:  # ValueError: the path has a zero byte
        raise error(fit(f"{shown(path, 200)} cannot be opened: {fault}.")) from fault
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise error(fit(f"{path} must be a regular file, got {kind}."))
    return own


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


@contextmanager
def replace_folder(path: str | os.PathLike[str], check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a new folder beside a path, and rename it to the path when the body has filled it.

    A folder can only be renamed to a name that is free, so an old one steps aside first. If the process is killed between
    the two renames, the next call for the same path brings the old folder back. The caller decides whether an old folder
    may be replaced.

    Parameters
    ----------
    path : path-like
        Folder to make; an existing one is replaced at the end. Folders above it are made, and removed after an error.
    check : callable, optional
        Called without arguments before the old folder steps aside. What it raises leaves the old folder.

    Yields
    ------
    Path
        The new folder.

    Raises
    ------
    CheckpointError
        If the folder cannot be written. In this case the old one is unchanged.
    """
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # the path has a zero byte
        raise CheckpointError(f"{str(path)!r} cannot be written: {error}.") from error
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(target) as folder:
            beside = folder / "data"
            beside.mkdir()
            yield beside
            check()
            if target.exists():
                target.rename(folder / _OLD)
            beside.rename(target)
            with suppress(OSError):  # from here on it is not to come back
                (folder / _OLD).rename(folder / "replaced")
    except CheckpointError:  # a subclass of OSError whose message is complete
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    finally:
        for parent in made:  # innermost first; parents that hold the output are not empty and stay
            with suppress(OSError):
                parent.rmdir()


def remove_left_over(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left beside a path, and bring back a folder that had stepped aside.

    Parameters
    ----------
    path : path-like
        A file or folder that :func:`replace_file` or :func:`replace_folder` writes.
    """
    target, found = Path(os.path.realpath(path)), list[Path]()
    prefix = _prefix(target)
    with suppress(OSError):  # a folder that cannot be listed may be written all the same
        found = [folder for folder in target.parent.iterdir() if folder.name.startswith(prefix)]
    for folder in found:
        if folder.name.endswith(".partial") and not folder.is_symlink():
            with suppress(OSError):
                folder.rmdir()  # its process was killed before it could lock anything; one that has just begun tries again
            with suppress(OSError), (folder / _LOCK).open("rb+") as held:  # a living process has locked it
                lock(held)
                _discard(folder, target)


def _check_target(target: Path) -> None:
    """Raise if a rename would replace something that is not a file, such as a folder, or ``/dev/null``."""
    if target.exists() and not target.is_file():
        raise OSError("it exists and is not a regular file")


def _mode(target: Path, unused: Path) -> int:
    """Return the permissions of a file, or those that this process gives to a new one."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    # The umask can be read only by setting it, which other threads would notice. A new file shows it.
    unused.touch(exist_ok=False)
    mode = stat.S_IMODE(unused.stat().st_mode)
    unused.unlink()
    return mode


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside a file, and remove it at the end, with those that dead processes left.

    Libraries put temporary files of their own beside what they write. In a folder these are found, whatever their names.
    The process holds a lock on a file in the folder, which ends with it: a folder that is not locked is left over.
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


def _locked(path: Path) -> IO[bytes] | None:
    """Return a new file that is locked, or None if another writer took its folder for left over before that."""
    # That writer either holds the lock at this moment, or has removed the file that is locked here: then the name is
    # gone. Once the lock and the name belong together, nobody else removes the folder.
    with ExitStack() as stack, suppress(FileNotFoundError, BlockingIOError):
        file = stack.enter_context(path.open("xb"))
        try:
            lock(file)
        except BlockingIOError:
            raise
        except (
            OSError
        ):  # some network file systems have no locks: then no other writer can lock the folder to remove it
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
        if (folder / _OLD).exists() and not target.exists():
            (folder / _OLD).rename(target)
        # The lock goes last: without it, a folder that is not empty could not be told from one of a living process.
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _prefix(target: Path) -> str:
    """Return the begin of the names of temporary folders of one target."""
    # Names of files have at most 255 bytes. The hash of the whole name stands for the part that is cut.
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return f".{os.fsencode(target.name)[:200].decode(errors='ignore')}.{digest}."


def lock(file: IO[bytes]) -> None:
    """Lock an open file until it is closed.

    Parameters
    ----------
    file : binary file
        A file that may be written.

    Raises
    ------
    OSError
        If another process, or another open file of this one, has locked it.
    """
    # The system releases these locks when their process ends, however it ends. A lock file would outlive a crash.
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - exists on this system only

        file.seek(1 << 40)  # a byte far beyond the end: other processes cannot read bytes that are locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl  # noqa: PLC0415 - exists on other systems only

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
