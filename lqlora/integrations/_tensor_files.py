"""Tensors of safetensors files: headers, and values one tensor at a time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, for safetensors
import numpy as np
from safetensors import SafetensorError, safe_open

from lqlora._messages import about_file, shown
from lqlora.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from lqlora.integrations.contents import SourceTensor

__all__ = ["FoundTensor", "TensorPart", "of_dimensions", "read_as_stored", "read_header"]


class TensorPart(NamedTuple):
    """A tensor of a safetensors file.

    Parameters
    ----------
    file : Path
        The file.
    dtype : str
        Its dtype, by the name in safetensors.
    shape : tuple of int
        Its shape.
    nbytes : int
        Bytes in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class FoundTensor(NamedTuple):
    """A tensor of the model.

    Parameters
    ----------
    name : str
        Its name.
    tensor : SourceTensor
        How it is read.
    loaders : dict of str to callable
        Loaders of the matrices that it holds.
    reason : str
        Why it holds none; empty if it does.
    """

    name: str
    tensor: SourceTensor
    loaders: dict[str, Callable[[], npt.NDArray[np.float32]]]
    reason: str


def read_header(path: Path) -> list[tuple[str, TensorPart]]:
    """Return name and description of each tensor of a file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    list of (str, TensorPart)
        Tensors in the order of the file.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or is a checkpoint of this library.
    """
    if not path.is_file():
        raise CheckpointError(about_file(path, "is not a file." if path.exists() else "does not exist."))
    try:
        with safe_open(path, framework="numpy") as file:
            if "lqlora" in (file.metadata() or {}):
                raise CheckpointError(
                    about_file(
                        path,
                        "is a checkpoint that lqlora.save wrote: its matrices are quantized. Read it with lqlora.load.",
                    )
                )
            return [(name, _describe(path, file.get_slice(name))) for name in file.keys()]  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(about_file(path, f"is not a readable safetensors file: {error}.")) from error


def _describe(path: Path, tensor: Any) -> TensorPart:
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    digits = re.search("[0-9]+", dtype)  # the first number in the name counts the bits, as in BF16 and F8_E4M3
    bits = int(digits[0]) if digits else 8
    size = bits
    for length in shape:
        size *= length
    return TensorPart(path, dtype, shape, -(-size // 8))


def of_dimensions(shape: tuple[int, ...]) -> str:
    """Return the reason why a tensor is not a matrix.

    Parameters
    ----------
    shape : tuple of int
        Its shape.

    Returns
    -------
    str
        Noun phrase.
    """
    return f"of {len(shape)} dimension{'' if len(shape) == 1 else 's'}"


def read_as_stored(path: Path, name: str, index: int | None = None) -> npt.NDArray[Any]:
    """Read a tensor, or one matrix of a stack, in the dtype of the file.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        Name of the tensor.
    index : int, optional
        Index of the matrix.

    Returns
    -------
    ndarray
        The values.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name) if index is None else file.get_slice(name)[index])
    # AttributeError and TypeError: a dtype that NumPy does not have. ValueError: more dimensions than it allows.
    except (AttributeError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error
