"""Fuzzer of files of scales: the JSON document, the tensors and the header of safetensors, mostly with the right hash."""

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
from lqlora.checkpoint.scales import read_scales, write_scales
from tests.fuzz.mutate import NAMES, Raw, changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import Tensors, as_arrays, content, is_finite, mutated_tensors, read, written

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

__all__ = ["ScaleFiles"]

_KEY = "lqlora_scales"


@dataclass(frozen=True)
class _Parts:
    """A file in parts: the text of its document, and the dtype, shape and bytes of each tensor."""

    document: str
    tensors: Tensors


@functools.cache
def _original() -> _Parts:
    """Return a file of two layers, one of them with factors."""
    rng = np.random.default_rng(0)
    quantized = lq.quantize(rng.standard_normal((6, 10)).astype(np.float32), lq.BlockFormat.parse("affine4/4:float32"))
    factors = rng.standard_normal((2, 10)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float16)
    matrices = {f"layers.{index}": StoredMatrix(quantized, *factors, 1.5) for index in range(2)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        write_scales(path, matrices, ["layers.1"], {"seed": 3, "names": ["a", {"b": None}]})
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


class ScaleFiles:
    """Mutated files of scales."""

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
                rows = json.loads(original.document)["scales"]
                rows["layers.1"][field] = value
                yield self._with(folder, rows, original.tensors, f"{field} is {str(value)[:20]}")
        for name in NAMES if slow else NAMES[:6]:
            tensors = {key.replace("layers.1.", f"{name}."): own for key, own in original.tensors.items()}
            rows = json.loads(original.document)["scales"]
            rows[name] = rows.pop("layers.1")
            yield self._with(folder, rows, tensors, f"a layer of the name {name[:9]!r}")
        without = {key: own for key, own in original.tensors.items() if "lora" not in key}
        rows = json.loads(original.document)["scales"]
        yield self._with(folder, rows, without, "factors are missing", must="refuse")
        del rows["layers.1"]["scaling"]
        yield self._with(folder, rows, original.tensors, "factors without a scaling", must="refuse")
        for dtype, shape in (("F16", [15]), ("F64", [15]), ("F32", [15, 1]), ("F32", []), ("F32", [0])):
            size = {"F16": 2, "F32": 4, "F64": 8}[dtype] * int(np.prod(shape, dtype=int))
            tensors = original.tensors | {"layers.0.scales": (dtype, shape, bytes(size))}
            must: Literal["read", "refuse"] = "read" if (dtype, len(shape)) == ("F32", 1) else "refuse"
            rows = json.loads(original.document)["scales"]
            yield self._with(folder, rows, tensors, f"scales of {dtype} {shape}", must=must)

    def _with(
        self, folder: Path, rows: Any, tensors: Tensors, made: str, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        parts = _Parts(changed(_original().document, {"scales": rows}), tensors)
        return self._case(folder, _file(_hashed(parts)), made, hashed=True, must=must)

    def _case(
        self, folder: Path, data: bytes, made: str, *, hashed: bool, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        self._count += 1
        path = folder / f"scales{self._count % 2}.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        judge = functools.partial(_judge, data, hashed)
        return Case(made, len(data), (path.name,), {"read_scales": lambda: read_scales(path)}, judge, must)


def _judge(data: bytes, hashed: bool, results: dict[str, Any]) -> None:
    """Compare the result with the tensors and the document of the file, as NumPy and the standard library read them."""
    for found in results.values():
        parts = _parts(data)
        arrays, document = as_arrays(parts.tensors), json.loads(parts.document)
        same("hash", digest(arrays, document), document["sha256"])
        same("layers", list(found.scales), list(document["scales"]))
        same("metadata", found.metadata, document["metadata"])
        own = {}
        for name, scales in found.scales.items():
            row = document["scales"][name]
            same("base", scales.base, row["base"])
            own[f"{name}.scales"] = scales.scales
            assert scales.scales.ndim == 1, "scales are not a row"
            same("has factors", scales.factors is not None, "scaling" in row)
            if scales.factors is not None:
                inner, outer, scaling = scales.factors
                same("scaling", scaling, float(row["scaling"]))
                own |= {f"{name}.lora_A": inner, f"{name}.lora_B": outer}
                assert inner.shape[0] == outer.shape[1], "ranks differ"
        same("tensors", content(own), content(arrays))
        assert all(map(is_finite, own.values())), "a number is not finite"
        if not hashed:
            same("document of a file that was changed", document, json.loads(_original().document))
