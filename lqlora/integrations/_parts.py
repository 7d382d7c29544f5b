"""Parts of a model that is split into several files, found by their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lqlora._messages import about_file, shown
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["all_parts", "number_and_count"]

#: Names as llama.cpp and transformers write them: the first part of two is ``NAME-00001-of-00002.gguf``.
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.gguf|\.safetensors)", re.DOTALL)


def number_and_count(path: Path) -> tuple[int, int] | None:
    """Return which of how many parts a file is by its name; None for the file of a whole model.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    tuple of int, or None
        Number of the part, which should be from 1 to the second, and number of all parts.

    Examples
    --------
    >>> from pathlib import Path
    >>> number_and_count(Path("model-00001-of-00002.gguf")), number_and_count(Path("model.gguf"))
    ((1, 2), None)
    """
    match = _PART.fullmatch(path.name)
    return (int(match[2]), int(match[3])) if match else None


def all_parts(path: Path) -> tuple[Path, ...]:
    """Return the files of all parts of a model, in order.

    Parameters
    ----------
    path : Path
        One of the parts, or the file of a whole model, which is returned alone.

    Returns
    -------
    tuple of Path
        Files that exist, apart from ``path`` itself, which need not.

    Raises
    ------
    CheckpointError
        If a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match[3])
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}")
        if part != path and not part.exists():
            raise CheckpointError(
                about_file(path, f"is one of {count} parts, but part {number} is missing: {shown(part.name)}.")
            )
        parts.append(part)
    return tuple(parts)
