"""Hidden states between the blocks of a model, in files."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["BlockStates", "writing"]


class BlockStates:
    """Hidden states of all parts of batches, each read when it is needed.

    Parameters
    ----------
    path : Path
        File.
    shapes : sequence of tuple of int
        Shape of each state.
    dtype : torch.dtype
        Dtype of all.
    """

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self._shapes, self._dtype = path, shapes, dtype
        self._places = [0]
        for own in shapes:
            self._places.append(self._places[-1] + math.prod(own) * dtype.itemsize)
        if path.stat().st_size != self._places[-1]:
            raise CheckpointError(f"{path} must have {self._places[-1]} bytes, got {path.stat().st_size}. Remove it.")

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.path.open("rb") as file:
            file.seek(self._places[index])
            data = bytearray(file.read(self._places[index + 1] - self._places[index]))
        return torch.frombuffer(data, dtype=self._dtype).reshape(self._shapes[index])


@contextmanager
def writing(path: Path) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yield a function that writes one state after another; the file gets its name at the end.

    Parameters
    ----------
    path : Path
        File in a folder that one process writes in.

    Yields
    ------
    callable
        Function that takes a tensor.
    """
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:

        def write(state: torch.Tensor) -> None:
            file.write(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        yield write
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
