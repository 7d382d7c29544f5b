"""Files of low-rank factors alone, with fingerprints of the quantized matrices they belong to.

The factors of a layer ``m`` are the tensors ``m.lora_A`` and ``m.lora_B``. The metadata of the safetensors file has one JSON
document under the key ``lqlora_factors``. It holds the scaling of each layer, the SHA-256 fingerprint of its quantized matrix,
the metadata of the caller, and a SHA-256 fingerprint of the whole content. No pickle is read or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._shared_settings import collection_paused
from lqlora.checkpoint._container import digest, read_document, take_tensors, write_container
from lqlora.checkpoint.file import quantized_arrays
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from lqlora._documents import Reader
    from lqlora._typing import Array
    from lqlora.checkpoint._schema import FactorRow
    from lqlora.checkpoint.file import StoredMatrix
    from lqlora.quantized import QuantizedArray

__all__ = ["FactorFile", "StoredFactors", "base_fingerprint", "read_factors", "write_factors"]

#: Version of the JSON document. A reader refuses every other one.
_SPEC = 1

#: Key of the JSON document in the metadata of a safetensors file.
_KEY = "lqlora_factors"


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """Low-rank factors of one layer in a file.

    Parameters
    ----------
    lora_A, lora_B : ndarray, shape (rank, n) and (m, rank)
        The factors.
    scaling : float
        Factor of the low-rank part.
    base : str
        Fingerprint of the quantized matrix, see :func:`base_fingerprint`.
    """

    lora_A: Array
    lora_B: Array
    scaling: float
    base: str


@dataclass(frozen=True, eq=False)
class FactorFile:
    """Content of a file of factors.

    Parameters
    ----------
    factors : dict of str to StoredFactors
        Factors by layer.
    metadata : dict
        JSON values that the caller of :func:`write_factors` gave.
    """

    factors: dict[str, StoredFactors]
    metadata: dict[str, Any]


def base_fingerprint(quantized: QuantizedArray) -> str:
    """Return the SHA-256 fingerprint of a quantized matrix: its format, shape and stored arrays.

    Parameters
    ----------
    quantized : QuantizedArray
        Array of any library.

    Returns
    -------
    str
        Hexadecimal digits. Arrays that decode to the same numbers in another way have another fingerprint.
    """
    arrays = {key: np.asarray(array, order="C") for key, array in quantized_arrays(quantized).items()}
    fmt = quantized.format
    return digest(
        arrays, {"format": str(fmt), "shape": list(quantized.shape), "normalization": fmt.codebook.normalization}
    )


@collection_paused()
def write_factors(
    path: str | os.PathLike[str], matrices: Mapping[str, StoredMatrix], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the low-rank factors of matrices to one file, atomically.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    matrices : mapping of str to StoredMatrix
        Matrices by layer. Of the quantized part only the fingerprint is written.
    metadata : mapping, optional
        JSON values to store with the factors.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    InvalidArgumentError
        If the factors could not be read again, or the metadata is not JSON.
    """
    from lqlora._documents import Reader, Text, json_values  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import FactorContent, FactorRow  # noqa: PLC0415

    arrays: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name, matrix in matrices.items():
        for key, given in (("lora_A", matrix.lora_A), ("lora_B", matrix.lora_B)):
            array = ops.convert(plain_array(given, f"{key} of {name!r}", STORABLE_FLOATS), np)
            arrays[f"{name}.{key}"] = np.asarray(array, order="C")
        rows[name] = {"scaling": float(matrix.scaling), "base": base_fingerprint(matrix.quantized)}
    # What a reader would refuse is refused before there is a file.
    reader = Reader("factors that could not be read again are not saved", InvalidArgumentError)
    _stored(dict(arrays), reader.convert(rows, dict[Text, FactorRow], "factors"), reader)
    document: dict[str, Any] = {
        "spec": _SPEC,
        "factors": rows,
        "metadata": json_values(metadata or {}, "metadata", InvalidArgumentError),
    }
    document["sha256"] = digest(arrays, document)
    write_container(path, arrays, _KEY, reader.write(document, FactorContent))


@collection_paused()
def read_factors(path: str | os.PathLike[str]) -> FactorFile:
    """Read a file of factors, and compare its fingerprint.

    Parameters
    ----------
    path : path-like
        File that :func:`write_factors` wrote.

    Returns
    -------
    FactorFile
        NumPy arrays, bit for bit those that were saved.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or not one of factors, or a number in it is NaN or infinite.
    """
    from lqlora.checkpoint._schema import FactorContent  # noqa: PLC0415 - imports msgspec

    arrays, content, reader = read_document(path, _KEY, "lqlora.nn.save_factors", _SPEC, FactorContent)
    return FactorFile(_stored(arrays, content.factors, reader), content.metadata)


def _stored(arrays: dict[str, Any], rows: Mapping[str, FactorRow], reader: Reader) -> dict[str, StoredFactors]:
    """Return the factors of all layers, checked."""
    found = take_tensors(arrays, dict.fromkeys(rows, ("lora_A", "lora_B")), "factors", reader)
    return {
        name: StoredFactors(found[name]["lora_A"], found[name]["lora_B"], row.scaling, row.base)
        for name, row in rows.items()
    }
