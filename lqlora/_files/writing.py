"""Atomic writing of files and folders: a reader finds the old content or the new content, never a part of either."""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lqlora._files.temporary import OLD, cut_name, left_over, renaming, settle, temporary_folder
from lqlora._messages import shortened
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lqlora.errors import LQLoRAError

__all__ = ["check_writable", "input_file", "replace_file", "replace_folder", "write_whole"]


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
        with temporary_folder(target) as folder:
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
        with temporary_folder(target) as folder:
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
        _check_target(target, stat.S_ISDIR, "a folder")
        with temporary_folder(target) as folder:
            check()
            beside = folder / "data"
            beside.mkdir()
            yield beside
            with renaming(target):
                # What other processes left since the start is settled first: only the last folder may come back.
                for dead in left_over(target):
                    with suppress(OSError):
                        settle(dead, target)
                try:
                    check()
                except CheckpointError as error:
                    kept = _keep_beside(beside, target)
                    raise CheckpointError(shortened(f"{error} The new content is in {kept}.")) from error
                if target.exists():
                    target.rename(folder / OLD)
                beside.rename(target)
                with suppress(OSError):  # from here on the old one is not to come back
                    settle(folder, target)
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
    begin = cut_name(target, 240)
    for number in itertools.count(2):
        free = target.with_name(f"{begin}-{number}")
        if not os.path.lexists(free):
            try:
                return folder.rename(free)
            except OSError:
                if not os.path.lexists(free):  # otherwise another process took the name at this moment
                    raise
    raise AssertionError


def _reason(error: Exception) -> str:
    """Return what an error says, without the names of files: the caller has named the one that the user knows."""
    return f"[Errno {error.errno}] {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _check_target(target: Path, is_right: Callable[[int], bool] = stat.S_ISREG, kind: str = "a regular file") -> None:
    """Raise if a rename would replace something of another kind, such as ``/dev/null``, or nothing can have the name."""
    with suppress(FileNotFoundError):
        # This raises for a loop of links and for a name that is too long. It is the only look at the target: another process may
        # rename it away before a second one.
        if not is_right(target.stat().st_mode):
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
