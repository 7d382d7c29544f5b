"""Matrices of a checkpoint as tensors of a model of other programs: where they are, and how a folder of that model is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lqlora._documents import Reader, Text, key_step
from lqlora._files import replace_file, replace_folder
from lqlora._messages import shortened, shown
from lqlora._progress import reported
from lqlora.checkpoint.folder import DOCUMENT, INDEX, parts_of, read_document_of, read_part
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._streaming_folder import small_files
from lqlora.integrations._streaming_tasks import DTYPES, Piece, in_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from lqlora._typing import FloatName
    from lqlora.checkpoint import Checkpoint, StoredMatrix

__all__ = ["ModelParts", "Origin", "join", "open_parts", "rounded", "write_model"]


class Origin(Struct, frozen=True):
    """Matrices that a tensor of a dense model holds."""

    matrices: list[Text]
    is_transposed: bool = False
    is_stack: bool = False


class ModelParts:
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
            self._open = file, read_part(file)
        return self._open[1]

    def matrix(self, name: str) -> StoredMatrix:
        """Return a matrix."""
        return self._read(self.matrices[name]).matrices[name]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor that is not quantized."""
        found: npt.NDArray[Any] = self._read(self.tensors[name]).tensors[name]
        return found


def open_parts(path: Path) -> tuple[ModelParts, dict[str, Origin]]:
    """Return the files of a checkpoint, and how the dense model holds its matrices, by the name of the tensor.

    Parameters
    ----------
    path : Path
        Checkpoint, a file or a folder.

    Returns
    -------
    (ModelParts, dict of str to Origin)
        Each matrix is in one of the tensors.

    Raises
    ------
    CheckpointError
        If a file cannot be read, the path is one of several shards, or the document does not fit the matrices.
    """
    if not path.is_dir():
        if (path.parent / DOCUMENT).exists() and path.name in read_document_of(path.parent).shards:
            raise CheckpointError(shortened(f"{path} is a part of the checkpoint {path.parent}. Name the folder."))
        parts = ModelParts([path])
        return parts, {f"{name}.weight": Origin([name]) for name in parts.matrices}
    parts = ModelParts(parts_of(path))
    if not (path / DOCUMENT).exists():  # save_pretrained of transformers wrote it
        return parts, {f"{name}.weight": Origin([name]) for name in parts.matrices}
    reader = Reader(f"{path / DOCUMENT} is damaged or inconsistent", CheckpointError)
    place = "metadata.tensors"
    origins = reader.convert(read_document_of(path).metadata.get("tensors", {}), dict[Text, Origin], place)
    held = [name for own in origins.values() for name in own.matrices]
    for name, own in origins.items():
        if name == "__metadata__" or not own.matrices or (len(own.matrices) > 1 and not own.is_stack):
            raise reader.fault(place + key_step(name), "must name one matrix, or those of an array.")
    if unknown := next((name for name in held if name not in parts.matrices), None):
        raise reader.fault(place, f"must name matrices of the checkpoint, got {shown(unknown)}.")
    usual = {f"{name}.weight": Origin([name]) for name in parts.matrices if name not in held}
    if len({*held}) < len(held) or origins.keys() & usual.keys():
        raise reader.fault(place, "must have each matrix once.")
    return parts, origins | usual


def join(name: str, origin: Origin, dense: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return the tensor that holds matrices of shape (outputs, inputs).

    Parameters
    ----------
    name : str
        Its name, for errors.
    origin : Origin
        How it holds them.
    dense : sequence of ndarray
        The matrices.

    Returns
    -------
    ndarray
        In row-major order.
    """
    turned = [matrix.T for matrix in dense] if origin.is_transposed else list(dense)
    if not origin.is_stack:
        return np.ascontiguousarray(turned[0])
    if len({matrix.shape for matrix in turned}) > 1:
        raise CheckpointError(shortened(f"{shown(name)} must have matrices of one shape."))
    return np.ascontiguousarray(np.stack(turned))


def rounded(dense: npt.NDArray[Any], name: str, dtype: FloatName) -> npt.NDArray[Any]:
    """Return a matrix in another dtype.

    Parameters
    ----------
    dense : ndarray
        The matrix.
    name : str
        Its name, for errors.
    dtype : {"float32", "float16", "bfloat16"}
        The dtype.

    Returns
    -------
    ndarray
        Finite numbers.

    Raises
    ------
    InvalidArgumentError
        If the dtype cannot hold an entry.
    """
    with np.errstate(over="ignore"):
        found: npt.NDArray[Any] = dense.astype(DTYPES[dtype])
    if not np.isfinite(found).all():
        raise InvalidArgumentError(
            f"dtype must hold the values of {shown(name)}, which {dtype} does not. Use bfloat16 or float32."
        )
    return found


def _entries(
    path: Path, parts: ModelParts, origins: Mapping[str, Origin], size_of: Callable[[StoredMatrix], int]
) -> list[Piece]:
    """Return the tensors of the model in the order of the checkpoint."""
    if twice := next((name for name in origins if name in parts.tensors), None):
        raise CheckpointError(shortened(f"{path} has both a matrix and a tensor for {shown(twice)}."))
    holders = {own.matrices[0]: name for name, own in origins.items() if own.matrices}
    by_file: dict[Path, list[Piece]] = {}
    for matrix, file in parts.matrices.items():
        if matrix in holders:
            own = origins[holders[matrix]]
            by_file.setdefault(file, []).append(
                Piece(holders[matrix], size_of(parts.matrix(matrix)) * len(own.matrices), None)
            )
    for name, file in parts.tensors.items():
        by_file.setdefault(file, []).append(Piece(name, parts.tensor(name).nbytes, None))
    return [entry for own in by_file.values() for entry in own]


def write_model(
    path: Path,
    target: Path,
    title: str,
    make: Callable[[str], Mapping[str, npt.NDArray[Any]]],
    size_of: Callable[[StoredMatrix], int],
    *,
    dtype: FloatName,
    shard_bytes: int,
    quantization_config: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] = lambda _: None,
    progress: Any = True,
) -> dict[str, int]:
    """Write a folder with the tensors that stand for those of a checkpoint. It appears when it is complete.

    Parameters
    ----------
    path : Path
        The checkpoint.
    target : Path
        Folder to write, which must not exist or be empty.
    title : str
        Title of the bar.
    make : callable
        Function of the name of a tensor of the dense model, which returns the tensors that are written for it. It is asked for the
        tensors that hold matrices.
    size_of : callable
        Function of a matrix that returns the bytes of its tensors.
    dtype : {"float32", "float16", "bfloat16"}
        Dtype of the dense model, for ``config.json``.
    shard_bytes : int
        Largest number of bytes of tensors of a file.
    quantization_config : mapping, optional
        Entry of ``config.json``.
    finish : callable
        Writes more into the folder.
    progress : bool or callable
        See :func:`lqlora.cost_table`.

    Returns
    -------
    dict of str to int
        Bytes of each file with tensors.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, or the folder cannot be written or is not empty.
    """
    parts, origins = open_parts(path)
    files = in_files(_entries(path, parts, origins, size_of), shard_bytes)
    if len(files) == 1:
        files = dict(zip(["model.safetensors"], files.values(), strict=True))

    def check() -> None:
        """Raise unless the folder is free."""
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(shortened(f"{target} is not an empty folder. Name another one."))

    total = sum(map(len, files.values()))
    with replace_folder(target, check) as beside, reported(progress, title, total, "tensor") as report:
        places: dict[str, str] = {}
        size = done = 0
        for file, pieces in files.items():
            tensors: dict[str, npt.NDArray[Any]] = {}
            for name in (piece.name for piece in pieces):
                # Copies, whose file need not stay open.
                tensors |= make(name) if name in origins else {name: np.array(parts.tensor(name), order="C")}
                done += 1
                report(done)
            # safetensors writes the memory of an array, whatever its strides are.
            tensors = {name: np.asarray(own, order="C") for name, own in tensors.items()}
            with replace_file(beside / file, SafetensorError) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            size += sum(own.nbytes for own in tensors.values())
        if len(files) > 1:
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2, sort_keys=True)
            (beside / INDEX).write_text(f"{text}\n", encoding="utf-8")
        _copy_small_files(path, beside, quantization_config, dtype)
        finish(beside)
        return {name: (beside / name).stat().st_size for name in dict.fromkeys(places.values())}


def _copy_small_files(
    path: Path, folder: Path, quantization_config: Mapping[str, Any] | None, dtype: FloatName
) -> None:
    """Copy configuration and tokenizer, with another mark of quantized weights or none."""
    if quantization_config is not None:  # a file without a configuration has one, which says how codes are stored
        text = json.dumps({"quantization_config": dict(quantization_config)}, indent=2)
        (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
    for file in small_files(path):
        data = file.read_bytes()
        if file.name == "config.json":
            try:
                config = json.loads(data)
                config.pop("quantization_config", None)
            except (AttributeError, RecursionError, TypeError, ValueError) as error:
                raise CheckpointError(shortened(f"{file} is not a configuration of transformers: {error}.")) from error
            # Programs load a model in the dtype that this says.
            config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
            if quantization_config is not None:
                config["quantization_config"] = dict(quantization_config)
            data = f"{json.dumps(config, indent=2)}\n".encode()
        (folder / file.name).write_bytes(data)
