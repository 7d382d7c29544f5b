"""Warnings that point to the line of the caller, however many functions of this library lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

__all__ = ["warn"]

#: Files whose frames are never the caller: this package, constructors of dataclasses, and the decorators of torch.
_INNER = (f"{Path(__file__).parent.as_posix()}/", "<string>")
_DECORATORS = "torch/utils/_contextlib.py"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the library.

    Parameters
    ----------
    message : str
        One or two sentences.
    category : type, default UserWarning
        Class of the warning.
    """
    # Counting frames by hand goes wrong as soon as a function gets a decorator. Python 3.12 has skip_file_prefixes for this.
    level, frame = 2, sys._getframe(1)  # noqa: SLF001 - the only way to the caller
    while frame.f_back is not None and _is_inner(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inner(file: str) -> bool:
    file = file.replace("\\", "/")
    return file.startswith(_INNER) or file.endswith(_DECORATORS)
