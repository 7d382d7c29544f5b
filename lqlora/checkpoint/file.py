"""Checkpoints: one safetensors file, written beside its final name and renamed.

A quantized matrix ``m`` is a handful of tensors: ``m.weight.codes``, ``m.weight.scales`` (or, under double
quantization, ``m.weight.scales.codes``, ``m.weight.scales.scales`` and ``m.weight.scales.offset``), ``m.lora_A`` and
``m.lora_B``; ``m.weight.levels`` if its levels are fitted, and ``m.weight.codebook`` if its codebook has no standard
name. One JSON document, kept under the key
``lqlora`` of the file's own metadata, names formats and shapes. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes  # noqa: F401 - teaches NumPy the bfloat16 that safetensors reads and writes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lqlora import ops
from lqlora.codebooks import Codebook, is_standard
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError, LQLoRAError, NonFiniteError
from lqlora.formats import BlockFormat, codebook_name
from lqlora.quantized import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora._typing import Array

__all__ = ["Checkpoint", "StoredMatrix", "load", "save", "verify"]

_SPEC = 2
_KEY = "lqlora"


class _Matrix(Protocol):
    """What :func:`save` needs of a matrix; a :class:`lqlora.Decomposition` has it."""

    @property
    def quantized(self) -> QuantizedArray: ...
    @property
    def lora_A(self) -> Array: ...
    @property
    def lora_B(self) -> Array: ...
    @property
    def scaling(self) -> float: ...


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """One matrix as it is stored: ``dequantize(quantized) + scaling * lora_B @ lora_A``.

    Parameters
    ----------
    quantized : QuantizedArray of shape (m, n)
        The quantized part.
    lora_A, lora_B : array, shape (rank, n) and (m, rank)
        Low-rank factors; the rank may be 0.
    scaling : float
        Factor of the low-rank part.
    """

    quantized: QuantizedArray
    lora_A: Array
    lora_B: Array
    scaling: float = 1.0


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Content of a checkpoint file.

    Parameters
    ----------
    matrices : dict of str to StoredMatrix
        Quantized matrices by module name, as NumPy arrays.
    tensors : dict of str to ndarray
        Everything that is not quantized.
    metadata : dict
        What the writer added: JSON values.
    """

    matrices: dict[str, StoredMatrix]
    tensors: dict[str, Array] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def save(
    path: str | os.PathLike[str],
    matrices: Mapping[str, _Matrix],
    tensors: Mapping[str, Array] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. A crash at any moment leaves the old file, or none, never half of one.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    matrices : mapping of str to Decomposition or StoredMatrix
        Quantized matrices by module name, of any array library.
    tensors : mapping of str to array, optional
        What is not quantized: embeddings, norms, biases.
    metadata : mapping, optional
        JSON values of your own.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    InvalidArgumentError
        If two tensors have one name, or the metadata is not JSON.

    Examples
    --------
    >>> import numpy as np, lqlora as lq, tempfile, pathlib
    >>> d = lq.decompose(np.eye(8), lq.BlockFormat(lq.NF4, 8), rank=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lq.save(f"{folder}/eye.safetensors", {"eye": d})
    ...     back = lq.load(f"{folder}/eye.safetensors")
    >>> bool((back.matrices["eye"].quantized.packed == d.quantized.packed).all())
    True
    """
    arrays: dict[str, Any] = {}
    rows = {}
    for name, matrix in matrices.items():
        _add_all(arrays, _matrix_arrays(name, matrix))
        rows[name] = {
            "format": str(matrix.quantized.format),
            "shape": list(matrix.quantized.shape),
            "scaling": float(matrix.scaling),
            "normalization": matrix.quantized.format.codebook.normalization,
        }
    prefixes = tuple(f"{name}.weight." for name in matrices)
    if taken := [name for name in tensors or {} if prefixes and name.startswith(prefixes)]:
        raise InvalidArgumentError(f"Tensor {taken[0]!r} would be taken for a part of a quantized matrix.")
    _add_all(arrays, {name: ops.convert(tensor, np) for name, tensor in (tensors or {}).items()})
    arrays = {name: _plain(array) for name, array in arrays.items()}
    _check_readable(arrays, rows)
    document: dict[str, Any] = {"spec": _SPEC, "matrices": rows}
    try:
        # What JSON makes of it is what will be read: keys that are numbers become text.
        document["metadata"] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        document["sha256"] = _digest(arrays, document)
        header = json.dumps(document, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"The metadata of a checkpoint must be JSON values: {error}.") from None
    # One key only: safetensors writes several in an order that differs from run to run.
    _write(Path(path), arrays, {_KEY: header})


def _check_readable(arrays: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the matrices together as a reader would, before a file that works is replaced by one that does not."""
    left = dict(arrays)
    try:
        for name, row in rows.items():
            _take_matrix(left, name, row)
    except (KeyError, LQLoRAError) as error:
        raise InvalidArgumentError(f"Matrix {name!r} cannot be stored: {error}") from error
    if "__metadata__" in arrays:
        raise InvalidArgumentError("No tensor can be named '__metadata__': safetensors reserves the name.")


def _plain(array: Any) -> Any:
    """Return a C-contiguous array in this machine's byte order; scalars stay scalars."""
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return np.asarray(native, order="C")


def _matrix_arrays(name: str, matrix: _Matrix) -> dict[str, Any]:
    arrays = {f"{name}.weight.{key}": array for key, array in matrix.quantized.to(np).to_arrays().items()}
    codebook = matrix.quantized.format.codebook
    if not is_standard(codebook):
        arrays[f"{name}.weight.codebook"] = codebook.levels
    return arrays | {f"{name}.lora_{x}": ops.convert(getattr(matrix, f"lora_{x}"), np) for x in "AB"}


def _add_all(arrays: dict[str, Any], new: Mapping[str, Any]) -> None:
    if twice := sorted(set(arrays) & set(new)):
        raise InvalidArgumentError(f"Two tensors are named {twice[0]!r}.")
    arrays.update(new)


def _digest(arrays: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Fingerprint of all tensors and of the description, except for the fingerprint itself."""
    described = {key: value for key, value in document.items() if key != "sha256"}
    total = hashlib.sha256(json.dumps(described, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return total.hexdigest()


def _write(path: Path, arrays: dict[str, Any], header: dict[str, str]) -> None:
    beside = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
        save_file(arrays, beside, metadata=header)
        with open(beside, "rb+") as file:  # noqa: PTH123 - a rename must not overtake the data
            os.fsync(file.fileno())
        os.replace(beside, path)  # noqa: PTH105
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write {path}: {error}. Nothing was changed.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, checking every length, dtype and code before anything is decoded.

    Parameters
    ----------
    path : path-like
        File written by :func:`save`.

    Returns
    -------
    Checkpoint
        As NumPy arrays, bit for bit what was saved.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not a checkpoint of this library, or contradicts itself.
    """
    return _assemble(path, *_read(Path(path)))


def _assemble(path: str | os.PathLike[str], arrays: dict[str, Any], document: dict[str, Any]) -> Checkpoint:
    try:
        matrices = {name: _take_matrix(arrays, name, row) for name, row in document["matrices"].items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, LQLoRAError) as error:
        raise CheckpointError(f"{path} contradicts itself: {error}") from error
    return Checkpoint(matrices, arrays, document["metadata"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except (AttributeError, OSError, SafetensorError, TypeError) as error:  # the first and the last: dtypes NumPy lacks
        hint = "is it truncated, or a git-lfs pointer?"
        raise CheckpointError(f"{path} is no readable safetensors file ({error}): {hint}") from error
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but not one that lqlora wrote.")
    try:
        document = json.loads(text)
        spec = document["spec"]
        complete = all(isinstance(document[key], dict) for key in ("matrices", "metadata"))
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"The description inside {path} is broken: {type(error).__name__}.") from error
    if spec != _SPEC or not complete:
        raise CheckpointError(f"{path} has version {spec!r}; this library reads {_SPEC}.")
    return arrays, document


def _take_matrix(arrays: dict[str, Any], name: str, row: Mapping[str, Any]) -> StoredMatrix:
    prefix = f"{name}.weight."
    own = {key.removeprefix(prefix): arrays.pop(key) for key in list(arrays) if key.startswith(prefix)}
    levels = own.pop("codebook", None)
    text = str(row["format"])
    codebook = None if levels is None else Codebook(levels, codebook_name(text), row["normalization"])
    shape = tuple(row["shape"])
    if len(shape) != 2 or not all(isinstance(length, int) and 0 <= length < 2**31 for length in shape):
        raise FormatError(f"Matrix {name!r} has the shape {shape}.")
    quantized = QuantizedArray.from_arrays(own, BlockFormat.parse(text, codebook), shape)
    lora_A, lora_B = arrays.pop(f"{name}.lora_A"), arrays.pop(f"{name}.lora_B")
    if lora_A.ndim != 2 or lora_B.shape != (shape[0], len(lora_A)) or lora_A.shape[1] != shape[1]:
        raise FormatError(f"Factors of shapes {lora_B.shape} and {lora_A.shape} do not fit {name!r}, {shape}.")
    ops.widen(lora_A, f"lora_A of {name!r}")
    ops.widen(lora_B, f"lora_B of {name!r}")
    scaling = float(row["scaling"])
    if not math.isfinite(scaling):
        raise FormatError(f"The scaling of {name!r} is {scaling}.")
    return StoredMatrix(quantized, lora_A, lora_B, scaling)


def verify(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, and also compare its fingerprint and look for values that are not finite.

    Parameters
    ----------
    path : path-like
        File written by :func:`save`.

    Returns
    -------
    Checkpoint
        The content, verified.

    Raises
    ------
    CheckpointError
        As :func:`load` does, and if a byte of the data has changed or a number is NaN or infinite.
    """
    arrays, document = _read(Path(path))
    try:
        same = _digest(arrays, document) == document.get("sha256")
    except ValueError:  # a number that JSON does not have
        same = False
    if not same:
        raise CheckpointError(f"The content of {path} is not what was written: its SHA-256 differs.")
    for name, array in arrays.items():
        if ops.dtype_name(array) in ("float16", "bfloat16", "float32", "float64"):
            try:
                ops.require_finite(ops.widen(array), f"Tensor {name!r}")
            except NonFiniteError as error:
                raise CheckpointError(f"{path}: {error}") from None
    return _assemble(path, arrays, document)
