"""Checkpoints: decompositions of a whole model in one safetensors file, written atomically and checked on load.

:meth:`lqlora.QuantizedArray.from_arrays` checks the stored arrays of a weight against its format; ``file`` checks the rest.
"""

from __future__ import annotations

from lqlora.checkpoint.file import Checkpoint, StoredMatrix, load, save, verify

__all__ = ["Checkpoint", "StoredMatrix", "load", "save", "verify"]
