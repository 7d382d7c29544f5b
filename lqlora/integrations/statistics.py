"""Statistics of the layers of a model in a folder, read one matrix at a time."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import asdict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lqlora._annotations import annotated
from lqlora._documents import Count, Length, Reader, Text, key_step
from lqlora._files import replace_file, write_whole
from lqlora._messages import about_file, given, shown
from lqlora._patterns import list_names
from lqlora.checkpoint._container import digest
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.weighting import InputGram

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    import numpy.typing as npt

    from lqlora.weighting import AbstractWeighting

__all__ = [
    "DOCUMENT",
    "Statistics",
    "norms_for",
    "open_statistics",
    "read_entries",
    "write_document",
    "write_gradients",
    "write_inputs",
]

#: Name of the JSON document, which is written last.
DOCUMENT = "statistics.json"

#: Version of the document. A reader refuses every other one.
_SPEC = 1
_MOST_BYTES = 2**27


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """Statistics of a matrix: shape, file and tensor of the second moment of its inputs, and file of its output gradients."""

    shape: tuple[Length, Length]
    file: Text
    inputs: Text
    gradients: Text | None = None


class _Document(Struct, frozen=True, forbid_unknown_fields=True):
    """Document of a folder of statistics."""

    spec: int
    examples: Count
    files: dict[Text, Annotated[str, Meta(min_length=64, max_length=64)]]
    sha256: Text
    matrices: Annotated[dict[Text, _Entry], Meta(min_length=1)]


@dataclass(frozen=True)
class Statistics:
    r"""Statistics of the matrices of a model, which are read when they are needed.

    Parameters
    ----------
    path : Path
        Folder.
    examples : int
        Number of sequences that they are means over.
    inputs : dict of str to callable
        Function by name of the matrix that reads the second moment of its inputs, :math:`\mathbb{E}[x x^\top]`: float32 of shape
        (in_features, in_features).
    output_gradients : dict of str to callable
        Function that reads the mean over sequences of the sum of the squared gradients of the loss at each output: float32 of shape
        (out_features,). Empty if they were not collected.
    """

    path: Path
    examples: int
    inputs: dict[str, Callable[[], npt.NDArray[np.float32]]]
    output_gradients: dict[str, Callable[[], npt.NDArray[np.float32]]]

    @annotated
    def weighting(
        self, norm: Callable[[Any], AbstractWeighting] = InputGram
    ) -> dict[str, Callable[[], AbstractWeighting]]:
        """Return functions that make the norm of each matrix, for ``weighting`` of :func:`lqlora.decompose_checkpoint`.

        Parameters
        ----------
        norm : callable
            Function that returns a norm from a second moment of inputs, such as
            ``lambda gram: lq.weighting.InputGram(gram, damping=0.1)``. Other processes take functions with a name only.

        Returns
        -------
        dict of str to callable
            Functions by name of the matrix. With output gradients the second moment is multiplied by their mean, so that the squared
            error of a matrix estimates the change of the loss, and costs of different matrices can be compared.

        Raises
        ------
        InvalidArgumentError
            If ``norm`` is not callable.
        """
        if not callable(norm):
            raise InvalidArgumentError(f"norm must be a function of a second moment, got {given(norm)}.")
        return {
            name: functools.partial(_norm, norm, load, self.output_gradients.get(name))
            for name, load in self.inputs.items()
        }


def norms_for(statistics: Statistics, names: Iterable[str]) -> dict[str, Callable[[], AbstractWeighting]]:
    """Return the norms of matrices that a folder has statistics of.

    Parameters
    ----------
    statistics : Statistics
        The statistics.
    names : iterable of str
        Names of matrices of a model.

    Returns
    -------
    dict of str to callable
        See :meth:`Statistics.weighting`.

    Raises
    ------
    InvalidArgumentError
        If it has statistics of none of them.
    """
    norms, names = statistics.weighting(), list(names)
    found = {name: norms[name] for name in names if name in norms}
    if not found:
        raise InvalidArgumentError(
            f"statistics must be those of this model, but are of {list_names(norms)}, and its matrices are {list_names(names)}."
        )
    return found


@annotated
def open_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Open a folder of statistics that :func:`calibrate_checkpoint <lqlora.integrations.calibration.calibrate_checkpoint>` wrote.

    All files are read once, to compare their fingerprints. Values are read when they are needed.

    Parameters
    ----------
    path : path-like
        The folder.

    Returns
    -------
    Statistics
        Functions that read the statistics of each matrix. They can be pickled.

    Raises
    ------
    CheckpointError
        If the folder is not complete, a file is missing or was changed, or the files contradict the document.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gram = np.float32([[2.0, 1.0], [1.0, 3.0]])
    ...     entries = write_inputs(f"{folder}/inputs-00001.safetensors", {"up": ((4, 2), gram), "gate": ((4, 2), gram)})
    ...     write_document(folder, entries, examples=8)
    ...     open_statistics(folder).inputs["gate"]().tolist()
    [[2.0, 1.0], [1.0, 3.0]]
    """
    folder = Path(path)
    try:
        document = _read_document(folder)
        for name, expected in document.files.items():
            if _fingerprint(folder / name) != expected:
                raise CheckpointError(about_file(folder / name, "was changed: its fingerprint is another one."))
        tensors = {name: _lengths(folder / name) for name in document.files}
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(about_file(folder, f"cannot be read as statistics: {error}.")) from error
    inputs: dict[str, Callable[[], npt.NDArray[np.float32]]] = {}
    gradients: dict[str, Callable[[], npt.NDArray[np.float32]]] = {}
    for name, own in document.matrices.items():
        rows, columns = own.shape
        for file, tensor, length in (
            (own.file, own.inputs, columns * (columns + 1) // 2),
            (own.gradients, f"{name}{_GRADIENTS}", rows),
        ):
            if file is not None and tensors.get(file, {}).get(tensor) != length:
                raise CheckpointError(
                    about_file(folder, f"lacks {length} float32 numbers in {shown(tensor)}, which {DOCUMENT} lists.")
                )
        inputs[name] = functools.partial(_read_inputs, folder / own.file, own.inputs, columns)
        if own.gradients is not None:
            gradients[name] = functools.partial(_read, folder / own.gradients, f"{name}{_GRADIENTS}")
    return Statistics(folder, document.examples, inputs, gradients)


_INPUTS, _GRADIENTS = ".inputs", ".output_gradients"


def write_inputs(
    path: str | os.PathLike[str],
    inputs: Mapping[str, tuple[tuple[int, int], npt.NDArray[np.float32]]],
) -> dict[str, dict[str, Any]]:
    """Write second moments of inputs to a file.

    Parameters
    ----------
    path : path-like
        File to write.
    inputs : mapping of str to ((int, int), array of float32)
        Shape of each matrix, and second moment of its inputs. Arrays that are the same object are stored once.

    Returns
    -------
    dict of str to dict
        Entries of the matrices for :func:`write_document`.
    """
    first: dict[int, str] = {}
    tensors, entries = {}, {}
    for name, (shape, gram) in inputs.items():
        if id(gram) not in first:
            first[id(gram)] = f"{name}{_INPUTS}"
            # A symmetric matrix takes the place of its upper triangle, row after row.
            tensors[first[id(gram)]] = np.concatenate([gram[row, row:] for row in range(len(gram))])
        entries[name] = {"shape": shape, "file": Path(path).name, "inputs": first[id(gram)]}
    _write(path, tensors)
    return entries


def write_gradients(path: str | os.PathLike[str], gradients: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write mean squared gradients at the outputs of layers to a file.

    Parameters
    ----------
    path : path-like
        File to write.
    gradients : mapping of str to array of float32, shape (out_features,)
        Numbers by name of the matrix.
    """
    _write(path, {f"{name}{_GRADIENTS}": own for name, own in gradients.items()})


def _write(path: str | os.PathLike[str], tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    with replace_file(path, SafetensorError) as beside:
        save_file(dict(tensors), beside)


def write_document(folder: str | os.PathLike[str], entries: Mapping[str, Mapping[str, Any]], *, examples: int) -> None:
    """Write the document of a folder of statistics, which makes it complete.

    Parameters
    ----------
    folder : path-like
        Folder with the files.
    entries : mapping of str to mapping
        Entries of the matrices.
    examples : int
        Number of sequences.
    """
    files = sorted(
        {file for own in entries.values() for file in (own["file"], own.get("gradients")) if file is not None}
    )
    document: dict[str, Any] = {
        "spec": _SPEC,
        "examples": examples,
        "files": {name: _fingerprint(Path(folder) / name) for name in files},
        "matrices": {name: dict(own) for name, own in entries.items()},
    }
    document["sha256"] = digest({}, document)
    text = Reader("statistics must be such that they can be read again", InvalidArgumentError).write(
        document, _Document
    )
    write_whole(Path(folder) / DOCUMENT, f"{text}\n".encode())


def read_entries(reader: Reader, text: bytes) -> dict[str, dict[str, Any]]:
    """Return entries of matrices from JSON, checked.

    Parameters
    ----------
    reader : Reader
        Reader of the document.
    text : bytes
        JSON.

    Returns
    -------
    dict of str to dict
        Entries for :func:`write_document`.
    """
    return {name: asdict(own) for name, own in reader.read(text, dict[Text, _Entry]).items()}


def _read_document(folder: Path) -> _Document:
    path = folder / DOCUMENT
    if not path.is_file():
        what = "is not a folder of statistics" if folder.is_dir() else "is not a folder"
        raise CheckpointError(about_file(folder, f"{what}: there is no {DOCUMENT}, which is written last."))
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(about_file(path, f"must have at most {_MOST_BYTES} bytes."))
    reader = Reader(f"{path} is damaged or inconsistent", CheckpointError)
    plain = reader.parse(path.read_bytes())
    document = reader.convert(plain, _Document)
    if document.sha256 != digest({}, plain):
        raise reader.fault("sha256", "must be the fingerprint of this document, which has changed.")
    if document.spec != _SPEC:
        raise reader.fault("spec", f"must be {_SPEC}, got {document.spec}. Another version of lqlora has written it.")
    for name in document.files:
        # A path would let a document read files elsewhere.
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise reader.fault(f"files{key_step(name)}", "must be the name of a .safetensors file of the folder.")
    return document


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lengths(path: Path) -> dict[str, int]:
    """Return the number of entries of each tensor of one axis in float32."""
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {
            name: math.prod(own.get_shape())
            for name, own in slices.items()
            if own.get_dtype() == "F32" and len(own.get_shape()) == 1
        }


def _read(path: Path, name: str) -> npt.NDArray[np.float32]:
    try:
        with safe_open(path, framework="numpy") as file:
            found: npt.NDArray[np.float32] = file.get_tensor(name)
            return found
    except (OSError, SafetensorError) as error:
        raise CheckpointError(about_file(path, f"has {shown(name)}, which cannot be read: {error}.")) from error


def _read_inputs(path: Path, name: str, size: int) -> npt.NDArray[np.float32]:
    triangle, gram, place = _read(path, name), np.empty((size, size), np.float32), 0
    for row in range(size):
        own = triangle[place : place + size - row]
        gram[row, row:] = gram[row:, row] = own
        place += size - row
    return gram


def _norm(
    norm: Callable[[Any], AbstractWeighting],
    inputs: Callable[[], npt.NDArray[np.float32]],
    gradients: Callable[[], npt.NDArray[np.float32]] | None,
) -> AbstractWeighting:
    gram = inputs()
    if gradients is not None:
        # With R = E[x x^T] and gradients g that are independent of x, and of mean square s at each output, the change of the loss that
        # an error E makes to be expected is half of s tr(E R E^T). Single outputs are noisy, so that their mean stands for them. A
        # layer without gradients has next to nothing.
        gram *= np.float32(float(gradients().mean(dtype=np.float64)) or _NOTHING)
    return norm(gram)


#: Mean squared gradient of layers without gradients.
_NOTHING = 2.0**-60
