"""Atomic writing of files and folders: a reader finds the old content or the new content, never a part of either."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import secrets
import shutil
import stat
import sys
import threading
import time
import weakref
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lqlora._messages import shortened
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora.errors import LQLoRAError

__all__ = [
    "check_writable",
    "input_file",
    "is_being_written",
    "lock",
    "open_unshared",
    "remove_left_over",
    "replace_file",
    "replace_folder",
    "write_whole",
]

#: Number of temporary folders to try: one is lost only if another writer comes within microseconds.
_ATTEMPTS = 8

#: Name of the file in a temporary folder that is locked while its process lives.
_LOCK = "lock"

#: Name in a temporary folder of the folder that is replaced.
_OLD = "old"

#: Seconds to wait for another process that renames a folder to the same name, which takes milliseconds.
_PATIENCE = 10.0


@contextmanager
def replace_file(
    path: str | os.PathLike[str], *failures: type[Exception], may_exist: bool = True, mode: int | None = None
) -> Iterator[Path]:
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
    may_exist : bool, default True
        Replace an existing file. Otherwise a file of this name is an error, also one that appears before the end.
    mode : int, optional
        Permissions of the file, instead of those of the old file or those that the umask leaves.

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
        raise CheckpointError(
            shortened(f"{str(path)!r} cannot be written: {_reason(error)}. Nothing was changed.")
        ) from error
    try:
        with _temporary_folder(target) as folder:
            beside = folder / "data"
            final_mode = _mode(target, beside) if mode is None else mode
            yield beside
            # A file system may commit a rename before the data it names. Without the flush, a loss of power after the
            # rename could leave the final name with an empty file. fsync flushes the file, whichever descriptor wrote
            # it. The mode is "rb+" and not "rb", because Windows flushes only descriptors that may write.
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            with suppress(OSError):  # some file systems have no permissions
                beside.chmod(final_mode)
            if may_exist:
                beside.replace(target)  # atomic in POSIX, because both names are on one file system
            else:
                _rename_to_free(beside, target)
    except expected as error:
        raise CheckpointError(shortened(f"{path} cannot be written: {_reason(error)}. Nothing was changed.")) from error


def _rename_to_free(beside: Path, target: Path) -> None:
    """Give a file a name that no file has; a rename would replace one."""
    try:
        os.link(beside, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file takes the name first
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        beside.replace(target)


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
        raise error(shortened(f"{path} does not exist.")) from None
    except (OSError, TypeError, ValueError) as fault:  # ValueError: the path has a zero byte
        raise error(shortened(f"{repr(path)[:200]} cannot be opened: {fault}.")) from fault
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise error(shortened(f"{path} must be a regular file, got {kind}."))
    return own


def write_whole(path: str | os.PathLike[str], data: bytes, *, mode: int | None = None) -> None:
    """Write a file atomically.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    data : bytes
        The whole content.
    mode : int, optional
        Permissions of the file, as :func:`replace_file` has it.

    Raises
    ------
    CheckpointError
        If the file cannot be written. In this case nothing has changed.
    """
    with replace_file(path, mode=mode) as beside:
        beside.write_bytes(data)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written, by the same steps as :func:`replace_file` except the write itself.

    Use it before long work whose result the file is to hold. A hidden folder beside the file is made and removed.

    Parameters
    ----------
    path : path-like
        File to write. It is not changed, and not made.

    Raises
    ------
    CheckpointError
        If the file could not be written.
    """
    try:
        target = Path(os.path.realpath(path))
        _check_target(target)
        with _temporary_folder(target) as folder:
            _mode(target, folder / "data")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            shortened(f"{str(path)!r} cannot be written: {_reason(error)}. Nothing was changed.")
        ) from error


@contextmanager
def replace_folder(path: str | os.PathLike[str], check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a new folder beside a path, and rename it to the path when the body has filled it.

    A folder can only be renamed to a name that is free, so an old one steps aside first. If the process is killed between
    the two renames, the next call for the same path brings the old folder back. Of several processes that replace one
    folder, the last one wins. The caller decides whether an old folder may be replaced.

    Parameters
    ----------
    path : path-like
        Folder to make; an existing one is replaced at the end. Folders above it are made, and removed after an error.
    check : callable, optional
        Called without arguments at the begin, when a folder that had stepped aside is back, and before the old folder
        steps aside. What it raises leaves the old folder. If it raises a :class:`CheckpointError` at the end, the new
        folder stays beside the old one under a free name, which the error says.

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
        raise CheckpointError(shortened(f"{str(path)!r} cannot be written: {error}.")) from error
    made: list[Path] = []
    beside = target
    try:
        made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_target(target, Path.is_dir, "a folder")
        with _temporary_folder(target) as folder:
            check()
            beside = folder / "data"
            beside.mkdir()
            yield beside
            with _renaming(target):
                # What other processes left since the start is settled first: only the last folder may come back.
                for dead in _left_over(target):
                    with suppress(OSError):
                        _settle(dead, target)
                try:
                    check()
                except CheckpointError as error:
                    kept = _keep_beside(beside, target)
                    raise CheckpointError(shortened(f"{error} The new content is in {kept}.")) from error
                if target.exists():
                    target.rename(folder / _OLD)
                beside.rename(target)
                with suppress(OSError):  # from here on the old one is not to come back
                    _settle(folder, target)
    except OSError as error:
        said = _reason(error).replace(str(beside), str(path))  # names that a reader can find
        if not isinstance(error, CheckpointError):
            raise CheckpointError(shortened(f"{path} cannot be written: {said}.")) from error
        if said != str(error):
            raise CheckpointError(shortened(said)) from error
        raise
    finally:
        for parent in made:  # innermost first; parents that hold the output are not empty and stay
            with suppress(OSError):
                parent.rmdir()


def _keep_beside(folder: Path, target: Path) -> Path:
    """Rename a folder to a free name beside a target, which is its name and a number, and return the path."""
    begin = _cut_name(target, 240)
    for number in itertools.count(2):
        free = target.with_name(f"{begin}-{number}")
        if not os.path.lexists(free):
            try:
                return folder.rename(free)
            except OSError:
                if not os.path.lexists(free):  # otherwise another process took the name at this moment
                    raise
    raise AssertionError


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
    for folder in _left_over(target):
        _discard(folder, target)
    with suppress(OSError):
        if _lock_of_renames(target).exists():  # its process was killed, or another one renames at this moment
            with _renaming(target):
                pass


def _temporary_folders(target: Path) -> list[Path]:
    """Return the temporary folders of a target, of living processes and of dead ones."""
    found = list[Path]()
    prefix = _prefix(target)
    with suppress(OSError):  # a folder that cannot be listed may be written all the same
        found = [folder for folder in target.parent.iterdir() if folder.name.startswith(prefix)]
    return [folder for folder in found if folder.name.endswith(".partial") and not folder.is_symlink()]


def _left_over(target: Path) -> Iterator[Path]:
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


def _reason(error: Exception) -> str:
    """Return what an error says, without the names of files: the caller has named the one that the user knows."""
    return f"[Errno {error.errno}] {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _check_target(target: Path, is_right: Callable[[Path], bool] = Path.is_file, kind: str = "a regular file") -> None:
    """Raise if a rename would replace something of another kind, such as ``/dev/null``, or nothing can have the name."""
    with suppress(FileNotFoundError):
        target.stat()  # raises for a loop of links and for a name that is too long
        if not is_right(target):
            raise OSError(f"it exists and is not {kind}")


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
        if (folder / _OLD).exists():
            with _renaming(target):
                _settle(folder, target)
        # The lock goes last: without it, a folder that is not empty could not be told from one of a living process.
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _settle(folder: Path, target: Path) -> None:
    """Decide on what stepped aside in a temporary folder: it comes back, or is renamed if something took its place."""
    # A folder of another name is never brought back. So one that was deleted in part, by a process that was killed
    # meanwhile, does not return as a whole one.
    old = folder / _OLD
    if old.exists():
        old.rename(folder / "replaced" if target.exists() else target)


def _lock_of_renames(target: Path) -> Path:
    """Return the file that is locked while a folder is renamed to a name."""
    return target.parent / f"{_prefix(target)}lock"


@contextmanager
def _renaming(target: Path) -> Iterator[None]:
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
    return f".{_cut_name(target, 200)}.{digest}."


def _cut_name(target: Path, length: int) -> str:
    """Return the begin of the name of a target, so that a longer name has at most the 255 bytes of names of files."""
    return os.fsencode(target.name)[:length].decode(errors="ignore")


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
