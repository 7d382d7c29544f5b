"""Checkpoints of several files: a folder of shards, each a checkpoint of its own, and a JSON document that names them.

The document ``lqlora.json`` has the fingerprint of each shard, and is written last. So a folder without it is not complete, and one
shard cannot stand for that of another checkpoint. ``model.safetensors.index.json`` lists the tensors of the shards as other programs
expect it; this module does not need it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqlora._annotations import annotated
from lqlora._files import input_file, write_whole
from lqlora._messages import shortened, shown
from lqlora._shared_settings import collection_paused
from lqlora.checkpoint._container import digest
from lqlora.checkpoint.file import KEY, Checkpoint, read_file, read_pretrained, verify_file
from lqlora.errors import CheckpointError, InvalidArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from lqlora._documents import Reader
    from lqlora.checkpoint._schema import FolderContent
    from lqlora.checkpoint.quantization_config import MatrixFormat

__all__ = [
    "DOCUMENT",
    "INDEX",
    "is_checkpoint",
    "load",
    "parts_of",
    "read_document_of",
    "read_part",
    "verify",
    "write_document",
]

#: Version of the JSON document. A reader refuses every other one.
_SPEC = 1

#: Names of the document, and of the index for other programs.
DOCUMENT, INDEX = "lqlora.json", "model.safetensors.index.json"

_MOST_BYTES = 2**28
_CONFIG = "config.json"


def write_document(
    folder: str | os.PathLike[str], shards: Mapping[str, str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the document of a folder, which makes it a checkpoint.

    Parameters
    ----------
    folder : path-like
        Folder with the shards.
    shards : mapping of str to str
        Fingerprint of each shard by the name of its file.
    metadata : mapping, optional
        JSON values to store.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    InvalidArgumentError
        If the metadata is not JSON.
    """
    from lqlora._documents import Reader, json_values  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import FolderContent  # noqa: PLC0415

    document: dict[str, Any] = {
        "spec": _SPEC,
        "shards": dict(shards),
        "metadata": json_values(metadata or {}, "metadata", InvalidArgumentError),
    }
    document["sha256"] = digest({}, document)
    text = Reader("metadata must be such that they can be read again", InvalidArgumentError).write(
        document, FolderContent
    )
    write_whole(Path(folder) / DOCUMENT, f"{text}\n".encode())


def read_document_of(folder: str | os.PathLike[str]) -> FolderContent:
    """Read the document of a folder, and compare its fingerprint. The shards are not looked at.

    Parameters
    ----------
    folder : path-like
        Folder of a checkpoint.

    Returns
    -------
    FolderContent
        Fingerprints of the shards, and metadata.

    Raises
    ------
    CheckpointError
        If there is no document, or it is damaged or was changed.
    """
    from lqlora.checkpoint._schema import FolderContent, Version  # noqa: PLC0415 - imports msgspec

    path = Path(folder) / DOCUMENT
    reader = _reader(path)
    try:
        own = input_file(path, CheckpointError, is_optional=True)
        if not own.exists():
            raise CheckpointError(
                shortened(f"{folder} is not a complete checkpoint: it has no {DOCUMENT}, which is written last.")
            )
        if own.stat().st_size > _MOST_BYTES:
            raise reader.fault("", f"must be a file of at most {_MOST_BYTES} bytes.")
        plain = reader.parse(own.read_bytes())
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{path} cannot be read: {error}.")) from error
    if (spec := reader.convert(plain, Version).spec) != _SPEC:
        raise reader.fault("spec", f"must be {_SPEC}, which this lqlora reads, got {shown(spec)}.")
    content = reader.convert(plain, FolderContent)
    reader.check_depth(content.metadata, "metadata")
    try:
        same = digest({}, plain) == content.sha256
    except (RecursionError, ValueError):  # the document holds infinity, which JSON does not have
        same = False
    if not same:
        raise reader.fault("sha256", "must be the fingerprint of the document, which was changed after it was written.")
    for name in content.shards:
        # A path would let a document read files elsewhere.
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise reader.fault("shards", f"must name .safetensors files of the folder, got {shown(name)}.")
    return content


def _reader(path: Path) -> Reader:
    from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec

    return Reader(f"{path} is damaged or inconsistent", CheckpointError)


def _described(folder: Path) -> dict[str, MatrixFormat] | None:
    """Return the matrices of a folder that ``save_pretrained`` of transformers wrote, or None if it is another one."""
    from lqlora.checkpoint.quantization_config import METHOD, read_matrices  # noqa: PLC0415 - imports msgspec

    path = folder / _CONFIG
    try:
        own = input_file(path, CheckpointError, is_optional=True)
        plain = _reader(path).parse(own.read_bytes()) if own.exists() and own.stat().st_size <= _MOST_BYTES else None
    except OSError:  # CheckpointError is one
        return None
    config = plain.get("quantization_config") if isinstance(plain, dict) else None
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        return None
    return read_matrices(config, str(path))


def parts_of(path: Path) -> list[Path]:
    """Return the parts of a checkpoint that hold matrices whole, each for :func:`read_part`.

    Parameters
    ----------
    path : Path
        File or folder.

    Returns
    -------
    list of Path
        The shards of a folder with a document. Otherwise the path itself: files that ``save_pretrained`` of transformers writes may
        have a matrix in two of them.

    Raises
    ------
    CheckpointError
        If the path is a folder, and no checkpoint.
    """
    if not path.is_dir() or (not (path / DOCUMENT).exists() and _described(path) is not None):
        return [path]
    return [path / name for name in read_document_of(path).shards]


def read_part(path: Path) -> Checkpoint:
    """Return the content of a part of a checkpoint, mapped into memory.

    Parameters
    ----------
    path : Path
        One of the results of :func:`parts_of`.

    Returns
    -------
    Checkpoint
        Matrices and other tensors.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or inconsistent.
    """
    return load(path, mapped=True) if path.is_dir() else read_file(path, mapped=True)[0]


def _pretrained_files(folder: Path) -> list[Path]:
    """Return the files that ``save_pretrained`` of transformers wrote."""
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    reader = _reader(index)
    listed = reader.convert(reader.parse(index.read_bytes()), dict[str, Any]).get("weight_map")
    names = [*dict.fromkeys(map(str, listed.values()))] if isinstance(listed, dict) else []
    for name in names or [""]:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise reader.fault("weight_map", f"must name .safetensors files of the folder, got {shown(name)}.")
    return [folder / name for name in names]


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a file of :func:`lqlora.save`, or a folder with the document of a checkpoint.

    Parameters
    ----------
    path : path-like
        Any path.

    Returns
    -------
    bool
        False for other files, and for what cannot be read.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as in verify

    try:
        if Path(path).is_dir():
            return (Path(path) / DOCUMENT).exists() or _described(Path(path)) is not None
        own = input_file(path, CheckpointError)
        with safe_open(own, framework="numpy") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError, TypeError, ValueError):
        return False


@annotated
@collection_paused()
def load(path: str | os.PathLike[str], *, mapped: bool = False) -> Checkpoint:
    """Read a checkpoint, and check every length, dtype and code before anything is decoded.

    Fingerprints of data are not compared: :func:`verify` does that.

    Parameters
    ----------
    path : path-like
        File written by :func:`save`, or folder written by :func:`decompose_checkpoint` or, of a quantized model, by ``save_pretrained``
        of transformers.
    mapped : bool, default False
        Map files into memory instead of reading them. Then the operating system reads pages when they are used, and drops
        them when memory is short. Do not change a file while arrays of it are in use; writers of this library replace it.

    Returns
    -------
    Checkpoint
        NumPy arrays, bit for bit those that were saved.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, not a checkpoint of this library, or contradicts itself. Also if a folder is not complete.
    """
    return _read(path, lambda file: read_file(file, mapped=mapped), mapped=mapped)


@annotated
@collection_paused()
def verify(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint as :func:`load` does, compare its fingerprints, and check that all numbers are finite.

    Parameters
    ----------
    path : path-like
        File written by :func:`save`, or folder written by :func:`decompose_checkpoint`. All of it is read into memory. A folder of
        ``save_pretrained`` of transformers has no fingerprints: it is read as :func:`load` does.

    Returns
    -------
    Checkpoint
        NumPy arrays, bit for bit those that were saved.

    Raises
    ------
    CheckpointError
        If :func:`load` would raise, a byte of the data has changed, a number is NaN or infinite, or the index of a folder does not
        list its tensors.
    """
    content = _read(path, verify_file)
    if _is_folder(path) and (Path(path) / DOCUMENT).exists():
        _check_index(Path(path))
        _check_config(Path(path), content)
    return content


def _is_folder(path: str | os.PathLike[str]) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, TypeError, ValueError):  # no path, or one that is too long, which the reader of files will say
        return False


def _read(
    path: str | os.PathLike[str],
    read: Callable[[str | os.PathLike[str]], tuple[Checkpoint, str]],
    *,
    mapped: bool = False,
) -> Checkpoint:
    """Read a file, or all shards of a folder."""
    if not _is_folder(path):
        return read(path)[0]
    folder = Path(path)
    if not (folder / DOCUMENT).exists() and (matrices := _described(folder)) is not None:
        return read_pretrained(folder, _pretrained_files(folder), matrices, mapped=mapped)
    document = read_document_of(folder)
    content = Checkpoint({}, {}, document.metadata)
    for name, fingerprint in document.shards.items():
        shard, found = read(folder / name)
        if found != fingerprint:
            raise CheckpointError(
                shortened(f"{folder / name} is not the file that {DOCUMENT} lists: its fingerprint is another one.")
            )
        # A matrix and a tensor may have one name: their entries in the files differ.
        for whole, part in ((content.matrices, shard.matrices), (content.tensors, shard.tensors)):
            if twice := next((key for key in part if key in whole), None):
                raise CheckpointError(
                    shortened(f"{folder} has {shown(twice)} in two files. Keep the files of one checkpoint in it.")
                )
            whole.update(part)
    return content


def _check_config(folder: Path, content: Checkpoint) -> None:
    """Raise if the configuration for transformers describes other matrices than the shards have: it would load other numbers."""
    from lqlora.checkpoint.quantization_config import MatrixFormat  # noqa: PLC0415 - imports msgspec

    path = folder / _CONFIG
    try:
        if not isinstance(json.loads(path.read_bytes()), dict):
            return  # a file of another program
    except (OSError, RecursionError, ValueError):
        return
    found = _described(folder)
    rows = {
        name: MatrixFormat(own.quantized.format, len(own.lora_A), own.scaling) for name, own in content.matrices.items()
    }
    if found != rows:
        raise CheckpointError(
            shortened(f"{path} describes other matrices in quantization_config than the files of {folder} have.")
        )


def _check_index(folder: Path) -> None:
    """Raise if the index of a folder does not list the tensors of the shards, which other programs would then miss."""
    from safetensors import safe_open  # noqa: PLC0415 - verify_file has read the shards with it

    path = folder / INDEX
    if not path.exists():
        return
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(shortened(f"{path} is not the index of this checkpoint: {error!r}.")) from error
    found: dict[str, str] = {}
    for name in read_document_of(folder).shards:
        with safe_open(folder / name, framework="numpy") as file:
            found |= dict.fromkeys(file.keys(), name)
    if listed != found:
        raise CheckpointError(
            shortened(f"{path} does not list the tensors of this checkpoint. Write the checkpoint again.")
        )
