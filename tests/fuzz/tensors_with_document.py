"""Base of fuzzers of small safetensors files with one JSON document, which are mutated mostly with the right hash."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lqlora.checkpoint._container import digest
from tests.fuzz.mutate import changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import Tensors, as_arrays, content, is_finite, mutated_tensors, read, written

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Parts", "TensorsWithDocument"]


@dataclass(frozen=True)
class Parts:
    """A file in parts: the text of its document, and the dtype, shape and bytes of each tensor."""

    document: str
    tensors: Tensors

    def hashed(self) -> Parts:
        """Return the parts with the fingerprint of their content in the document, if the content has one."""
        try:
            total = digest(as_arrays(self.tensors), json.loads(self.document))
            return replace(self, document=changed(self.document, {"sha256": total}))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            return self

    def mutated(self, rng: random.Random) -> tuple[Parts, str]:
        """Return the parts after one mutation."""
        try:
            if rng.random() < 0.5:
                tensors, said = mutated_tensors(rng, self.tensors)
                return replace(self, tensors=tensors), said
            document, said = mutated_text(rng, self.document)
        except (RecursionError, ValueError):  # it was mutated before
            return self, "nothing"
        return replace(self, document=document), f"document: {said}"


class TensorsWithDocument(ABC):
    """Mutated files of one kind.

    Subclasses name the key of the document, the field with a row for each layer, and the reader.
    """

    key: ClassVar[str]
    rows: ClassVar[str]
    reader: ClassVar[Callable[[Path], Any]]

    def __init__(self) -> None:
        self._count = 0
        self.original = self.parts(self.made())

    @abstractmethod
    def made(self) -> bytes:
        """Return a file that is not damaged."""

    @abstractmethod
    def arrays_of(self, row: dict[str, Any], layer: Any) -> dict[str, Any]:
        """Return the arrays that were read of a layer, after its other fields were compared with its row."""

    def parts(self, data: bytes) -> Parts:
        """Return the parts of a file."""
        metadata, tensors = read(data)
        return Parts(metadata[self.key], tensors)

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated file."""
        parts, said, hashed = self.original, [], rng.random() < 0.8
        if rng.random() < 0.1:
            data, done = mutated_bytes(rng, self._file(parts))
            return self._case(folder, data, f"bytes: {done}", hashed=False)
        for _ in range(rng.choice((1, 1, 2))):
            parts, done = parts.mutated(rng)
            said.append(done)
        made = f"{'hashed' if hashed else 'not hashed'}: {'; '.join(said)}"
        return self._case(folder, self._file(parts.hashed() if hashed else parts), made, hashed=hashed)

    def unchanged(self, folder: Path) -> Case:
        """Return the original file, which must be read."""
        return self._case(folder, self._file(self.original), "unchanged", hashed=False, must="read")

    def own_rows(self) -> dict[str, Any]:
        """Return a copy of the rows of the original."""
        rows: dict[str, Any] = json.loads(self.original.document)[self.rows]
        return rows

    def with_parts(
        self,
        folder: Path,
        made: str,
        rows: dict[str, Any] | None = None,
        tensors: Tensors | None = None,
        must: Literal["", "read", "refuse"] = "",
    ) -> Case:
        """Return a file with other rows or tensors, and the right hash."""
        document = self.original.document if rows is None else changed(self.original.document, {self.rows: rows})
        parts = Parts(document, self.original.tensors if tensors is None else tensors)
        return self._case(folder, self._file(parts.hashed()), made, hashed=True, must=must)

    def _file(self, parts: Parts) -> bytes:
        return written({self.key: parts.document}, parts.tensors)

    def _case(
        self, folder: Path, data: bytes, made: str, *, hashed: bool, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        self._count += 1
        path = folder / f"{self.rows}{self._count % 2}.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        reader = type(self).reader

        def judge(results: dict[str, Any]) -> None:
            for found in results.values():
                self._judge(data, found, hashed=hashed)

        return Case(made, len(data), (path.name,), {f"read_{self.rows}": lambda: reader(path)}, judge, must)

    def _judge(self, data: bytes, found: Any, *, hashed: bool) -> None:
        """Compare the result with the tensors and the document of the file, as NumPy and the standard library read them."""
        parts = self.parts(data)
        arrays, document = as_arrays(parts.tensors), json.loads(parts.document)
        same("hash", digest(arrays, document), document["sha256"])
        layers = getattr(found, self.rows)
        same("layers", list(layers), list(document[self.rows]))
        same("metadata", found.metadata, document["metadata"])
        own = {}
        for name, layer in layers.items():
            row = document[self.rows][name]
            same("base", layer.base, row["base"])
            own |= {f"{name}.{key}": array for key, array in self.arrays_of(row, layer).items()}
        same("tensors", content(own), content(arrays))
        assert all(map(is_finite, own.values())), "a number is not finite"
        if not hashed:
            same("document of a file that was changed", document, json.loads(self.original.document))
