"""A lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING

from lqlora.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["lock"]


def lock(file: IO[bytes], path: Path) -> None:
    """Lock a file that is open until it is closed, or raise if another process has."""
    try:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415 - of this system only

            file.seek(1 << 40)  # a byte beyond the end, as a locked one cannot be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl  # noqa: PLC0415 - of the other systems only

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreError(f"{path} is in use by another process.") from error
