"""Checkpoints: decompositions of a whole model in one safetensors file or a folder of them, written atomically and checked on load.

:meth:`lqlora.QuantizedArray.from_arrays` checks the stored arrays of a weight against its format; ``file`` checks the rest of a file,
and ``folder`` what several files must have in common.
"""

from __future__ import annotations

from lqlora.checkpoint.file import Checkpoint, StoredMatrix, save
from lqlora.checkpoint.folder import load, verify

__all__ = ["Checkpoint", "StoredMatrix", "load", "save", "verify"]
