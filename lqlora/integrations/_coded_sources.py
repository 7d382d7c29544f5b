"""Weights that files of a model hold as codes and scales: found, and decoded when they are read."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from lqlora._messages import about_file, shown
from lqlora.errors import CheckpointError, FormatError, LQLoRAError
from lqlora.integrations._coded_weights import FLOAT8, CodedWeight, find_coded
from lqlora.integrations._tensor_files import FoundTensor, TensorPart, of_dimensions, read_as_stored
from lqlora.integrations.bitsandbytes import described_shape, find_bitsandbytes, from_bitsandbytes, list_parts
from lqlora.integrations.contents import SourceTensor
from lqlora.quantized import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["CodedTensors", "find_coded_tensors"]

_MOST_DESCRIPTION_BYTES = 2**16


class CodedTensors(NamedTuple):
    """Weights that are decoded.

    Parameters
    ----------
    tensors : dict of str to FoundTensor
        Weights by the name of the tensor in whose place they stand.
    parts : set of str
        Names of the other tensors that they are computed from.
    """

    tensors: dict[str, FoundTensor]
    parts: set[str]


def find_coded_tensors(
    path: Path, parts: Mapping[str, TensorPart], config: Mapping[str, Any], turned: Callable[[str], bool]
) -> CodedTensors:
    """Return the weights that are decoded.

    Parameters
    ----------
    path : Path
        File or folder, for errors.
    parts : mapping of str to TensorPart
        Tensors of all files.
    config : mapping
        Configuration of transformers; empty if there is none.
    turned : callable
        Function that tells of the name of a tensor whether the dense model stores it as (inputs, outputs).

    Returns
    -------
    CodedTensors
        Weights of bitsandbytes, GPTQ, compressed-tensors, and float8 numbers with scales.

    Raises
    ------
    CheckpointError
        If tensors of a weight are missing or contradict each other.
    """
    found: dict[str, FoundTensor] = {}
    used: set[str] = set()
    for name, files in _bitsandbytes_files(path, parts).items():
        found[name] = _coded_weight(parts, files, name, is_turned=turned(name))
        used.update(files)
    settings = config.get("quantization_config")
    for weight in find_coded(parts, settings if isinstance(settings, dict) else {}):
        if weight.name in parts and weight.name not in weight.parts:
            raise CheckpointError(about_file(path, f"has both codes and values for {shown(weight.name)}."))
        found[weight.parts[0]] = _decoded_weight(parts, weight, is_turned=turned(weight.name))
        used.update(weight.parts)
    return CodedTensors(found, used - found.keys())


def _bitsandbytes_files(path: Path, parts: Mapping[str, TensorPart]) -> dict[str, dict[str, Path]]:
    """Return the file of each part of each 4-bit weight of bitsandbytes."""
    coded = find_bitsandbytes(parts)
    if lost := next((name for name in coded if name not in parts), None):
        raise CheckpointError(
            about_file(path, f"lacks the codes of the 4-bit weight {shown(lost)}, which it describes.")
        )
    found = {name: {part: parts[part].file for part in list_parts(parts, name)} for name in coded}
    for name in (part for files in found.values() for part in files):
        if parts[name].dtype not in ("U8", "F32"):  # NumPy does not have all other dtypes
            raise CheckpointError(
                about_file(
                    parts[name].file,
                    f"must have uint8 or float32 in the 4-bit layout, got {parts[name].dtype} for {shown(name)}.",
                )
            )
    return found


def _coded_weight(
    parts: Mapping[str, TensorPart], files: Mapping[str, Path], name: str, *, is_turned: bool
) -> FoundTensor:
    """Describe a 4-bit weight of bitsandbytes."""
    load = functools.partial(_read_bitsandbytes, files, name)
    shape, size = _shape_of_bitsandbytes(parts, files, name), sum(parts[key].nbytes for key in files)
    if len(shape) != 2:
        return FoundTensor(name, SourceTensor(shape, "float32", size, load), {}, of_dimensions(shape))
    return _matrix(name, (shape[0], shape[1]), size, load, is_turned=is_turned, is_linear=True)


def _matrix(
    name: str,
    shape: tuple[int, int],
    size: int,
    load: Callable[[], npt.NDArray[np.float32]],
    *,
    is_turned: bool,
    is_linear: bool,
) -> FoundTensor:
    """Describe a matrix, and the tensor that the dense model has for it."""
    matrix, other = name.removesuffix(".weight"), functools.partial(_transposed, load)
    outward, tensor = (other, load) if is_turned and not is_linear else (load, other if is_turned else load)
    stored = shape[::-1] if is_turned and is_linear else shape
    return FoundTensor(name, SourceTensor(stored, "float32", size, tensor, (matrix,), is_turned), {matrix: outward}, "")


def _transposed(load: Callable[[], npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(load().T)


def _decoded_weight(parts: Mapping[str, TensorPart], weight: CodedWeight, *, is_turned: bool) -> FoundTensor:
    """Describe a weight of another layout."""
    files = {part: (parts[part].file, parts[part].dtype) for part in weight.parts}
    shape = weight.shape
    if shape is None:
        stated = f"{weight.name}_shape"
        if parts[stated].shape != (2,) or parts[stated].dtype != "I64":
            raise CheckpointError(about_file(parts[stated].file, f"must have two integers for {shown(stated)}."))
        shape = tuple(map(int, read_as_stored(parts[stated].file, stated)))
    size, load = (
        sum(parts[part].nbytes for part in weight.parts),
        functools.partial(_decode, files, weight.decode, weight.name),
    )
    if len(shape) != 2:
        raise CheckpointError(
            about_file(files[weight.parts[0]][0], f"must have matrices for {shown(weight.name)}, got shape {shape}.")
        )
    return _matrix(weight.name, (shape[0], shape[1]), size, load, is_turned=is_turned, is_linear=weight.is_linear)


def _decode(
    files: Mapping[str, tuple[Path, str]],
    decode: Callable[[Mapping[str, Any]], npt.NDArray[np.float32]],
    name: str,
) -> npt.NDArray[np.float32]:
    """Read the parts of a weight, and decode it."""
    try:
        with np.errstate(over="ignore"):  # whoever uses the values refuses infinity
            return decode(
                {
                    part: _read_float8(path, part) if dtype in FLOAT8 else read_as_stored(path, part)
                    for part, (path, dtype) in files.items()
                }
            )
    except LQLoRAError as error:
        if isinstance(error, CheckpointError):
            raise
        path, _ = next(iter(files.values()))
        raise CheckpointError(
            about_file(path, f"has the weight {shown(name)}, which cannot be decoded: {error}")
        ) from error


def _read_float8(path: Path, name: str) -> npt.NDArray[Any]:
    """Read a tensor of a dtype that safetensors does not give to NumPy. Its place is in the header, which safetensors has checked."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            own = json.loads(file.read(length))[name]
            begin, end = own["data_offsets"]
            file.seek(8 + length + begin)
            values = np.frombuffer(file.read(end - begin), np.uint8).view(FLOAT8[own["dtype"]])
        found: npt.NDArray[Any] = values.reshape(own["shape"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            about_file(path, f"has the tensor {shown(name)}, which cannot be read: {error}.")
        ) from error
    return found


def _shape_of_bitsandbytes(parts: Mapping[str, TensorPart], files: Mapping[str, Path], name: str) -> tuple[int, ...]:
    """Return the shape of a 4-bit weight; only its description is read."""
    described = next((part for part in files if ".quant_state." in part.removeprefix(name)), "")
    if not described or parts[described].nbytes > _MOST_DESCRIPTION_BYTES:
        raise _unreadable(
            files, name, FormatError(f"its description must take at most {_MOST_DESCRIPTION_BYTES} bytes.")
        )
    try:
        with safe_open(files[described], framework="numpy") as file:
            return described_shape(file.get_tensor(described), is_nested=f"{name}.nested_absmax" in files)
    except (OSError, SafetensorError, LQLoRAError) as error:
        raise _unreadable(files, name, error) from error


def _read_bitsandbytes(files: Mapping[str, Path], name: str) -> npt.NDArray[np.float32]:
    """Read and decode a 4-bit weight, whose parts may lie in several files."""
    tensors = {}
    try:
        for part, path in files.items():
            with safe_open(path, framework="numpy") as file:
                tensors[part] = file.get_tensor(part)
        return np.asarray(dequantize(from_bitsandbytes(tensors, name).quantized))
    except (OSError, SafetensorError, LQLoRAError) as error:
        raise _unreadable(files, name, error) from error


def _unreadable(files: Mapping[str, Path], name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        about_file(files[name], f"has the 4-bit weight {shown(name)}, which cannot be read: {error}")
    )
