"""File from which an interrupted distillation goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lqlora._messages import shortened
from lqlora.checkpoint.runs import read_run, write_run
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["RunFile"]


class RunFile:
    """State of one run in a file.

    Parameters
    ----------
    path : path-like
        The file.
    run : str
        Fingerprint of what the run depends on.
    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self._path, self._run = path, run

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the tensors and numbers of the file, or None if there is no file.

        Returns
        -------
        tuple of dict, or None
            What :meth:`write` got.

        Raises
        ------
        CheckpointError
            If the file is damaged, or belongs to another run.
        """
        if not Path(self._path).exists():
            return None
        arrays, run, numbers = read_run(self._path)
        if run != self._run:
            raise CheckpointError(
                shortened(
                    f"{self._path} belongs to another run: model, batches or options differ. Pass another path, or delete the file."
                )
            )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, numbers

    def write(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace the file.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            Tensors by name.
        numbers : mapping
            JSON values.

        Raises
        ------
        CheckpointError
            If the file cannot be written.
        """
        arrays = {name: np.asarray(own.detach().cpu().numpy(), order="C") for name, own in tensors.items()}
        write_run(self._path, arrays, self._run, numbers)
