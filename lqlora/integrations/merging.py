"""Dense models from checkpoints: the sum of both parts of each matrix in 16 or 32 bits, file by file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lqlora._annotations import annotated
from lqlora._documents import Reader, Text
from lqlora._files import replace_file, replace_folder
from lqlora._messages import shortened, shown
from lqlora._options import require_choice, require_integer
from lqlora._progress import reported
from lqlora.checkpoint.file import read_file
from lqlora.checkpoint.folder import DOCUMENT, INDEX, read_document_of
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._streaming_folder import small_files
from lqlora.quantized import dequantize

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from lqlora._typing import FloatName
    from lqlora.checkpoint import Checkpoint, StoredMatrix

__all__ = ["merge_checkpoint"]

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class _Origin(Struct, frozen=True):
    """Matrices that a tensor of a dense model holds."""

    matrices: list[Text]
    is_transposed: bool = False
    is_stack: bool = False


@annotated
def merge_checkpoint(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: FloatName = "bfloat16",
    shard_bytes: int = 2**32,
    progress: bool | Callable[[int, int], None] = True,
) -> dict[str, int]:
    """Write the dense model of a checkpoint: ``dequantize(Q) + scaling * lora_B @ lora_A`` in place of each matrix.

    Programs that know nothing of this library open the result: transformers, converters to GGUF, serving engines. It has the accuracy of
    the checkpoint, but for the rounding to ``dtype``, and the size of the original model.

    Parameters
    ----------
    path : path-like
        Folder of :func:`lqlora.decompose_checkpoint`, whose names and orientations are restored. Or a file of :func:`lqlora.save`: then a
        matrix ``m`` becomes a tensor ``m.weight`` of shape (outputs, inputs).
    folder : path-like
        Folder to write, which must not exist or be empty. It appears when it is complete.
    dtype : {"bfloat16", "float16", "float32"}
        Dtype of the matrices. Other tensors keep theirs.
    shard_bytes : int
        Largest number of bytes of tensors of one file; one file is in memory while it is written.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts tensors.

    Returns
    -------
    dict of str to int
        Bytes of each file with tensors.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, or the folder cannot be written or is not empty.
    InvalidArgumentError
        If ``dtype`` cannot hold a matrix: float16 ends at 65504.

    Examples
    --------
    >>> import numpy as np, lqlora as lq, tempfile
    >>> w = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    >>> d = lq.decompose(w, lq.BlockFormat.parse("nf3/64:u8/256:float32"), rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lq.save(f"{folder}/small.safetensors", {"up": d})
    ...     sizes = merge_checkpoint(f"{folder}/small.safetensors", f"{folder}/dense")
    >>> sizes["model.safetensors"] > 2 * w.size
    True
    """
    require_choice(dtype, "dtype", tuple(_DTYPES))
    require_integer(shard_bytes, "shard_bytes", 1)
    own, target = Path(path).absolute(), Path(folder).absolute()
    parts, origins = _parts_of(own)
    groups = _groups(own, parts, origins, np.dtype(_DTYPES[dtype]).itemsize, int(shard_bytes))
    total = sum(map(len, groups))

    def check() -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(shortened(f"{target} is not an empty folder. Name another one."))

    with replace_folder(target, check) as beside, reported(progress, "Merging", total, "tensor") as report:
        places: dict[str, str] = {}
        done = 0
        for number, names in enumerate(groups, start=1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = _tensor(own, parts, origins, name, dtype)
                done += 1
                report(done)
            with replace_file(beside / file, SafetensorError) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        if len(groups) > 1:
            size = sum(own.stat().st_size for own in beside.iterdir())
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2, sort_keys=True)
            (beside / INDEX).write_text(f"{text}\n", encoding="utf-8")
        _copy_small_files(own, beside)
        return {name: (beside / name).stat().st_size for name in dict.fromkeys(places.values())}


class _Part:
    """Files of a checkpoint, of which one is open at a time, and the file of each matrix and tensor."""

    def __init__(self, files: list[Path]) -> None:
        self._open: tuple[Path, Checkpoint] | None = None
        self.matrices: dict[str, Path] = {}
        self.tensors: dict[str, Path] = {}
        for file in files:
            content = self._read(file)
            for found, names in ((self.matrices, content.matrices), (self.tensors, content.tensors)):
                if twice := next((name for name in names if name in found), None):
                    raise CheckpointError(shortened(f"{file} has {shown(twice)}, which another file has, too."))
                found.update(dict.fromkeys(names, file))

    def _read(self, file: Path) -> Checkpoint:
        if self._open is None or self._open[0] != file:
            self._open = None  # its pages are no longer mapped while the next file is read
            self._open = file, read_file(file, mapped=True)[0]
        return self._open[1]

    def matrix(self, name: str) -> StoredMatrix:
        """Return a matrix."""
        return self._read(self.matrices[name]).matrices[name]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor that is not quantized."""
        found: npt.NDArray[Any] = self._read(self.tensors[name]).tensors[name]
        return found


def _parts_of(path: Path) -> tuple[_Part, dict[str, _Origin]]:
    """Return the files of a checkpoint, and how the dense model holds its matrices."""
    if not (path / DOCUMENT).exists():
        parts = _Part([path])
        return parts, {f"{name}.weight": _Origin([name]) for name in parts.matrices}
    document = read_document_of(path)
    parts = _Part([path / name for name in document.shards])
    reader = Reader(f"{path / DOCUMENT} is damaged or inconsistent", CheckpointError)
    origins = reader.convert(document.metadata.get("tensors", {}), dict[Text, _Origin], "metadata.tensors")
    held = {name for own in origins.values() for name in own.matrices}
    if unknown := next((name for name in held if name not in parts.matrices), None):
        raise reader.fault("metadata.tensors", f"must name matrices of the checkpoint, got {shown(unknown)}.")
    return parts, {**origins, **{f"{name}.weight": _Origin([name]) for name in parts.matrices if name not in held}}


def _groups(path: Path, parts: _Part, origins: Mapping[str, _Origin], itemsize: int, most: int) -> list[list[str]]:
    """Return the names of the tensors of each file, in the order of the checkpoint."""
    if twice := next((name for name in origins if name in parts.tensors), None):
        raise CheckpointError(shortened(f"{path} has both a matrix and a tensor for {shown(twice)}."))
    first = {own.matrices[0]: name for name, own in origins.items() if own.matrices}
    sizes: dict[str, int] = {}
    for file in dict.fromkeys([*parts.matrices.values(), *parts.tensors.values()]):
        for matrix in (name for name, place in parts.matrices.items() if place == file and name in first):
            own = origins[first[matrix]]
            sizes[first[matrix]] = itemsize * math.prod(parts.matrix(matrix).quantized.shape) * len(own.matrices)
        for name in (name for name, place in parts.tensors.items() if place == file):
            sizes[name] = parts.tensor(name).nbytes
    groups: list[list[str]] = []
    size = 0
    for name, own_size in sizes.items():
        if not groups or size + own_size > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own_size
    return groups


def _tensor(path: Path, parts: _Part, origins: Mapping[str, _Origin], name: str, dtype: str) -> npt.NDArray[Any]:
    """Return a tensor of the dense model."""
    if name not in origins:
        return np.array(parts.tensor(name), order="C")  # a copy, whose file need not stay open
    own = origins[name]
    dense = [_dense(parts.matrix(matrix), matrix, dtype) for matrix in own.matrices]
    if own.is_transposed:
        dense = [matrix.T for matrix in dense]
    if not own.is_stack:
        return np.ascontiguousarray(dense[0])
    if len({matrix.shape for matrix in dense}) > 1:
        raise CheckpointError(shortened(f"{path} has matrices of several shapes in {shown(name)}."))
    return np.stack(dense)


def _dense(matrix: StoredMatrix, name: str, dtype: str) -> npt.NDArray[Any]:
    """Return the sum of both parts of a matrix."""
    lora_B, lora_A = (np.asarray(own).astype(np.float32) for own in (matrix.lora_B, matrix.lora_A))
    found = np.asarray(dequantize(matrix.quantized)) + np.float32(matrix.scaling) * (lora_B @ lora_A)
    with np.errstate(over="ignore"):
        rounded: npt.NDArray[Any] = found.astype(_DTYPES[dtype])
    if not np.isfinite(rounded).all():
        raise InvalidArgumentError(
            f"dtype must hold the values of {shown(name)}, which {dtype} does not. Use bfloat16 or float32."
        )
    return rounded


def _copy_small_files(path: Path, folder: Path) -> None:
    """Copy configuration and tokenizer, without the mark of quantized weights."""
    for file in small_files(path):
        data = file.read_bytes()
        if file.name == "config.json":
            try:
                config = json.loads(data)
                config.pop("quantization_config", None)
            except (AttributeError, RecursionError, TypeError, ValueError) as error:
                raise CheckpointError(shortened(f"{file} is not a configuration of transformers: {error}.")) from error
            data = f"{json.dumps(config, indent=2)}\n".encode()
        (folder / file.name).write_bytes(data)
