"""Error about a file of another program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqlora._messages import shortened
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    import os

__all__ = ["fault"]


def fault(path: str | os.PathLike[str], problem: str) -> CheckpointError:
    """Return the error for a fault of a file, with a printable message of bounded length.

    Parameters
    ----------
    path : path-like
        The file or folder. Of a long path the end is kept.
    problem : str
        Predicate of the sentence, such as ``"is not a GGUF file."``.

    Returns
    -------
    CheckpointError
        The error to raise.

    Examples
    --------
    >>> str(fault("model.gguf", "is not a GGUF file."))
    'model.gguf is not a GGUF file.'
    """
    name = str(path)
    return CheckpointError(shortened(f"{name if len(name) <= 150 else f'…{name[-149:]}'} {problem}"))
