"""Fuzzer of files of scales."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lqlora as lq
from lqlora.checkpoint import StoredMatrix
from lqlora.checkpoint.scales import read_scales, write_scales
from tests.fuzz.mutate import NAMES, Raw
from tests.fuzz.running import Case, same
from tests.fuzz.tensors_with_document import TensorsWithDocument

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ScaleFiles"]


@functools.cache
def _original() -> bytes:
    """Return a file of two layers, one of them with factors."""
    rng = np.random.default_rng(0)
    quantized = lq.quantize(rng.standard_normal((6, 10)).astype(np.float32), lq.BlockFormat.parse("affine4/4:float32"))
    factors = rng.standard_normal((2, 10)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float16)
    matrices = {f"layers.{index}": StoredMatrix(quantized, *factors, 1.5) for index in range(2)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        write_scales(path, matrices, ["layers.1"], {"seed": 3, "names": ["a", {"b": None}]})
        return path.read_bytes()


class ScaleFiles(TensorsWithDocument):
    """Mutated files of scales."""

    key, rows, reader = "lqlora_scales", "scales", read_scales

    def made(self) -> bytes:
        """Return a file that is not damaged."""
        return _original()

    def arrays_of(self, row: dict[str, Any], layer: Any) -> dict[str, Any]:
        """Return the scales of a layer, and its factors."""
        assert layer.scales.ndim == 1, "scales are not a row"
        same("has factors", layer.factors is not None, "scaling" in row)
        if layer.factors is None:
            return {"scales": layer.scales}
        inner, outer, scaling = layer.factors
        same("scaling", scaling, float(row["scaling"]))
        assert inner.shape[0] == outer.shape[1], "ranks differ"
        return {"scales": layer.scales, "lora_A": inner, "lora_B": outer}

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
                rows["layers.1"][field] = value
                yield self.with_parts(folder, f"{field} is {str(value)[:20]}", rows)
        for name in NAMES if slow else NAMES[:6]:
            tensors = {key.replace("layers.1.", f"{name}."): own for key, own in self.original.tensors.items()}
            rows = self.own_rows()
            rows[name] = rows.pop("layers.1")
            yield self.with_parts(folder, f"a layer of the name {name[:9]!r}", rows, tensors)
        without = {key: own for key, own in self.original.tensors.items() if "lora" not in key}
        yield self.with_parts(folder, "factors are missing", tensors=without, must="refuse")
        rows = self.own_rows()
        del rows["layers.1"]["scaling"]
        yield self.with_parts(folder, "factors without a scaling", rows, must="refuse")
        for dtype, shape in (("F16", [15]), ("F64", [15]), ("F32", [15, 1]), ("F32", []), ("F32", [0])):
            size = {"F16": 2, "F32": 4, "F64": 8}[dtype] * int(np.prod(shape, dtype=int))
            tensors = self.original.tensors | {"layers.0.scales": (dtype, shape, bytes(size))}
            must: Literal["read", "refuse"] = "read" if (dtype, len(shape)) == ("F32", 1) else "refuse"
            yield self.with_parts(folder, f"scales of {dtype} {shape}", tensors=tensors, must=must)
