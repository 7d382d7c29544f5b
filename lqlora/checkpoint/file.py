"""Checkpoint files: quantized matrices with their low-rank factors, and plain tensors, in one safetensors file.

A quantized matrix ``m`` is stored as these tensors:

- ``m.quantized.codes`` and ``m.quantized.scales``. Under double quantization the scales are a quantized array themselves:
  ``m.quantized.scales.codes``, ``m.quantized.scales.scales`` and, if the format has an offset, ``m.quantized.scales.offset``.
- ``m.quantized.zero_points`` if the codebook is affine, ``m.quantized.levels`` if the levels are fitted.
- ``m.quantized.codebook``, the levels of the codebook, if its name is not a standard one.
- ``m.lora_A`` and ``m.lora_B``.

The metadata of the safetensors file has one JSON document under the key ``lqlora``. It holds the format, shape and
scaling of each matrix, the metadata of the caller, and a SHA-256 fingerprint of the whole content. No pickle is read or
written.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import STORABLE, plain_array
from lqlora._messages import shortened, shown
from lqlora._shared_settings import collection_paused
from lqlora.checkpoint._container import digest, read_container, write_container
from lqlora.codebooks import Codebook, check_work, is_standard
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError, LQLoRAError, NonFiniteError
from lqlora.formats import BlockFormat, codebook_name
from lqlora.quantized import QuantizedArray, dequantize
from lqlora.quantized.array import nest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
    from pathlib import Path

    from lqlora._documents import Reader
    from lqlora._typing import Array
    from lqlora.checkpoint._schema import Content, Matrix
    from lqlora.checkpoint.quantization_config import MatrixFormat

__all__ = [
    "KEY",
    "Checkpoint",
    "StoredMatrix",
    "quantized_arrays",
    "read_file",
    "read_pretrained",
    "save",
    "stored_bytes",
    "verify_file",
]

#: Version of the JSON document. A reader refuses every other one.
_SPEC = 4

#: Key of the JSON document in the metadata of a safetensors file.
KEY = "lqlora"

#: What is between the name of a matrix and that of a stored array.
_SEPARATOR = ".quantized."

#: Bytes of small arrays that are joined, so that one call checks all of them. The joined copy bounds the memory.
_JOINED = 1 << 20

#: Dtypes whose numbers may be NaN or infinite.
_FLOATS = ("float16", "bfloat16", "float32", "float64")

#: What tensors of unusual dtypes and shapes raise when they are checked.
_UNUSUAL = (AttributeError, OverflowError, TypeError, ValueError)


class DecomposedMatrix(Protocol):
    """Attributes that :func:`save` reads of a matrix. :class:`lqlora.Decomposition` and :class:`StoredMatrix` have them."""

    @property
    def quantized(self) -> QuantizedArray:
        """Quantized part."""

    @property
    def lora_A(self) -> Array:
        """Factor of shape (rank, n)."""

    @property
    def lora_B(self) -> Array:
        """Factor of shape (m, rank)."""

    @property
    def scaling(self) -> float:
        """Factor of the low-rank part."""


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A quantized matrix with its low-rank factors: ``dequantize(quantized) + scaling * lora_B @ lora_A``.

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

    def __repr__(self) -> str:
        """Return shape, format and rank. The numbers are those of the attributes."""
        own = self.quantized
        return f"StoredMatrix(shape={own.shape}, format={str(own.format)!r}, rank={len(self.lora_A)})"

    def reconstruct(self) -> Array:
        """Return the dense approximation.

        Returns
        -------
        array of float32, shape (m, n)
            ``dequantize(quantized) + scaling * lora_B @ lora_A``.
        """
        lora_B, lora_A = (ops.widen(own) for own in (self.lora_B, self.lora_A))
        return dequantize(self.quantized) + ops.low_rank_product(lora_B, lora_A, self.scaling)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Content of a checkpoint.

    Parameters
    ----------
    matrices : dict of str to StoredMatrix
        Quantized matrices by module name, as NumPy arrays.
    tensors : dict of str to ndarray
        Tensors that are not quantized, by name.
    metadata : dict
        JSON values that the caller of :func:`save` gave.
    """

    matrices: dict[str, StoredMatrix]
    tensors: dict[str, Array] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@annotated
@collection_paused()
def save(
    path: str | os.PathLike[str],
    matrices: Mapping[str, DecomposedMatrix | QuantizedArray],
    tensors: Mapping[str, Array] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically.

    The file is written beside its final name and renamed. A crash at any moment leaves the old file, or none.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    matrices : mapping of str to Decomposition, StoredMatrix or QuantizedArray
        Quantized matrices by module name, of any array library. A quantized array is stored with factors of rank 0.
    tensors : mapping of str to array, optional
        Tensors that are not quantized, such as embeddings, norms and biases.
    metadata : mapping, optional
        JSON values to store with the matrices. Keys that are numbers become text.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    InvalidArgumentError
        If two tensors have one name, a name is reserved, a matrix could not be read again, or the metadata is not
        JSON.

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
    from lqlora._documents import Reader, json_values  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import Content  # noqa: PLC0415

    # Everything is checked before the file is opened: names, formats, and that the metadata is JSON. So bad arguments
    # change nothing on disk. "normalization" is read back for codebooks without a standard name. Levels alone do not
    # determine such a codebook: "affine" adds zero points, and "signed" allows scales below zero.
    arrays: dict[str, Any] = {}
    rows = {}
    for name, given in matrices.items():
        matrix = _as_matrix(given, name)
        _add_all(arrays, _matrix_arrays(name, matrix))
        fmt = matrix.quantized.format
        rows[name] = {
            "format": str(fmt),
            "shape": list(matrix.quantized.shape),
            "scaling": float(matrix.scaling),
            "normalization": fmt.codebook.normalization,
        }
    # A reader takes every tensor that begins with "m.quantized." for a part of the matrix m, and refuses parts that the
    # format does not have. A plain tensor of such a name would make the file unreadable.
    if taken := [name for name in tensors or {} if any(owner in matrices for owner in _owners(name))]:
        raise InvalidArgumentError(
            f"tensors: the name {taken[0]!r} is reserved for a part of a quantized matrix. Rename the tensor."
        )
    _add_all(arrays, {name: _on_host(tensor, repr(name)) for name, tensor in (tensors or {}).items()})
    # np.asarray keeps a scalar, where np.ascontiguousarray would give it a dimension.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    _check_readable(arrays, rows)
    # The fingerprint is computed from what a reader will see: JSON turns keys that are numbers into text.
    document: dict[str, Any] = {
        "spec": _SPEC,
        "matrices": rows,
        "metadata": json_values(metadata or {}, "metadata", InvalidArgumentError),
    }
    document["sha256"] = digest(arrays, document)
    header = Reader("metadata must be such that they can be read again", InvalidArgumentError).write(document, Content)
    write_container(path, arrays, KEY, header)


def _as_matrix(given: DecomposedMatrix | QuantizedArray, name: str) -> DecomposedMatrix:
    """Return a matrix with its factors, of rank 0 for a quantized array."""
    if isinstance(given, QuantizedArray):
        if len(given.shape) != 2 or given.batch_shape:
            raise InvalidArgumentError(f"matrices must be matrices, got one of shape {given.shape} for {shown(name)}.")
        rows, columns = given.shape
        return StoredMatrix(given, np.zeros((0, columns), np.float32), np.zeros((rows, 0), np.float32))
    if not isinstance(getattr(given, "quantized", None), QuantizedArray):
        raise InvalidArgumentError(
            f"matrices must be a Decomposition, StoredMatrix or QuantizedArray each, got {type(given).__name__} for {shown(name)}."
        )
    return given


def _check_readable(arrays: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless the arrays can be loaded again, so that no good file is replaced by an unreadable one."""
    # The arrays go through the reader itself, so writing accepts exactly what loading does: no second list of checks
    # can drift from the first. The reader removes what it takes, hence the copy of the dict. Weights are not decoded.
    from lqlora._documents import Reader, Text  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import Matrix  # noqa: PLC0415

    reader = Reader("matrices that could not be loaded again are not saved", InvalidArgumentError)
    _take_matrices(dict(arrays), reader.convert(dict(rows), dict[Text, Matrix], "matrices"), reader, "matrices")
    Reader("tensors must have names that can be read again", InvalidArgumentError).write(list(arrays), list[str])
    if "__metadata__" in arrays:
        raise InvalidArgumentError("tensors: the name '__metadata__' is reserved by safetensors. Rename the tensor.")


def _array_key(matrix: str, array: str = "") -> str:
    """Return the name of a stored array of a quantized matrix; without an array, the prefix of all of them."""
    return f"{matrix}{_SEPARATOR}{array}"


def _on_host(array: Array, name: str) -> Any:
    """Return an array of any library as a NumPy array."""
    return ops.convert(plain_array(array, name, STORABLE), np)


def _owners(tensor: str) -> Iterator[str]:
    """Yield the names of all matrices that a tensor of this name would be a part of."""
    at = tensor.find(_SEPARATOR)
    while at >= 0:
        yield tensor[:at]
        at = tensor.find(_SEPARATOR, at + 1)


def _matrix_arrays(name: str, matrix: DecomposedMatrix) -> dict[str, Any]:
    """Return all tensors that store a matrix, by name; :func:`_take_matrices` is the inverse."""
    prefix = _array_key(name)
    arrays = {prefix + key: array for key, array in quantized_arrays(matrix.quantized).items()}
    for key, factor in ((f"{name}.lora_A", matrix.lora_A), (f"{name}.lora_B", matrix.lora_B)):
        arrays[key] = _on_host(factor, key)
    return arrays


def quantized_arrays(quantized: QuantizedArray) -> dict[str, Any]:
    """Return the arrays that store a quantized array, by name.

    Parameters
    ----------
    quantized : QuantizedArray
        Array of any library.

    Returns
    -------
    dict of str to ndarray
        The arrays of :meth:`lqlora.QuantizedArray.to_arrays`, and ``codebook`` if the codebook has no standard name.
    """
    arrays = {key: ops.convert(array, np) for key, array in quantized.to_arrays().items()}
    codebook = quantized.format.codebook
    if not is_standard(codebook):
        arrays["codebook"] = codebook.levels
    return arrays


def stored_bytes(fmt: BlockFormat, shape: tuple[int, int]) -> int:
    """Return the bytes of the tensors that store a quantized matrix in a file, without its factors.

    Parameters
    ----------
    fmt : BlockFormat
        Format of the matrix.
    shape : tuple of int
        Its shape.

    Returns
    -------
    int
        Bytes of codes, scales and levels. The levels of the codebook count if its name is not a standard one.
    """
    levels = 0 if is_standard(fmt.codebook) else int(fmt.codebook.levels.nbytes)
    return fmt.storage_bits(shape) // 8 + levels


def _add_all(arrays: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Add tensors, unless a name is in use."""
    if twice := arrays.keys() & new.keys():
        raise InvalidArgumentError(f"tensors: the name {min(twice)!r} is used twice. Rename one of the tensors.")
    arrays.update(new)


def read_file(path: str | os.PathLike[str], *, mapped: bool = False) -> tuple[Checkpoint, str]:
    """Read one file, and check every length, dtype and code. The fingerprint is not compared.

    Parameters
    ----------
    path : path-like
        File written by :func:`save`.
    mapped : bool, default False
        See :func:`lqlora.load`.

    Returns
    -------
    (Checkpoint, str)
        NumPy arrays, and the fingerprint that the file states; empty if it has none.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or inconsistent.
    """
    arrays, content, _ = _read(path, mapped=mapped)
    return _assemble(path, arrays, content), content.sha256 if isinstance(content.sha256, str) else ""


def read_pretrained(
    folder: Path, files: Iterable[Path], matrices: Mapping[str, MatrixFormat], *, mapped: bool = False
) -> Checkpoint:
    """Read files without a document, whose matrices are described elsewhere.

    Parameters
    ----------
    folder : Path
        Folder of the files, for errors.
    files : iterable of Path
        Files that ``save_pretrained`` of transformers wrote.
    matrices : mapping of str to MatrixFormat
        Matrices of the model.
    mapped : bool, default False
        See :func:`lqlora.load`.

    Returns
    -------
    Checkpoint
        NumPy arrays.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or inconsistent.
    """
    from lqlora._documents import key_step  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import Matrix  # noqa: PLC0415

    arrays: dict[str, Any] = {}
    for file in files:
        arrays |= read_container(file, None, "transformers", mapped=mapped)[0]
    rows, reader = {}, _reader(folder)
    for name, own in matrices.items():
        inner, outer = (arrays.get(f"{name}.{key}") for key in ("lora_A", "lora_B"))
        if inner is None or outer is None or inner.ndim != 2 or outer.ndim != 2:
            raise reader.fault(f"matrices{key_step(name)}", "must have factors of two dimensions.")
        if not is_standard(own.format.codebook):
            arrays[_array_key(name, "codebook")] = own.format.codebook.levels
        shape = int(outer.shape[0]), int(inner.shape[1])
        rows[name] = Matrix(str(own.format), shape, own.scaling, own.format.codebook.normalization)
    return Checkpoint(_take_matrices(arrays, rows, reader, "matrices"), arrays, {})


def _assemble(path: str | os.PathLike[str], arrays: dict[str, Any], content: Content) -> Checkpoint:
    """Sort the tensors of a file into matrices and plain tensors."""
    # Each matrix removes its tensors from `arrays`. What is left belongs to no matrix and is plain.
    matrices = _take_matrices(arrays, content.matrices, _reader(path), "matrices")
    return Checkpoint(matrices, arrays, content.metadata)


def _reader(path: str | os.PathLike[str]) -> Reader:
    from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec

    return Reader(f"{path} is damaged or inconsistent", CheckpointError)


def _read(path: str | os.PathLike[str], *, mapped: bool = False) -> tuple[dict[str, Any], Content, dict[str, Any]]:
    """Return the tensors of a file, its JSON document, and the same as plain values, from which the hash is computed."""
    from lqlora.checkpoint._schema import Content, Version  # noqa: PLC0415 - imports msgspec

    arrays, text = read_container(path, KEY, "lqlora.save", mapped=mapped)
    reader = _reader(path)
    plain = reader.parse(text)
    if (spec := reader.convert(plain, Version).spec) != _SPEC:
        raise reader.fault("spec", f"must be {_SPEC}, which this lqlora reads, got {shown(spec)}.")
    content = reader.convert(plain, Content)
    reader.check_depth(content.metadata, "metadata")
    return arrays, content, plain


def _take_matrices(
    arrays: dict[str, Any], rows: Mapping[str, Matrix], reader: Reader, place: str
) -> dict[str, StoredMatrix]:
    """Remove the tensors of all matrices from the arrays, check them, and return the matrices."""
    from lqlora._documents import key_step  # noqa: PLC0415 - imports msgspec

    try:
        standard = (row.format for name, row in rows.items() if _array_key(name, "codebook") not in arrays)
        check_work(map(codebook_name, standard))
    except FormatError as error:
        raise reader.fault(place, f": {error}") from error
    parts = _take_parts(arrays, rows)
    checked = _checked_in_stacks(parts)
    matrices = {}
    for name, own in parts.items():
        try:
            matrices[name] = _assemble_matrix(name, own, is_checked=name in checked)
        except KeyError as error:
            raise reader.fault(
                f"{place}{key_step(name)}", f"is described, but {shown(error.args[0])} is missing."
            ) from error
        # What the tensors hold is not in the document: AttributeError and so on come from unusual dtypes and shapes.
        except (*_UNUSUAL, LQLoRAError) as error:
            raise reader.fault(f"{place}{key_step(name)}", f": {error}") from error
    return matrices


class _Parts(NamedTuple):
    """Tensors of a matrix: those of the quantized weight by name of the stored array, and the factors by full name."""

    row: Matrix
    weight: dict[str, Any]
    factors: dict[str, Any]


def _take_parts(arrays: dict[str, Any], rows: Mapping[str, Matrix]) -> dict[str, _Parts]:
    """Remove the tensors of all matrices from the arrays, and return them by matrix, unchecked."""
    parts = {name: _Parts(row, {}, {}) for name, row in rows.items()}
    # Tensors that a format names are looked up, unless names of matrices may run into each other, as "m" and "m.quantized.x" do.
    if _SEPARATOR not in ".\n".join(rows) + ".":
        stored = {text: _stored_names(text) for text in {row.format for row in rows.values()}}
        for name, (row, weight, factors) in parts.items():
            prefix = name + _SEPARATOR
            for key in stored[row.format]:
                if (array := arrays.pop(prefix + key, None)) is not None:
                    weight[key] = array
            for key in (f"{name}.lora_A", f"{name}.lora_B"):
                if (array := arrays.pop(key, None)) is not None:
                    factors[key] = array
    # One pass over the others: a search through all of them for each matrix would take time that grows with the square of
    # their number. If names of matrices run into each other, the first one has the tensor.
    order = {name: index for index, name in enumerate(rows)}
    for key in list(arrays):
        factor_of = [key[: -len(".lora_A")]] if key.endswith((".lora_A", ".lora_B")) else []
        if owners := [name for name in (*factor_of, *_owners(key)) if name in order]:
            owner = min(owners, key=order.__getitem__)
            if owner in factor_of:
                parts[owner].factors[key] = arrays.pop(key)
            else:
                parts[owner].weight[key[len(_array_key(owner)) :]] = arrays.pop(key)
    return parts


def _stored_names(text: str) -> tuple[str, ...]:
    """Return the names of the arrays that a format stores; none if the text is not the name of a standard format."""
    try:
        return tuple(BlockFormat.parse(text).stored_arrays((1, 1)))
    except LQLoRAError:
        return ()


def _checked_in_stacks(parts: Mapping[str, _Parts]) -> set[str]:
    """Return the names of matrices whose quantized weights passed every check as members of a stack."""
    # One call checks hundreds of small matrices. If a stack of finite numbers is accepted, each of its members is. With NaN
    # in one member, from_arrays does not look for scales that overflow in another one. A matrix that is not in the
    # result is checked by itself, which words the error.
    kinds = {
        name: (row.format, row.shape, *[(key, own.dtype, own.shape) for key, own in weight.items()])
        for name, (row, weight, _) in parts.items()
        if "codebook" not in weight
    }
    checked: set[str] = set()
    for names in _batches(kinds, lambda name: sum(own.nbytes for own in parts[name].weight.values())):
        row, weight = parts[names[0]][:2]
        if len(names) > 1:
            try:
                stack = {key: np.stack([parts[name].weight[key] for name in names]) for key in weight}
                QuantizedArray.from_arrays(stack, BlockFormat.parse(row.format), (len(names), *row.shape), 1)
            except (IndexError, *_UNUSUAL, LQLoRAError):  # IndexError: arrays of 64 dimensions cannot be stacked
                continue
            if all(map(_is_finite, stack.values())):
                checked.update(names)
    return checked


def _batches(kinds: Mapping[str, Hashable], size: Callable[[str], int]) -> Iterator[list[str]]:
    """Yield lists of names of one kind, of at most 1 MiB together. All of one kind have the same size in bytes."""
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for name, kind in kinds.items():
        groups[kind].append(name)
    for names in groups.values():
        count = max(_JOINED // max(size(names[0]), 1), 1)
        yield from (names[start : start + count] for start in range(0, len(names), count))


def _joined(arrays: list[Any]) -> Any:
    """Return the entries of arrays of one dtype as one array; a single array, which may be large, is not copied."""
    return np.concatenate([array.reshape(-1) for array in arrays]) if len(arrays) > 1 else arrays[0]


def _is_finite(array: Any) -> bool:
    """Return whether an array holds neither NaN nor infinity. Only floating-point numbers can be either."""
    return ops.dtype_name(array) not in _FLOATS or ops.is_finite(ops.widen(array))


def _assemble_matrix(name: str, parts: _Parts, *, is_checked: bool) -> StoredMatrix:
    """Check the tensors of a matrix, and return the matrix."""
    # The levels and the format come from a file that may be damaged or forged. Nothing is decoded before
    # QuantizedArray.from_arrays has compared every dtype and length with BlockFormat.stored_arrays.
    fmt, shape = _stored_format(parts.row, parts.weight.pop("codebook", None)), parts.row.shape
    build = nest if is_checked else QuantizedArray.from_arrays
    quantized = build(parts.weight, fmt, shape, 0)
    lora_A, lora_B = parts.factors[f"{name}.lora_A"], parts.factors[f"{name}.lora_B"]
    if lora_A.ndim != 2 or lora_B.shape != (shape[0], len(lora_A)) or lora_A.shape[1] != shape[1]:
        raise FormatError(
            f"lora_B and lora_A of {name!r} must have shapes ({shape[0]}, rank) and (rank, {shape[1]}), got {lora_B.shape} "
            f"and {lora_A.shape}."
        )
    ops.require_float(lora_A, f"lora_A of {name!r}")
    ops.require_float(lora_B, f"lora_B of {name!r}")
    return StoredMatrix(quantized, lora_A, lora_B, parts.row.scaling)


def _stored_format(row: Matrix, levels: Any) -> BlockFormat:
    """Return the format of a matrix, with the levels that are stored if its codebook has no standard name."""
    if levels is None:
        return BlockFormat.parse(row.format)
    if levels.dtype != np.float32:
        raise FormatError(f"levels of a codebook must be stored as float32, got {levels.dtype}.")
    if not isinstance(row.normalization, str) or row.normalization == "rms":
        raise FormatError(
            "normalization must be 'absmax', 'signed' or 'affine' for a codebook whose levels are stored, got "
            f"{row.normalization if isinstance(row.normalization, str) else 'nothing'}."
        )
    return BlockFormat.parse(row.format, Codebook(levels, codebook_name(row.format), row.normalization))


def verify_file(path: str | os.PathLike[str]) -> tuple[Checkpoint, str]:
    """Read one file as :func:`read_file` does, compare its fingerprint, and check that all numbers are finite.

    Parameters
    ----------
    path : path-like
        File written by :func:`save`.

    Returns
    -------
    (Checkpoint, str)
        NumPy arrays, and the fingerprint.

    Raises
    ------
    CheckpointError
        If :func:`read_file` raises it, a byte of the data has changed, or a number is NaN or infinite.
    """
    # The fingerprint comes first, so that a changed byte is reported as one and not as the inconsistency that it may
    # cause. _assemble comes last, because it removes tensors from `arrays`.
    arrays, content, plain = _read(path)
    try:
        same = digest(arrays, plain) == content.sha256
    except ValueError:  # the document holds infinity, which JSON does not have and save() refuses
        same = False
    if not same:
        raise CheckpointError(
            shortened(
                f"{path} was changed after it was written: the SHA-256 of its content differs from the stored one."
            )
        )
    floats = {name: array for name, array in arrays.items() if ops.dtype_name(array) in _FLOATS}
    kinds = {name: (array.dtype, array.shape) for name, array in floats.items()}
    batches = _batches(kinds, lambda name: int(floats[name].nbytes))
    if not all(_is_finite(_joined([floats[name] for name in names])) for names in batches):
        for name, array in floats.items():
            try:
                ops.require_finite(ops.widen(array), f"Tensor {name!r}")
            except NonFiniteError as error:
                raise CheckpointError(shortened(f"{path}: {error}")) from None
    return _assemble(path, arrays, content), str(content.sha256)
