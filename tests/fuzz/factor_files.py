"""Fuzzer of files of factors."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import lqlora as lq
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint.factors import read_factors, write_factors
from tests.fuzz.mutate import NAMES, Raw
from tests.fuzz.running import Case, same
from tests.fuzz.tensors_with_document import TensorsWithDocument

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FactorFiles"]


@functools.cache
def _original() -> bytes:
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
        return path.read_bytes()


class FactorFiles(TensorsWithDocument):
    """Mutated files of factors."""

    key, rows, reader = "lqlora_factors", "factors", read_factors

    def made(self) -> bytes:
        """Return a file that is not damaged."""
        return _original()

    def arrays_of(self, row: dict[str, Any], layer: Any) -> dict[str, Any]:
        """Return the factors of a layer."""
        same("scaling", layer.scaling, float(row["scaling"]))
        assert layer.lora_A.shape[0] == layer.lora_B.shape[1], "ranks differ"
        return {"lora_A": layer.lora_A, "lora_B": layer.lora_B}

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield files with values that readers often take for something else."""
        yield self.unchanged(folder)
        fields = {
            "scaling": (None, True, "1", [], *map(Raw, ("NaN", "1e999", "9" * 5000)), -0.0, 1e308),
            "base": (None, 5, [], "", "\x1b[2J" * 300),
        }
        for field, values in fields.items():
            for value in values:
                rows = self.own_rows()
                rows["layers.2"][field] = value
                yield self.with_parts(folder, f"{field} is {str(value)[:20]}", rows)
        for name in NAMES if slow else NAMES[:6]:
            tensors = {key.replace("layers.2.", f"{name}."): own for key, own in self.original.tensors.items()}
            rows = self.own_rows()
            rows[name] = rows.pop("layers.2")
            yield self.with_parts(folder, f"a layer of the name {name[:9]!r}", rows, tensors)
        for dtype, size in (("F8_E4M3", 1), ("F8_E8M0", 1), ("F4", 1), ("C64", 8), ("BOOL", 1), ("\x1b[2J", 1)):
            tensors = self.original.tensors | {"layers.2.lora_A": (dtype, [2, 10], bytes(20 * size))}
            yield self.with_parts(folder, dtype, tensors=tensors)
