"""Matrices of a model file (GGUF, safetensors, or a folder of safetensors) by name, each read when it is needed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, for safetensors
import numpy as np
from safetensors import SafetensorError, safe_open

from lqlora._patterns import EMBEDDINGS, OUTPUT_HEADS, select
from lqlora.errors import CheckpointError
from lqlora.integrations.gguf import linear_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from lqlora._patterns import Patterns

__all__ = ["open_weights"]

_FLOATS = ("F64", "F32", "F16", "BF16")


def open_weights(
    path: str | os.PathLike[str], include: Patterns = "*", exclude: Patterns = (*EMBEDDINGS, *OUTPUT_HEADS)
) -> dict[str, Callable[[], npt.NDArray[np.float32]]]:
    """Return a loader for each matrix of a model file, the input of :func:`lqlora.cost_table`.

    Only the headers of the files are read at once. The memory needed is that of the matrices that the caller keeps.

    Parameters
    ----------
    path : path-like
        GGUF file of architecture ``llama``, safetensors file, or folder of safetensors files.
    include, exclude : str, compiled regular expression, callable, or several of them
        Shell patterns (``"*.q_proj"``), expressions that match the whole name, or functions of the name. A matrix is
        selected if one of ``include`` matches its name and none of ``exclude`` does. The default leaves out embeddings
        and output heads.

    Returns
    -------
    dict of str to callable
        Loaders by name, in the order of the files. A matrix is a two-dimensional tensor of floating-point numbers, and
        its name is that of the tensor without ``.weight``. Each loader reads one matrix as float32, and can be pickled.

    Raises
    ------
    CheckpointError
        If a file is missing or cannot be read, or a folder has two matrices of one name.
    InvalidArgumentError
        If no matrix is selected.
    MissingDependencyError
        If a GGUF file is given and gguf is not installed.
    """
    path = Path(path)
    found = linear_weights(path) if path.suffix == ".gguf" else _find_safetensors(path)
    return {name: found[name] for name in select(found, include, exclude, where=f" of {path}")}


def _find_safetensors(path: Path) -> dict[str, Any]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path} has no .safetensors file.")
    found: dict[str, Any] = {}
    for file, tensor in _matrices(files):
        name = tensor.removesuffix(".weight")
        if name in found:
            raise CheckpointError(f"{path} has two matrices called {name!r}. Keep the files of one model in it.")
        found[name] = functools.partial(_read, file, tensor)
    return found


def _matrices(files: Iterable[Path]) -> Iterable[tuple[Path, str]]:
    """Yield the file and the name of each two-dimensional tensor of floats; only headers are read."""
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    if len(part.get_shape()) == 2 and part.get_dtype() in _FLOATS:
                        yield path, name
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist.") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def _read(path: Path, name: str) -> npt.NDArray[np.float32]:
    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name)).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Tensor {name!r} of {path} cannot be read: {error}.") from error
