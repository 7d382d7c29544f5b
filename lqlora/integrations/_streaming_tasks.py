"""Tasks and pieces of a checkpoint: the matrices to decompose, the tensors to copy, and the files that they go to."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from lqlora._messages import given, shown
from lqlora._options import require_integer
from lqlora._patterns import DENSE_BY_NAME, NameIndex, as_patterns, list_names, predicate_of_any, values_by_name
from lqlora.allocation import Plan
from lqlora.checkpoint.file import StoredMatrix, stored_bytes
from lqlora.costs._digests import array_digest, weighting_digest
from lqlora.decomposition import decompose, relative_error
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.formats import BlockFormat, float_bits
from lqlora.quantized.quantization import with_fitted_levels
from lqlora.weighting import AbstractWeighting
from lqlora.weighting.base import loaded_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from lqlora._patterns import Patterns
    from lqlora._typing import FloatName
    from lqlora.integrations.contents import ModelContents, SourceTensor

__all__ = [
    "DTYPES", "Copy", "Finished", "Piece", "Task", "check_strict", "choose_tasks", "decomposed", "in_files", "list_pieces", "loaded_copy",
    "tensor_digest",
]  # fmt: skip

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Task(NamedTuple):
    """Decomposition of one matrix. ``known`` is the digest of the inputs of a result that is stored already."""

    name: str
    load: Callable[[], npt.NDArray[np.float32]]
    shape: tuple[int, int]
    format: BlockFormat
    rank: int
    clipped_from: int | None
    weighting: AbstractWeighting | Callable[[], AbstractWeighting] | None
    known: str | None = None


class Copy(NamedTuple):
    """Comparison of a tensor of the source with the copy that is stored, by its digest."""

    name: str
    tensor: SourceTensor
    known: str


class Piece(NamedTuple):
    """Part of a checkpoint that one file holds whole: a matrix with its factors, or a tensor that is copied."""

    name: str
    nbytes: int
    tensor: SourceTensor | None


class Finished:
    """Result of a task. The matrix is taken out when it is written, because results are kept to the end."""

    def __init__(self, name: str, inputs: str, matrix: StoredMatrix | None, error: float) -> None:
        self.name, self.inputs, self.matrix, self.error = name, inputs, matrix, error


def decomposed(item: Task | Copy, *, options: dict[str, Any], factor_dtype: FloatName) -> Finished | None:
    """Decompose one matrix, or compare what a result was made from with the source."""
    if isinstance(item, Copy):
        if tensor_digest(loaded_copy(item.name, item.tensor)) != item.known:
            raise _changed(item.name)
        return None
    matrix = item.load()
    if matrix.shape != item.shape:
        raise _changed(item.name)
    weighting = loaded_norm(item.weighting, item.name)
    inputs = f"{array_digest(matrix)} {weighting_digest(weighting)}"
    if item.known is not None:
        if item.known != inputs:
            raise _changed(item.name)
        return None
    found = decompose(matrix, item.format, item.rank, weighting=weighting, name=f"weight of {item.name!r}", **options)
    error = found.relative_error
    if factor_dtype != "float32":
        with np.errstate(over="ignore"):
            lora_A, lora_B = (own.astype(DTYPES[factor_dtype]) for own in (found.lora_A, found.lora_B))
        if not (np.isfinite(lora_A).all() and np.isfinite(lora_B).all()):
            raise InvalidArgumentError(
                f"factor_dtype must hold the factors of {shown(item.name)}, which {factor_dtype} does not. Use bfloat16 or float32."
            )
        found = dataclasses.replace(found, lora_A=lora_A, lora_B=lora_B)
        widened = dataclasses.replace(found, lora_A=lora_A.astype(np.float32), lora_B=lora_B.astype(np.float32))
        error = relative_error(matrix, widened, weighting, name=item.name)
    stored = StoredMatrix(found.quantized, found.lora_A, found.lora_B, found.scaling)
    return Finished(item.name, inputs, stored, error)


def _changed(name: str) -> CheckpointError:
    return CheckpointError(
        f"source has other values in {shown(name)}, or another norm, than when the folder was begun. Name another folder."
    )


def tensor_digest(tensor: npt.NDArray[Any]) -> str:
    """Return a digest of the dtype, the shape and the bytes of a tensor."""
    digest = hashlib.sha256(f"{tensor.dtype.name} {tensor.shape} ".encode())
    digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def loaded_copy(name: str, tensor: SourceTensor) -> npt.NDArray[Any]:
    """Return a tensor of the source, or raise if it is not the one that was listed."""
    found = tensor.load()
    if (found.dtype.name, found.shape) != (tensor.dtype, tensor.shape):
        raise _changed(name)
    return found


def choose_tasks(
    contents: ModelContents,
    formats: Any,
    rank: Any,
    include: Patterns,
    exclude: Patterns | None,
    weighting: Mapping[str, Any],
    *,
    fit: str,
) -> dict[str, Task]:
    """Return the task of each selected matrix."""
    by_name = _formats(contents, formats, include, exclude)
    if not isinstance(weighting, Mapping):
        raise InvalidArgumentError(f"weighting must be a mapping of names to norms, got {given(weighting)}.")
    if unknown := sorted(set(weighting) - set(contents.weights), key=str):
        raise InvalidArgumentError(
            f"weighting must name matrices of the source, got {list_names([*map(str, unknown)])}."
        )
    for name, norm in weighting.items():
        if not (isinstance(norm, AbstractWeighting) or callable(norm)):
            raise InvalidArgumentError(
                f"weighting must give {shown(name)} a norm of lqlora.weighting, or a function, got {given(norm)}."
            )
    ranks = _ranks(rank, list(by_name), formats.ranks if isinstance(formats, Plan) else {})
    shapes = _shapes(contents)
    tasks = {}
    for name, fmt in by_name.items():
        if isinstance(formats, Plan) and formats.matrices[name].shape != shapes[name]:
            raise InvalidArgumentError(
                f"formats must be a plan of this model, but {shown(name)} has the shape {shapes[name]}, and "
                f"{formats.matrices[name].shape} in the plan."
            )
        most = min(shapes[name])
        tasks[name] = Task(
            name,
            contents.weights[name],
            shapes[name],
            with_fitted_levels(fmt) if fit == "levels+scale" else fmt,
            min(ranks[name], most),
            ranks[name] if ranks[name] > most else None,
            weighting.get(name),
        )
    return tasks


def _formats(
    contents: ModelContents, formats: Any, include: Patterns, exclude: Patterns | None
) -> dict[str, BlockFormat]:
    """Return the format of each selected matrix, in the order of the source."""
    names = list(contents.weights)
    wanted: Any = formats.formats if isinstance(formats, Plan) else formats
    is_mapping = isinstance(wanted, Mapping) and bool(wanted)
    if not (is_mapping or isinstance(wanted, BlockFormat) or callable(wanted)):
        raise InvalidArgumentError(
            f"formats must be a BlockFormat, a Plan, a mapping of patterns to formats, or a function of names, got {given(formats)}."
        )
    patterns = [*wanted] if is_mapping else as_patterns(include)
    found = values_by_name(wanted, names, parameter="formats", what="matrix") if is_mapping else {}
    index = NameIndex(names)
    rows = [row for row, name in enumerate(names) if name in found] if is_mapping else index.rows(patterns)
    if exclude is None:
        exact = {own for own in patterns if isinstance(own, str) and own in contents.weights}
        is_dense = _is_dense_by_default(contents)
        chosen = [names[row] for row in rows if names[row] in exact or not is_dense(names[row])]
    else:
        left = {*index.rows(exclude, parameter="exclude")} if as_patterns(exclude, "exclude") else set()
        chosen = [names[row] for row in rows if row not in left]
    if not chosen:
        raise InvalidArgumentError(
            f"include must select a matrix of {contents.path}, but nothing is left of {len(names)} ({list_names(names)}) after exclusions."
        )
    by_name = {
        name: found[name] if is_mapping else wanted if isinstance(wanted, BlockFormat) else wanted(name)
        for name in chosen
    }
    for name, fmt in by_name.items():
        if not isinstance(fmt, BlockFormat):
            raise InvalidArgumentError(f"formats must give {shown(name)} a BlockFormat, got {given(fmt)}.")
    return by_name


def _is_dense_by_default(contents: ModelContents) -> Callable[[str], bool]:
    """Return whether a matrix stays dense unless its name is given."""
    # In models of torch weights of layers are called `weight`. Other parameters of two dimensions are tables of biases, states of
    # state-space models and the like.
    whole = [name for name, own in contents.tensors.items() if len(own.shape) == 2 and own.matrices]
    others = [name for name in whole if not name.endswith(".weight")]
    plain = {own for name in others for own in contents.tensors[name].matrices} if len(others) < len(whole) else set()
    by_name = predicate_of_any(DENSE_BY_NAME, ())
    return lambda name: name in plain or by_name(name)


def _ranks(rank: Any, names: Sequence[str], planned: Mapping[str, int]) -> dict[str, int]:
    """Return the rank of each matrix that was asked for."""
    found: dict[str, Any] = {**planned}
    if callable(rank) or isinstance(rank, Mapping):
        found |= values_by_name(rank, names, parameter="rank", what="matrix")
    elif rank is not None:
        found |= dict.fromkeys(names, rank)
    for name in names:
        if name not in found:
            raise InvalidArgumentError(f"rank must be given for {shown(name)}. Pass rank=, or a plan that has ranks.")
        require_integer(found[name], "rank")
    return {name: int(found[name]) for name in names}


def _shapes(contents: ModelContents) -> dict[str, tuple[int, int]]:
    """Return the shape of each matrix, (outputs, inputs)."""
    found = {}
    for tensor in contents.tensors.values():
        for name in tensor.matrices:
            rows, columns = tensor.shape[-2:]
            found[name] = (columns, rows) if tensor.is_transposed else (rows, columns)
    return found


def check_strict(contents: ModelContents, tasks: Mapping[str, Task], exclude: Patterns | None) -> None:
    """Raise if a rank is clipped, or an array that should perhaps be quantized stays dense."""
    if clipped := next((task for task in tasks.values() if task.clipped_from is not None), None):
        raise InvalidArgumentError(
            f"rank must be at most {min(clipped.shape)} for {shown(clipped.name)} of shape {clipped.shape}, got {clipped.clipped_from}."
        )
    names = [
        name for tensor, own in contents.tensors.items() for name in (own.matrices or (tensor.removesuffix(".weight"),))
    ]
    is_excluded = (
        _is_dense_by_default(contents) if exclude is None else predicate_of_any(as_patterns(exclude, "exclude"), names)
    )
    dense = []
    for tensor, own in contents.tensors.items():
        held = own.matrices or (tensor.removesuffix(".weight"),)
        is_large = len(own.shape) > 1 and own.dtype in (*DTYPES, "float64")
        if is_large and not any(name in tasks or is_excluded(name) for name in held):
            dense.append(tensor)
    if dense:
        size = sum(contents.tensors[name].nbytes for name in dense)
        raise InvalidArgumentError(
            f"source must have no arrays that stay dense with strict=True, but {list_names(dense)} ({size:,} bytes) would."
        )


def list_pieces(contents: ModelContents, tasks: Mapping[str, Task], factor_dtype: FloatName) -> list[Piece]:
    """Return what the checkpoint holds, in the order of the source, with exact sizes."""
    pieces = []
    for name, tensor in contents.tensors.items():
        chosen = [own for own in tensor.matrices if own in tasks]
        if chosen and len(chosen) < len(tensor.matrices):
            missing = next(own for own in tensor.matrices if own not in tasks)
            raise InvalidArgumentError(
                f"include must select all matrices of {shown(name)} or none, but leaves out {shown(missing)}."
            )
        for own in chosen:
            task = tasks[own]
            factors = float_bits(factor_dtype) // 8 * task.rank * sum(task.shape)
            pieces.append(Piece(own, stored_bytes(task.format, task.shape) + factors, None))
        if not chosen:
            try:
                dtype = np.dtype(getattr(ml_dtypes, tensor.dtype, tensor.dtype))
            except TypeError:
                raise CheckpointError(
                    f"{contents.path} has {shown(name)} of {tensor.dtype}, which NumPy does not have."
                ) from None
            pieces.append(Piece(name, dtype.itemsize * math.prod(tensor.shape), tensor))
    _check_names(pieces)
    return pieces


def _check_names(pieces: Sequence[Piece]) -> None:
    """Raise if a tensor that is copied would be taken for a part of a matrix, before any work is done."""
    matrices = {piece.name for piece in pieces if piece.tensor is None}
    for piece in pieces:
        name = piece.name
        ends = [name[: -len(end)] for end in (".lora_A", ".lora_B") if name.endswith(end)]
        places = [place for place in range(len(name)) if name.startswith(".quantized.", place)]
        if piece.tensor is not None and any(own in matrices for own in (*ends, *(name[:place] for place in places))):
            raise CheckpointError(
                f"source has the tensor {shown(name)}, whose name is reserved for a part of a quantized matrix."
            )
        if len(name) > _LONGEST_NAME:
            raise CheckpointError(f"source has a tensor whose name has {len(name)} characters: {shown(name)}.")


_LONGEST_NAME = 2**16 - 100


def in_files(pieces: Sequence[Piece], most: int) -> dict[str, list[Piece]]:
    """Return the pieces of each file, in order, by the name that transformers gives to such a file."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": own for number, own in enumerate(groups, start=1)}
