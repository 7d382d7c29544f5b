"""Files of scales alone, with fingerprints of the codes they belong to.

The scales of a layer ``m`` are the tensor ``m.scales``. If its low-rank factors trained with them, the file also has
``m.lora_A`` and ``m.lora_B``. The metadata of the safetensors file has one JSON document under the key ``lqlora_scales``. It
holds for each layer the SHA-256 fingerprint of everything else that the layer computes with, and the scaling of its factors if
the file has them, the metadata of the caller, and a SHA-256 fingerprint of the whole content. No pickle is read or written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora import ops
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._messages import shown
from lqlora.checkpoint._container import digest, read_document, take_tensors, write_container
from lqlora.checkpoint.file import quantized_arrays
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping

    from lqlora._documents import Reader
    from lqlora._typing import Array
    from lqlora.checkpoint._schema import ScaleRow
    from lqlora.checkpoint.file import StoredMatrix
    from lqlora.quantized import QuantizedArray

__all__ = ["ScaleFile", "StoredScales", "codes_fingerprint", "read_scales", "write_scales"]

#: Version of the JSON document. A reader refuses every other one.
_SPEC = 1

#: Key of the JSON document in the metadata of a safetensors file.
_KEY = "lqlora_scales"


@dataclass(frozen=True, eq=False)
class StoredScales:
    """Scales of one layer in a file, with its factors if they trained, too.

    Parameters
    ----------
    scales : ndarray of float32, shape (blocks,)
        The scales.
    base : str
        Fingerprint of the rest of the layer, see :func:`codes_fingerprint`.
    factors : tuple of ndarray, ndarray and float, optional
        ``lora_A`` of shape (rank, n), ``lora_B`` of shape (m, rank), and the scaling of their product.
    """

    scales: Array
    base: str
    factors: tuple[Array, Array, float] | None = None


@dataclass(frozen=True, eq=False)
class ScaleFile:
    """Content of a file of scales.

    Parameters
    ----------
    scales : dict of str to StoredScales
        Scales by layer.
    metadata : dict
        JSON values that the caller of :func:`write_scales` gave.
    """

    scales: dict[str, StoredScales]
    metadata: dict[str, Any]


def codes_fingerprint(quantized: QuantizedArray, factors: tuple[Array, Array, float] | None = None) -> str:
    """Return the SHA-256 fingerprint of what a quantized matrix is without its scales.

    Parameters
    ----------
    quantized : QuantizedArray
        Array of any library.
    factors : tuple of array, array and float, optional
        ``lora_A``, ``lora_B`` and ``scaling``, if the scales belong to these factors.

    Returns
    -------
    str
        Hexadecimal digits. They depend on codes, zero points, levels, shape and format, but not on the format of the scales.
    """
    arrays = {key: own for key, own in quantized_arrays(quantized).items() if key.partition(".")[0] != "scales"}
    fmt = dataclasses.replace(quantized.format, scales="float32")
    document: dict[str, Any] = {
        "format": str(fmt),
        "shape": list(quantized.shape),
        "normalization": fmt.codebook.normalization,
    }
    if factors is not None:
        inner, outer, scaling = factors
        arrays |= {"lora_A": ops.convert(inner, np), "lora_B": ops.convert(outer, np)}
        document["scaling"] = float(scaling)
    return digest({key: np.asarray(array, order="C") for key, array in arrays.items()}, document)


def write_scales(
    path: str | os.PathLike[str],
    matrices: Mapping[str, StoredMatrix],
    with_factors: Collection[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the scales of matrices to one file, atomically.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    matrices : mapping of str to StoredMatrix
        Matrices with float32 scales, by layer. Of codes only the fingerprint is written.
    with_factors : collection of str
        Layers whose low-rank factors are written, too. The fingerprints of the others cover their factors.
    metadata : mapping, optional
        JSON values to store with the scales.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    InvalidArgumentError
        If the scales could not be read again, or the metadata is not JSON.
    """
    from lqlora._documents import Reader, Text, json_values  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import ScaleContent, ScaleRow  # noqa: PLC0415

    arrays: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name, matrix in matrices.items():
        own: dict[str, Any] = {"scales": matrix.quantized.scales}
        factors: tuple[Any, Any, float] | None = matrix.lora_A, matrix.lora_B, matrix.scaling
        rows[name] = {}
        if name in with_factors:
            own |= {"lora_A": matrix.lora_A, "lora_B": matrix.lora_B}
            rows[name]["scaling"], factors = float(matrix.scaling), None
        rows[name]["base"] = codes_fingerprint(matrix.quantized, factors)
        for key, given in own.items():
            array = ops.convert(plain_array(given, f"{key} of {name!r}", STORABLE_FLOATS), np)
            arrays[f"{name}.{key}"] = np.asarray(array, order="C")
    # What a reader would refuse is refused before there is a file.
    reader = Reader("scales that could not be read again are not saved", InvalidArgumentError)
    _stored(dict(arrays), reader.convert(rows, dict[Text, ScaleRow], "scales"), reader)
    document: dict[str, Any] = {
        "spec": _SPEC,
        "scales": rows,
        "metadata": json_values(metadata or {}, "metadata", InvalidArgumentError),
    }
    document["sha256"] = digest(arrays, document)
    write_container(path, arrays, _KEY, reader.write(document, ScaleContent))


def read_scales(path: str | os.PathLike[str]) -> ScaleFile:
    """Read a file of scales, and compare its fingerprint.

    Parameters
    ----------
    path : path-like
        File that :func:`write_scales` wrote.

    Returns
    -------
    ScaleFile
        NumPy arrays, bit for bit those that were saved.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or not one of scales, or a number in it is NaN or infinite.
    """
    from lqlora.checkpoint._schema import ScaleContent  # noqa: PLC0415 - imports msgspec

    arrays, content, reader = read_document(path, _KEY, "lqlora.nn.save_scales", _SPEC, ScaleContent)
    return ScaleFile(_stored(arrays, content.scales, reader), content.metadata)


def _stored(arrays: dict[str, Any], rows: Mapping[str, ScaleRow], reader: Reader) -> dict[str, StoredScales]:
    """Return the scales of all layers, checked."""
    from msgspec import UNSET  # noqa: PLC0415 - imported when a file is read or written

    from lqlora._documents import key_step  # noqa: PLC0415 - imports msgspec

    keys = {name: ("scales",) if row.scaling is UNSET else ("scales", "lora_A", "lora_B") for name, row in rows.items()}
    found = {}
    for name, own in take_tensors(arrays, keys, "scales", reader).items():
        scales, *factors = own.values()
        if scales.ndim != 1 or scales.dtype != np.float32:
            raise reader.fault(
                f"scales{key_step(name)}",
                f"must have float32 scales in one row, got {shown(str(scales.dtype))} of shape {scales.shape}.",
            )
        row = rows[name]
        found[name] = StoredScales(scales, row.base, (*factors, row.scaling) if factors else None)
    return found
