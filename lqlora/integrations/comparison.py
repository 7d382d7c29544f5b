"""Comparison of a checkpoint with the model that it was made from, matrix by matrix."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lqlora._annotations import annotated
from lqlora._messages import shortened, shown
from lqlora._parallel import map_matrices
from lqlora._progress import reported
from lqlora.checkpoint.folder import parts_of, read_part
from lqlora.costs._digests import array_digest
from lqlora.decomposition import relative_error
from lqlora.errors import CheckpointError
from lqlora.integrations.sources import open_model
from lqlora.quantized import dequantize

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor

    import numpy.typing as npt

    from lqlora.checkpoint import Checkpoint, StoredMatrix

__all__ = ["compare_checkpoint"]


@annotated
def compare_checkpoint(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> dict[str, float]:
    """Compute the error of each matrix of a checkpoint from the model that it was made from.

    The matrices are read one at a time. :func:`lqlora.verify` compares the files themselves with their fingerprints.

    Parameters
    ----------
    path : path-like
        File of :func:`lqlora.save`, or folder of :func:`lqlora.decompose_checkpoint`.
    source : path-like
        The dense model, see :func:`lqlora.integrations.sources.open_model`.
    executor, progress : optional
        See :func:`lqlora.cost_table`.

    Returns
    -------
    dict of str to float
        Relative error of each matrix with its factors, in the Frobenius norm, in the order of the checkpoint.

    Raises
    ------
    CheckpointError
        If a file cannot be read, a matrix or tensor of the checkpoint is not in the model, has another shape, or was made from other
        values, or if a tensor of the model is neither a matrix nor a tensor of the checkpoint.
    """
    contents = open_model(source)
    found: dict[str, float] = {}
    total = sum(len(own.matrices) for own in _parts(path))
    used: set[str] = set()
    with reported(progress, "Comparing", total, "matrix") as report:
        for part in _parts(path):
            inputs = part.metadata.get("matrices")
            digests = inputs if isinstance(inputs, dict) else {}
            tasks = []
            for name, matrix in part.matrices.items():
                if name not in contents.weights:
                    raise CheckpointError(
                        shortened(f"{path} has the matrix {shown(name)}, which {source} does not have.")
                    )
                tasks.append(_Task(name, contents.weights[name], matrix, _digest_of(digests.get(name))))
            work = functools.partial(_error_of, path=str(path), source=str(source))
            found |= dict(map_matrices(work, tasks, executor, _after(len(found), report)))
            for name, tensor in part.tensors.items():
                if name not in contents.tensors:
                    raise CheckpointError(
                        shortened(f"{path} has the tensor {shown(name)}, which {source} does not have.")
                    )
                if not _is_same(tensor, contents.tensors[name].load()):
                    raise CheckpointError(
                        shortened(f"{path} has other values in the tensor {shown(name)} than {source}.")
                    )
                used.add(name)
    for name, own in contents.tensors.items():
        if name not in used and not (own.matrices and all(matrix in found for matrix in own.matrices)):
            raise CheckpointError(shortened(f"{path} lacks the tensor {shown(name)} of {source}."))
    return found


def _after(before: int, report: Callable[[int], None]) -> Callable[[int], None]:
    """Return a function that reports how many matrices of all files are finished."""
    return lambda done: report(before + done)


class _Task(NamedTuple):
    """Comparison of one matrix; ``digest`` is that of the values that it was made from, if the file says it."""

    name: str
    load: Callable[[], npt.NDArray[np.float32]]
    matrix: StoredMatrix
    digest: str | None


def _parts(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Yield the content of each file of a checkpoint, mapped into memory."""
    for part in parts_of(Path(path)):
        yield read_part(part)


def _digest_of(entry: Any) -> str | None:
    is_entry = isinstance(entry, list) and bool(entry) and isinstance(entry[0], str)
    return entry[0].split(" ")[0] if is_entry else None


def _error_of(task: _Task, *, path: str, source: str) -> tuple[str, float]:
    dense = task.load()
    if dense.shape != task.matrix.quantized.shape:
        raise CheckpointError(
            shortened(
                f"{path} has the matrix {shown(task.name)} of shape {task.matrix.quantized.shape}, and {source} of {dense.shape}."
            )
        )
    if task.digest is not None and array_digest(dense) != task.digest:
        raise CheckpointError(
            shortened(f"{path} was made from other values of {shown(task.name)} than those of {source}.")
        )
    found = dequantize(task.matrix.quantized)
    factors = (np.asarray(own).astype(np.float32) for own in (task.matrix.lora_B, task.matrix.lora_A))
    product = np.matmul(*factors)
    return task.name, relative_error(dense, found + np.float32(task.matrix.scaling) * product, name=task.name)


def _is_same(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
