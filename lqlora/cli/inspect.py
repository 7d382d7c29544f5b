"""Command ``lqlora inspect``: what a model file or a checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lqlora as lq
from lqlora.checkpoint.folder import is_checkpoint
from lqlora.cli import console
from lqlora.integrations.sources import open_model
from lqlora.reports.grouping import kind_and_layer
from lqlora.reports.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["run"]


def run(path: Path, *, as_json: bool) -> None:
    """Print the matrices of a file by kind, and what else it holds.

    Raises
    ------
    LQLoRAError
        If the file cannot be read.
    """
    found = _checkpoint(path) if is_checkpoint(path) else _model(path)
    if as_json:
        console.say_json(found)
        return
    columns = ("shape", "format", "rank", "bytes") if found["kind"] == "checkpoint" else ("shape", "dtype", "bytes")
    console.show_table(_by_kind(found["matrices"], columns))
    matrices, tensors = found["matrices"].values(), found["tensors"].values()
    weights = sum(own["shape"][0] * own["shape"][1] for own in matrices)
    size = sum(own["bytes"] for own in matrices)
    console.say(
        f"{len(matrices)} matrices of {weights:,} weights: {size:,} bytes, {8 * size / max(1, weights):.4f} bits per weight."
    )
    if found["kind"] == "checkpoint":
        console.say(f"Low-rank factors: {sum(own['factor_bytes'] for own in matrices):,} bytes.")
    console.say(f"Other tensors: {len(tensors)}, {sum(own['bytes'] for own in tensors):,} bytes.")
    if found.get("left_out"):
        names = list(found["left_out"])
        size = sum(own["bytes"] for own in found["left_out"].values())
        console.say(
            f"Not part of the model: {len(names)} tensors, {size:,} bytes ({', '.join(names[:3])}{', …' * (len(names) > 3)})."
        )


def _model(path: Path) -> dict[str, Any]:
    contents = open_model(path)
    matrices, tensors = {}, {}
    for name, own in contents.tensors.items():
        entry = {"shape": list(own.shape), "dtype": own.dtype, "bytes": own.nbytes}
        if not own.matrices:
            tensors[name] = entry
        for matrix in own.matrices:
            matrices[matrix] = entry | {"shape": list(own.shape[-2:]), "bytes": own.nbytes // len(own.matrices)}
    left_out = {
        name: {"reason": own.reason, "bytes": own.nbytes}
        for name, own in contents.left_out.items()
        if name not in contents.tensors
    }
    files = [str(file) for file in contents.files]
    return {"kind": "model", "files": files, "matrices": matrices, "tensors": tensors, "left_out": left_out}


def _checkpoint(path: Path) -> dict[str, Any]:
    content = lq.load(path, mapped=True)
    matrices = {
        name: {
            "shape": list(own.quantized.shape),
            "format": str(own.quantized.format),
            "rank": len(own.lora_A),
            "scaling": own.scaling,
            "bytes": own.quantized.nbytes,
            "factor_bytes": own.lora_A.nbytes + own.lora_B.nbytes,
        }
        for name, own in content.matrices.items()
    }
    tensors = {
        name: {"shape": list(own.shape), "dtype": str(own.dtype), "bytes": own.nbytes}
        for name, own in content.tensors.items()
    }
    return {"kind": "checkpoint", "matrices": matrices, "tensors": tensors}


def _by_kind(matrices: Mapping[str, Mapping[str, Any]], columns: tuple[str, ...]) -> Table:
    """Return a row for the matrices of each kind that agree in all columns but the bytes."""
    groups: dict[tuple[str, ...], list[int]] = {}
    texts: dict[str, Callable[[Any], str]] = {"shape": lambda own: " x ".join(map(str, own))}
    for name, own in matrices.items():
        key = kind_and_layer(name)[0], *(texts.get(column, str)(own[column]) for column in columns[:-1])
        groups.setdefault(key, []).append(own["bytes"])
    rows = [(key[0], str(len(sizes)), *key[1:], f"{sum(sizes):,}") for key, sizes in groups.items()]
    return Table(("matrix", "count", *columns), rows)
