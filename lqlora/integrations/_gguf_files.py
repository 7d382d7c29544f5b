"""GGUF files that are written: a model with the settings and the vocabulary of another file, and an adapter of low-rank factors."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lqlora._files import replace_folder
from lqlora._messages import about_file, shortened, shown
from lqlora._optional import require
from lqlora._patterns import list_names
from lqlora._progress import reported
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._gguf_models import COMPUTED, open_headers, permuted, read_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from lqlora.checkpoint import StoredMatrix
    from lqlora.integrations._gguf_models import Llama
    from lqlora.integrations._model_folders import ModelParts, Origin

__all__ = ["ADAPTER_FILE", "MODEL_FILE", "Encoded", "write_gguf"]

#: Files of a folder.
MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"

#: Settings that say how a file is stored.
_OF_THE_FILE = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization_version")


class Encoded(NamedTuple):
    """Tensor of a GGUF file.

    Parameters
    ----------
    kind : str
        Name of its type, such as ``"F16"``.
    shape : tuple of int
        Lengths from the outermost dimension to the innermost.
    load : callable
        Function that returns the bytes, as an array whose first axis has the rows.
    """

    kind: str
    shape: tuple[int, ...]
    load: Callable[[], npt.NDArray[Any]]


def write_gguf(
    parts: ModelParts,
    origins: Mapping[str, Origin],
    target: Path,
    like: Path,
    encode: Callable[[StoredMatrix, str], Encoded],
    *,
    factors: Mapping[str, StoredMatrix],
    copies_tables: bool,
    title: str,
    progress: Any,
) -> dict[str, int]:
    """Write a folder with a GGUF file of a model, and one of its low-rank factors. It appears when it is complete.

    Parameters
    ----------
    parts : ModelParts
        Matrices and tensors of a checkpoint.
    origins : mapping of str to Origin
        Matrices by tensor of the dense model.
    target : Path
        Folder to write, which must not exist or be empty.
    like : Path
        GGUF file of the dense model, whose settings and vocabulary are taken.
    encode : callable
        Function of a matrix and its name that returns the tensor for it.
    factors : mapping of str to StoredMatrix
        Matrices whose factors are written as an adapter.
    copies_tables : bool
        Whether matrices that are not quantized here keep the few bits that ``like`` has for the same numbers. llama.cpp then rounds
        their inputs, too.
    title : str
        Title of the bar.
    progress : bool or callable
        See :func:`lqlora.cost_table`.

    Returns
    -------
    dict of str to int
        Bytes of each file.

    Raises
    ------
    CheckpointError
        If ``like`` cannot be read, or the folder cannot be written or is not empty.
    InvalidArgumentError
        If ``like`` is a file of another model.
    """
    gguf = require("gguf", "demo", "Writing GGUF files")
    model = open_headers(like)
    held = {own.matrices[0]: name for name, own in origins.items()}
    tensors = _tensors(parts, held, model, encode, copies_tables=copies_tables)

    def check() -> None:
        """Raise unless the folder is free."""
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(shortened(f"{target} is not an empty folder. Name another one."))

    total = len(tensors) + 2 * len(factors)
    with replace_folder(target, check) as beside, reported(progress, title, total, "tensor") as report:
        done = 0

        def counted(encoded: Iterable[tuple[str, Encoded]]) -> Iterable[tuple[str, Encoded]]:
            """Yield tensors, and report how many were written."""
            nonlocal done
            for name, own in encoded:
                yield name, own
                done += 1
                report(done)

        writer = gguf.GGUFWriter(beside / MODEL_FILE, "llama")
        _copy_settings(gguf, writer, model)
        _write(gguf, writer, tensors, counted)
        if factors:
            writer = gguf.GGUFWriter(beside / ADAPTER_FILE, "llama")
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            # llama.cpp multiplies by alpha / rank; by 1 if alpha is 0. The scaling of a matrix is in its factors.
            writer.add_float32("adapter.lora.alpha", 0.0)
            _write(gguf, writer, _factors_of(factors, model), counted)
        return {own.name: own.stat().st_size for own in sorted(beside.iterdir(), reverse=True)}


def _tensors(
    parts: ModelParts,
    held: Mapping[str, str],
    model: Llama,
    encode: Callable[[StoredMatrix, str], Encoded],
    *,
    copies_tables: bool,
) -> dict[str, Encoded]:
    """Return the tensors of the new file by their names in it, in the order of the other one."""
    found: dict[str, Encoded] = {}
    missing, loaders = [], model.loaders()
    for own, name in model.names.items():
        matrix, heads = own.removesuffix(".weight"), model.settings.heads_of(name)
        if matrix in held and held[matrix] == own:
            encoded = encode(parts.matrix(matrix), matrix)
        elif own in parts.tensors:
            copied = _as_in(model, own, loaders[own], parts.tensor(own)) if copies_tables else None
            encoded = copied or _stored(parts, own)
        elif own in COMPUTED:
            encoded = Encoded("F32", model.tensors[name][1].shape, loaders[own])
        else:
            missing.append(own)
            continue
        if encoded.shape != (shape := model.tensors[name][1].shape):
            raise InvalidArgumentError(
                shortened(
                    f"like must be a file of the same model, but {shown(own)} has shape {shape} in it, not {encoded.shape}."
                )
            )
        found[name] = encoded._replace(load=_in_order(encoded.load, heads)) if heads else encoded
    unknown = [own for own in (*held.values(), *parts.tensors) if own not in model.names]
    if missing or unknown:
        what = f"it has {list_names(missing)} besides" if missing else f"it lacks {list_names(unknown)}"
        raise InvalidArgumentError(shortened(f"like must be a file of the same model, but {what}."))
    return found


def _in_order(load: Callable[[], npt.NDArray[Any]], heads: int) -> Callable[[], npt.NDArray[Any]]:
    return lambda: permuted(load(), heads)


def _as_in(model: Llama, name: str, load: Callable[[], npt.NDArray[Any]], tensor: npt.NDArray[Any]) -> Encoded | None:
    """Return a matrix as the other file stores it, if that stands for the same numbers: a model in few bits has such embeddings."""
    file, place = model.tensors[model.names[name]]
    if len(place.shape) != 2 or place.shape != tensor.shape:
        return None
    if not np.array_equal(load(), tensor.astype(np.float32)):
        return None
    heads = model.settings.heads_of(model.names[name])
    kind = require("gguf", "demo", "Writing GGUF files").GGMLQuantizationType(place.kind).name
    return Encoded(kind, place.shape, lambda: read_blocks(file, model.names[name], heads))


def _stored(parts: ModelParts, name: str) -> Encoded:
    """Return a tensor that is not quantized."""
    tensor = parts.tensor(name)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if tensor.dtype.name not in kinds:
        raise CheckpointError(
            shortened(f"{shown(name)} of the checkpoint must have floating-point numbers, got {tensor.dtype}.")
        )
    if tensor.ndim == 1:  # llama.cpp reads norms and biases in this dtype alone
        return Encoded("F32", tensor.shape, lambda: parts.tensor(name).astype(np.float32))
    return Encoded(kinds[tensor.dtype.name], tensor.shape, lambda: parts.tensor(name))


def _copy_settings(gguf: Any, writer: Any, model: Llama) -> None:
    """Give a new file the settings and the vocabulary of another one."""
    array = gguf.GGUFValueType.ARRAY
    try:
        for key, field in gguf.GGUFReader(model.path).fields.items():
            value = field.contents()
            if key.startswith(_OF_THE_FILE) or (field.types[0] == array and not value):  # the writer has no empty lists
                continue
            writer.add_key_value(key, value, field.types[0], field.types[-1] if field.types[0] == array else None)
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise CheckpointError(about_file(model.path, f"has settings that gguf does not read: {error}.")) from error
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _factors_of(factors: Mapping[str, StoredMatrix], model: Llama) -> dict[str, Encoded]:
    """Return low-rank factors as llama.cpp reads them."""
    found = {}
    for matrix, own in factors.items():
        name = model.names[f"{matrix}.weight"]
        heads = model.settings.heads_of(name)
        lora_A = np.asarray(own.lora_A).astype(np.float32)
        lora_B = permuted(np.asarray(own.lora_B).astype(np.float32) * np.float32(own.scaling), heads)
        found[f"{name}.lora_a"] = Encoded("F32", lora_A.shape, lambda lora_A=lora_A: lora_A)  # type: ignore[misc]
        found[f"{name}.lora_b"] = Encoded("F32", lora_B.shape, lambda lora_B=lora_B: lora_B)  # type: ignore[misc]
    return found


def _write(
    gguf: Any,
    writer: Any,
    tensors: Mapping[str, Encoded],
    counted: Callable[[Iterable[tuple[str, Encoded]]], Iterable[tuple[str, Encoded]]],
) -> None:
    """Write a file, one tensor in memory at a time."""
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    for name, own in tensors.items():
        kind = gguf.GGMLQuantizationType[own.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(own.shape)) // block * size
        writer.add_tensor_info(name, own.shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, own in counted(tensors.items()):
        writer.write_tensor_data(np.ascontiguousarray(own.load()).reshape(-1).view(np.uint8))
    writer.close()
