"""Files of interrupted runs: tensors and JSON values, with a fingerprint of what the run depends on.

The metadata of the safetensors file has one JSON document under the key ``lqlora_run``. No pickle is read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lqlora.checkpoint._container import digest, read_document, write_container
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["read_run", "write_run"]

#: Version of the JSON document. A reader refuses every other one.
_SPEC = 1

#: Key of the JSON document in the metadata of a safetensors file.
_KEY = "lqlora_run"


def write_run(path: str | os.PathLike[str], arrays: dict[str, Any], run: str, numbers: Mapping[str, Any]) -> None:
    """Write the state of a run to one file, atomically.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced at the end.
    arrays : dict of str to ndarray
        Tensors by name, in row-major order.
    run : str
        Fingerprint of what the run depends on.
    numbers : mapping
        JSON values.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    """
    from lqlora._documents import Reader, json_values  # noqa: PLC0415 - imports msgspec
    from lqlora.checkpoint._schema import RunContent  # noqa: PLC0415

    document: dict[str, Any] = {
        "spec": _SPEC,
        "run": run,
        "metadata": json_values(numbers, "numbers", InvalidArgumentError),
    }
    document["sha256"] = digest(arrays, document)
    reader = Reader("a run that could not be read again is not saved", InvalidArgumentError)
    write_container(path, arrays, _KEY, reader.write(document, RunContent))


def read_run(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Read a file of :func:`write_run`, and compare its fingerprint.

    Parameters
    ----------
    path : path-like
        File to read.

    Returns
    -------
    (dict of str to ndarray, str, dict)
        The arguments of :func:`write_run`.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or not one of a run.
    """
    from lqlora.checkpoint._schema import RunContent  # noqa: PLC0415 - imports msgspec

    arrays, content, _ = read_document(path, _KEY, "lqlora.nn.distill", _SPEC, RunContent)
    return arrays, content.run, content.metadata
