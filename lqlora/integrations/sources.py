"""The matrices of a model file, by name, each read when it is needed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - teaches NumPy the bfloat16 that safetensors reads
import numpy as np
from safetensors import SafetensorError, safe_open

from lqlora._patterns import matches
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations.gguf import linear_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from lqlora._patterns import Pattern

__all__ = ["KEPT", "open_weights"]

#: What is left alone unless it is asked for: few matrices, sensitive, and often tied to each other.
KEPT = ("*embed*", "lm_head", "*.lm_head")

_FLOATS = ("F64", "F32", "F16", "BF16")


def open_weights(
    path: Path, include: Sequence[Pattern], exclude: Sequence[Pattern]
) -> dict[str, Callable[[], np.typing.NDArray[Any]]]:
    """Find the matrices of a GGUF file, of a safetensors file, or of a folder of these.

    Parameters
    ----------
    path : Path
        What to read.
    include, exclude : sequence of patterns
        A matrix is taken if one of ``include`` matches its name and none of ``exclude`` does.

    Returns
    -------
    dict of str to callable
        By name, without ``.weight`` at its end, in the order of the file. Each callable reads one matrix.

    Raises
    ------
    CheckpointError
        If there is no such file, or it cannot be read.
    InvalidArgumentError
        If nothing matches.
    """
    found = linear_weights(path) if path.suffix == ".gguf" else _find_safetensors(path)
    chosen = {
        name: load
        for name, load in found.items()
        if any(matches(name, p) for p in include) and not any(matches(name, p) for p in exclude)
    }
    if not chosen:
        some = ", ".join(list(found)[:5]) or "none"
        raise InvalidArgumentError(f"None of the {len(found)} matrices of {path} is chosen; they are {some}, ….")
    return chosen


def _find_safetensors(path: Path) -> dict[str, Any]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"There is no .safetensors file in {path}.")
    found: dict[str, Any] = {}
    for file, tensor in _matrices(files):
        name = tensor.removesuffix(".weight")
        if name in found:
            raise CheckpointError(f"Two matrices of {path} are called {name!r}.")
        found[name] = functools.partial(_read, file, tensor)
    return found


def _matrices(files: Iterable[Path]) -> Iterable[tuple[Path, str]]:
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    if len(part.get_shape()) == 2 and part.get_dtype() in _FLOATS:
                        yield path, name
        except FileNotFoundError:
            raise CheckpointError(f"There is no file {path}.") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}.") from error


def _read(path: Path, name: str) -> np.typing.NDArray[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name)).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Tensor {name!r} of {path} cannot be read: {error}.") from error
