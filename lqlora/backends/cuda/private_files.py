"""Files that only their user can have written, for code that is executed: reading checks owners and permissions."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from lqlora._files import write_whole

__all__ = ["read_private", "write_private"]

_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read_private(path: Path) -> bytes | None:
    """Return the content of a file, or None unless only this user and the administrator can have written it.

    The file and its folder must belong to one of the two, and nobody else may write them. Nobody else may replace a
    folder above them, either. A link in place of the file is not followed.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    bytes or None
        None also if there is no such file, it cannot be read, or the system has no owners and permissions of this
        kind, as Windows has none.
    """
    real = Path(os.path.realpath(path.parent)) / path.name
    with suppress(OSError):
        if not _is_private(real.parent):
            return None
        # Nobody else can change a name on this path any more. The file is opened before it is examined, so that what is
        # read is what was examined. Without O_NONBLOCK the opening of a pipe would wait for a writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and _is_owned(found) and not found.st_mode & _WRITE_BY_OTHERS:
                return file.read()
    return None


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read and write, unless others could replace it.

    Parameters
    ----------
    path : Path
        File to write. Folders above it that do not exist are made, for this user only.
    data : bytes
        The whole content.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    real = Path(os.path.realpath(path.parent)) / path.name
    missing = [folder for folder in real.parents if not folder.exists()]
    if _is_private(real.parents[len(missing)], is_last=not missing):
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        if _is_private(real.parent):  # another process may have made it
            real.unlink(missing_ok=True)  # a link would be followed, and a pipe not replaced
            write_whole(real, data, mode=0o600)


def _is_private(folder: Path, *, is_last: bool = True) -> bool:
    """Return whether only this user and the administrator can change a folder, or replace it or one above it.

    Others may write in folders above it that have the sticky bit, such as ``/tmp``: they cannot rename what is not theirs.
    With ``is_last=False`` the folder is one of these.
    """
    if sys.platform == "win32":  # permissions there are lists that os.stat does not show
        return False
    for above in (folder, *folder.parents):
        found = above.lstat()
        by_others = found.st_mode & _WRITE_BY_OTHERS
        if by_others and (not is_last or above != folder):
            is_own_group = by_others == stat.S_IWGRP and found.st_gid == _private_group(os.geteuid())
            by_others = 0 if is_own_group or found.st_mode & stat.S_ISVTX else by_others
        if by_others or not stat.S_ISDIR(found.st_mode) or not _is_owned(found):
            return False
    return True


def _is_owned(found: os.stat_result) -> bool:
    """Return whether a file belongs to this user or the administrator."""
    return sys.platform != "win32" and found.st_uid in (0, os.geteuid())


@lru_cache(maxsize=8)
def _private_group(user: int) -> int | None:
    """Return the group of a user's name that has no other members, if there is one.

    Many systems have one for each user, and let it write all folders that the user makes.
    """
    import grp  # noqa: PLC0415 - exists on these systems only
    import pwd  # noqa: PLC0415

    with suppress(KeyError):  # an unknown user or group, as in containers
        own = pwd.getpwuid(user)
        group = grp.getgrgid(own.pw_gid)
        if group.gr_name == own.pw_name and set(group.gr_mem) <= {own.pw_name}:
            return group.gr_gid
    return None
