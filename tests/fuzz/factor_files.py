"""Fuzzer of files of factors: the JSON document, the tensors and the header of safetensors, mostly with the right hash."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lqlora as lq
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint._container import digest
from lqlora.checkpoint.factors import read_factors, write_factors
from tests.fuzz.mutate import NAMES, Raw, changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import Tensors, as_arrays, content, is_finite, mutated_tensors, read, written

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

__all__ = ["FactorFiles"]

_KEY = "lqlora_factors"


@dataclass(frozen=True)
class _Parts:
    """A file in parts: the text of its document, and the dtype, shape and bytes of each tensor."""

    document: str
    tensors: Tensors


@functools.cache
def _original() -> _Parts:
    """Return a file of three layers."""
    rng = np.random.default_rng(0)
    quantized = lq.quantize(rng.standard_normal((6, 10)).astype(np.float32), lq.BlockFormat.parse("nf4/4:float32"))
    matrices = {
        f"layers.{rank}": StoredMatrix(
            quantized,
            rng.standard_normal((rank, 10)).astype(dtype),
            rng.standard_normal((6, rank)).astype(np.float32),
            1.5,
        )
        for rank, dtype in ((2, np.float32), (0, np.float32), (1, np.float16))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        write_factors(path, matrices, {"seed": 3, "names": ["a", {"b": None}]})
        return _parts(path.read_bytes())


def _parts(data: bytes) -> _Parts:
    metadata, tensors = read(data)
    return _Parts(metadata[_KEY], tensors)


def _file(parts: _Parts) -> bytes:
    return written({_KEY: parts.document}, parts.tensors)


def _hashed(parts: _Parts) -> _Parts:
    """Return the parts with the fingerprint of their content in the document, if the content has one."""
    try:
        total = digest(as_arrays(parts.tensors), json.loads(parts.document))
        return replace(parts, document=changed(parts.document, {"sha256": total}))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return parts


def _mutated(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    """Return the parts after one mutation."""
    try:
        if rng.random() < 0.5:
            tensors, said = mutated_tensors(rng, parts.tensors)
            return replace(parts, tensors=tensors), said
        document, said = mutated_text(rng, parts.document)
    except (RecursionError, ValueError):  # it was mutated before
        return parts, "nothing"
    return replace(parts, document=document), f"document: {said}"


class FactorFiles:
    """Mutated files of factors."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated file."""
        parts, said, hashed = _original(), [], rng.random() < 0.8
        if rng.random() < 0.1:
            data, done = mutated_bytes(rng, _file(parts))
            return self._case(folder, data, f"bytes: {done}", hashed=False)
        for _ in range(rng.choice((1, 1, 2))):
            parts, done = _mutated(rng, parts)
            said.append(done)
        made = f"{'hashed' if hashed else 'not hashed'}: {'; '.join(said)}"
        return self._case(folder, _file(_hashed(parts) if hashed else parts), made, hashed=hashed)

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield files with values that readers often take for something else."""
        original = _original()
        yield self._case(folder, _file(original), "unchanged", hashed=False, must="read")
        fields = {
            "scaling": (None, True, "1", [], *map(Raw, ("NaN", "1e999", "9" * 5000)), -0.0, 1e308),
            "base": (None, 5, [], "", "\x1b[2J" * 300),
        }
        for field, values in fields.items():
            for value in values:
                rows = json.loads(original.document)["factors"]
                rows["layers.2"][field] = value
                parts = replace(original, document=changed(original.document, {"factors": rows}))
                yield self._case(folder, _file(_hashed(parts)), f"{field} is {str(value)[:20]}", hashed=True)
        for name in NAMES if slow else NAMES[:6]:
            tensors = {key.replace("layers.2.", f"{name}."): own for key, own in original.tensors.items()}
            rows = json.loads(original.document)["factors"]
            rows[name] = rows.pop("layers.2")
            parts = _Parts(changed(original.document, {"factors": rows}), tensors)
            yield self._case(folder, _file(_hashed(parts)), f"a layer of the name {name[:9]!r}", hashed=True)
        for dtype, size in (("F8_E4M3", 1), ("F8_E8M0", 1), ("F4", 1), ("C64", 8), ("BOOL", 1), ("\x1b[2J", 1)):
            tensors = original.tensors | {"layers.2.lora_A": (dtype, [2, 10], bytes(20 * size))}
            yield self._case(folder, _file(_hashed(replace(original, tensors=tensors))), dtype, hashed=True)

    def _case(
        self, folder: Path, data: bytes, made: str, *, hashed: bool, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        self._count += 1
        path = folder / f"factors{self._count % 2}.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        judge = functools.partial(_judge, data, hashed)
        return Case(made, len(data), (path.name,), {"read_factors": lambda: read_factors(path)}, judge, must)


def _judge(data: bytes, hashed: bool, results: dict[str, Any]) -> None:
    """Compare the result with the tensors and the document of the file, as NumPy and the standard library read them."""
    for found in results.values():
        parts = _parts(data)
        arrays, document = as_arrays(parts.tensors), json.loads(parts.document)
        same("hash", digest(arrays, document), document["sha256"])
        same("layers", list(found.factors), list(document["factors"]))
        same("metadata", found.metadata, document["metadata"])
        own = {}
        for name, factors in found.factors.items():
            row = document["factors"][name]
            same("scaling", factors.scaling, float(row["scaling"]))
            same("base", factors.base, row["base"])
            own |= {f"{name}.lora_A": factors.lora_A, f"{name}.lora_B": factors.lora_B}
            assert factors.lora_A.shape[0] == factors.lora_B.shape[1], "ranks differ"
        same("tensors", content(own), content(arrays))
        assert all(map(is_finite, own.values())), "a factor is not finite"
        if not hashed:
            same("document of a file that was changed", document, json.loads(_original().document))
