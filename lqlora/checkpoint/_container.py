"""Safetensors files with one JSON document in their metadata, and a fingerprint of both."""

from __future__ import annotations

import hashlib
import json
import mmap
from typing import TYPE_CHECKING, Any

import ml_dtypes  # teaches NumPy the bfloat16 that safetensors reads and writes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lqlora import ops
from lqlora._files import input_file, replace_file
from lqlora._messages import shortened, shown
from lqlora.errors import CheckpointError, LQLoRAError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lqlora._documents import Reader

__all__ = ["digest", "read_container", "read_document", "take_tensors", "write_container"]

#: What transformers 4 asks for: the tensors are laid out as those of torch.
_FORMAT = {"format": "pt"}

#: Dtypes of NumPy by their names in safetensors files.
_DTYPES = {
    "BOOL": np.bool_,
    **{f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
    "C64": np.complex64,
}


def digest(arrays: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the fingerprint of all tensors and of the JSON document, without the fingerprint that it may hold.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        Tensors by name, in row-major order.
    document : mapping
        JSON values.

    Returns
    -------
    str
        SHA-256 in hexadecimal digits.
    """
    # SHA-256 of one JSON text, then of the bytes of all tensors in row-major order. The text has sorted keys and no end
    # but its last bracket, and dtypes and shapes in it give the length of every tensor. So the hashed bytes can be split
    # in one way only: no byte can move between a name and a tensor, or between two tensors, and leave the hash the same.
    described = {key: value for key, value in document.items() if key != "sha256"}
    dtypes = {dtype: str(dtype) for dtype in {array.dtype for array in arrays.values()}}
    tensors = [(name, dtypes[arrays[name].dtype], arrays[name].shape) for name in sorted(arrays)]
    total = hashlib.sha256(json.dumps([described, tensors], sort_keys=True, allow_nan=False).encode())
    for name, _, _ in tensors:
        total.update(arrays[name].reshape(-1).view(np.uint8))
    return total.hexdigest()


def write_container(path: str | os.PathLike[str], arrays: dict[str, Any], key: str, header: str) -> None:
    """Write tensors and a document to one file, atomically.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    arrays : dict of str to ndarray
        Tensors by name, in row-major order.
    key : str
        Key of the document in the metadata of the file.
    header : str
        The document as JSON.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    """
    with replace_file(path, SafetensorError) as beside:
        save_file(arrays, beside, metadata={**_FORMAT, key: header})
        _sort_metadata(beside)


def _sort_metadata(path: Path) -> None:
    """Move the key ``format`` to the front: safetensors writes keys in an order that differs from run to run."""
    begin, entry = b'{"__metadata__":{', b'"format":"pt"'
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        if header.startswith(begin + entry):
            return
        # Quotes inside of a text are escaped, so that the entry is found where it is one.
        first, second = header[len(begin) :].split(b"," + entry, 1)
        file.seek(8)
        file.write(begin + entry + b"," + first + second)


def read_container(
    path: str | os.PathLike[str], key: str | None, writer: str, *, mapped: bool = False
) -> tuple[dict[str, Any], str]:
    """Return the tensors of a file, and the text of its document, which is not checked.

    Parameters
    ----------
    path : path-like
        File to read.
    key : str, optional
        Key of the document in the metadata of the file; None for a file without one.
    writer : str
        Function that writes such files, for the error if there is no document.
    mapped : bool, default False
        Map the file into memory instead of reading it. What is written to such arrays is not written to the file.

    Returns
    -------
    (dict of str to ndarray, str)
        Tensors by name, and JSON.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, or without the key.
    """
    own = input_file(path, CheckpointError)
    try:
        with safe_open(own, framework="numpy") as file:
            text = "" if key is None else (file.metadata() or {}).get(key)
            arrays = {} if mapped else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if mapped:
            arrays = _mapped(own)
    # safetensors raises AttributeError and TypeError for a dtype that NumPy does not have, and NumPy ValueError for more
    # than 64 dimensions.
    except (AttributeError, OSError, SafetensorError, TypeError, ValueError) as error:
        hint = "Is it truncated, or a git-lfs pointer?"
        raise CheckpointError(shortened(f"{path} is not a readable safetensors file ({error}). {hint}")) from error
    if text is None:
        raise CheckpointError(
            shortened(f"{path} is a safetensors file that {writer} did not write: it has no {key!r} metadata.")
        )
    return arrays, text


def _mapped(path: Path) -> dict[str, Any]:
    """Return the tensors of a file that safetensors has checked, as views of its pages."""
    with path.open("rb") as file:
        # Copy on write: arrays that nobody may write to would not become tensors of torch.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(pages[:8], "little")
    arrays: dict[str, Any] = {}
    for name, own in json.loads(pages[8:start]).items():
        if name != "__metadata__":
            if own["dtype"] not in _DTYPES:
                raise TypeError(f"NumPy has no dtype {own['dtype']}")
            begin, end = own["data_offsets"]
            flat = np.frombuffer(pages, np.uint8, end - begin, start + begin) if end > begin else np.empty(0, np.uint8)
            array = flat.view(_DTYPES[own["dtype"]]).reshape(own["shape"])
            # Files of other writers may begin numbers anywhere, and kernels read whole numbers.
            arrays[name] = array if array.flags.aligned else array.copy()
    return arrays


def read_document(
    path: str | os.PathLike[str], key: str, writer: str, spec: int, content_type: type[Any]
) -> tuple[dict[str, Any], Any, Reader]:
    """Return the tensors and the document of a file whose fingerprint is compared.

    Parameters
    ----------
    path : path-like
        File to read.
    key : str
        Key of the document in the metadata of the file.
    writer : str
        Function that writes such files, for errors.
    spec : int
        The version of the document that is read.
    content_type : type
        Schema of the document, with ``metadata`` and ``sha256``.

    Returns
    -------
    (dict of str to ndarray, content, Reader)
        Tensors by name, the document, and the reader that words further errors.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of another version, or was changed after it was written.
    """
    from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import Version  # noqa: PLC0415

    arrays, text = read_container(path, key, writer)
    reader = Reader(f"{path} is damaged or inconsistent", CheckpointError)
    plain = reader.parse(text)
    if (found := reader.convert(plain, Version).spec) != spec:
        raise reader.fault("spec", f"must be {spec}, which this lqlora reads, got {shown(found)}.")
    content = reader.convert(plain, content_type)
    reader.check_depth(content.metadata, "metadata")
    try:
        same = digest(arrays, plain) == content.sha256
    except (RecursionError, ValueError):  # the document holds infinity, which JSON does not have
        same = False
    if not same:
        raise reader.fault("sha256", "must be the fingerprint of the content, which was changed after it was written.")
    return arrays, content, reader


def take_tensors(
    arrays: dict[str, Any], keys: Mapping[str, Sequence[str]], section: str, reader: Reader
) -> dict[str, dict[str, Any]]:
    """Return the tensors of each layer that a document describes, checked.

    Parameters
    ----------
    arrays : dict of str to ndarray
        Tensors of the file. All of them are taken out.
    keys : mapping of str to sequence of str
        Keys of the tensors of each layer: the tensor ``key`` of the layer ``m`` is ``m.key``.
    section : str
        Part of the document that describes the layers, for errors.
    reader : Reader
        Reader of the document.

    Returns
    -------
    dict of str to dict of str to ndarray
        Tensors by layer and key.

    Raises
    ------
    LQLoRAError
        The error of the reader, if a tensor is missing, left over or not finite, or low-rank factors do not fit.
    """
    from lqlora._documents import key_step  # noqa: PLC0415 - imports msgspec

    found: dict[str, dict[str, Any]] = {}
    for name, wanted in keys.items():
        place = f"{section}{key_step(name)}"
        try:
            found[name] = own = {key: arrays.pop(f"{name}.{key}") for key in wanted}
        except KeyError as error:
            raise reader.fault(place, f"is described, but {shown(error.args[0])} is missing.") from None
        if "lora_A" in own:
            inner, outer = own["lora_A"], own["lora_B"]
            if inner.ndim != 2 or outer.shape[1:] != inner.shape[:1]:
                raise reader.fault(
                    place, f"must have factors of shapes (rank, n) and (m, rank), got {inner.shape} and {outer.shape}."
                )
        try:
            for key, array in own.items():
                ops.require_finite(ops.widen(array, f"its {key}"), f"its {key}")
        except LQLoRAError as error:
            raise reader.fault(place, f": {error}") from None
    if arrays:
        raise reader.fault(section, f"must describe all tensors, but {shown(next(iter(arrays)))} is of none of them.")
    return found
