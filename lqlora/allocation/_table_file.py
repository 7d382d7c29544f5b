"""Cost tables as files: JSON, or the same document beside arrays in a zip archive (npz). No pickle is read or written."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._files import write_whole
from lqlora.codebooks import Codebook, is_standard
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.formats import BlockFormat, codebook_name

if TYPE_CHECKING:
    import os

    from lqlora.allocation.table import CostTable

__all__ = ["read", "write"]

_VERSION = 1
_ARRAYS = {"costs": np.float64, "sizes": np.int64, "factor_sizes": np.int64}


def write(table: CostTable, path: str | os.PathLike[str]) -> None:
    """Write a table in the form that the end of the name says."""
    document: dict[str, Any] = {
        "lqlora_cost_table": _VERSION,
        "matrices": [{"name": n, "shape": list(s)} for n, s in zip(table.names, table.shapes, strict=True)],
        "configurations": [_spell(own.format) | {"rank": own.rank} for own in table.configurations],
    }
    if _form(path) == ".npz":
        write_whole(path, _archive(table, json.dumps(document)))
        return
    document["costs"] = [[cost if math.isfinite(cost) else None for cost in row] for row in table.costs.tolist()]
    document |= {"sizes": table.sizes.tolist(), "factor_sizes": table.factor_sizes.tolist()}
    lines = (f'"{key}": {json.dumps(value, allow_nan=False)}' for key, value in document.items())
    write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _form(path: str | os.PathLike[str]) -> str:
    form = Path(path).suffix
    if form not in (".json", ".npz"):
        raise InvalidArgumentError(f"A cost table is a file that ends in .json or .npz, not {str(path)!r}.")
    return form


def _spell(fmt: BlockFormat) -> dict[str, Any]:
    if is_standard(fmt.codebook):
        return {"format": str(fmt)}
    return {"format": str(fmt), "levels": fmt.codebook.levels.tolist(), "normalization": fmt.codebook.normalization}


def _archive(table: CostTable, document: str) -> bytes:
    """Return what ``numpy.savez_compressed`` would write, without the time: equal tables are equal files."""
    buffer = io.BytesIO()
    arrays = {"document": np.frombuffer(document.encode(), np.uint8), **{key: getattr(table, key) for key in _ARRAYS}}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{key}.npy"), part.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of the table in a file."""
    is_archive = _form(path) == ".npz"
    try:
        document = _read_archive(path) if is_archive else json.loads(Path(path).read_bytes())
        return _fields(document)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except (
        *(AttributeError, EOFError, KeyError, OSError, RecursionError, TypeError, ValueError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise CheckpointError(f"{path} is no cost table: {type(error).__name__} {error}.") from error


def _read_archive(path: str | os.PathLike[str]) -> dict[str, Any]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for key in ("document", *_ARRAYS):
            arrays[key] = np.lib.format.read_array(io.BytesIO(archive.read(f"{key}.npy")), allow_pickle=False)
    document: dict[str, Any] = json.loads(arrays.pop("document").tobytes())
    return document | arrays


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    if document["lqlora_cost_table"] != _VERSION:
        raise ValueError(f"its version is {document['lqlora_costs']!r}, this library reads {_VERSION}")
    names = tuple(row["name"] for row in document["matrices"])
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("its names are not one text for each matrix")
    if not isinstance(document["costs"], np.ndarray):
        document["costs"] = [[math.inf if cost is None else cost for cost in row] for row in document["costs"]]
    arrays = {key: np.array(document[key]) for key in _ARRAYS}
    for key, kind in _ARRAYS.items():
        if arrays[key].dtype.kind not in {np.float64: "fi", np.int64: "i"}[kind] or not (arrays[key] >= 0).all():
            raise ValueError(f"its {key} are not numbers of at least 0")
    return {
        "names": names,
        "shapes": tuple(tuple(_whole(length) for length in row["shape"]) for row in document["matrices"]),
        "configurations": [(_format(own), _whole(own["rank"])) for own in document["configurations"]],
        **{key: arrays[key].astype(kind) for key, kind in _ARRAYS.items()},
    }


def _format(own: dict[str, Any]) -> BlockFormat:
    codebook = None
    if "levels" in own:
        codebook = Codebook(own["levels"], codebook_name(own["format"]), own["normalization"])
    return BlockFormat.parse(own["format"], codebook)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
