"""Files that are written at once: a reader finds the old content or the new content, never a part of either.

``writing`` replaces files and folders. ``temporary`` has the folders in which new content waits, and removes those of
killed processes. ``locks`` tells the two apart.
"""

from __future__ import annotations

from lqlora._files.locks import lock, open_unshared
from lqlora._files.temporary import is_being_written, remove_left_over
from lqlora._files.writing import check_writable, input_file, replace_file, replace_folder, write_whole

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
