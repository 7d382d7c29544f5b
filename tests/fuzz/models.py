"""Fuzzer of models of other programs: safetensors files in parts, with an index, that are read matrix by matrix."""

from __future__ import annotations

import functools
import json
import re
import shutil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lqlora as lq
from lqlora.integrations.bitsandbytes import to_bitsandbytes
from lqlora.integrations.sources import open_weights
from tests.fuzz.mutate import Raw, changed, mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import DTYPES, Tensors, as_arrays, mutated_tensors, read, written

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Models"]

_PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _stored(arrays: dict[str, np.ndarray]) -> Tensors:
    return {name: (_DTYPE_NAMES[own.dtype], list(own.shape), own.tobytes()) for name, own in arrays.items()}


@functools.cache
def original() -> dict[str, bytes]:
    """Return the files of a model: two parts and their index. One weight is quantized by bitsandbytes."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 10)).astype(np.float32)
    first = {"layers.0.up.weight": w, "layers.0.down.weight": w.T.astype(DTYPES["BF16"]), "norm.weight": w[0]}
    second = {
        "layers.1.up.weight": w.astype(np.float16),
        "experts": w.reshape(3, 4, 5),
        "layers.1.up.lora_A.weight": w[:2],
    }
    coded = to_bitsandbytes(lq.quantize(w, lq.BlockFormat.parse("nf4/32:float32")), "layers.1.down.weight")
    parts = {_PARTS[0]: _stored(first), _PARTS[1]: _stored({**second, **coded})}
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    files = {file: written({"format": "pt"}, own) for file, own in parts.items()}
    return {**files, _INDEX: json.dumps(index).encode()}


class Models:
    """Mutated models."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a model of which one file is mutated."""
        files = dict(original())
        kind, name = rng.random(), rng.choice(_PARTS)
        if kind < 0.3:
            text, said = mutated_text(rng, files[_INDEX].decode())
            files[_INDEX] = text.encode("utf-8", errors="surrogatepass")
            return self._case(folder, files, f"index: {said}")
        if kind < 0.4:
            del files[rng.choice(list(files))]
            return self._case(folder, files, "a file is missing")
        if kind < 0.85:
            metadata, tensors = read(files[name])
            tensors, said = mutated_tensors(rng, tensors)
            files[name] = written(metadata, tensors)
        elif kind < 0.95:
            data = files[name]
            length = int.from_bytes(data[:8], "little")
            header, said = mutated_text(rng, data[8 : 8 + length].decode())
            coded = header.encode("utf-8", errors="surrogatepass")
            files[name] = len(coded).to_bytes(8, "little") + coded + data[8 + length :]
        else:
            files[name], said = mutated_bytes(rng, files[name])
        if rng.random() < 0.5:  # then the parts belong together by their names
            del files[_INDEX]
        return self._case(folder, files, f"{name}: {said}")

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield models of which too little or too much was once read, or that ended in an error of another library."""
        files = original()
        index = files[_INDEX].decode()
        names = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")
        yield self._case(folder, files, "unchanged", "read", names)
        yield self._case(folder, {name: files[name] for name in _PARTS}, "no index", "read", names)
        whole = written({}, read(files[_PARTS[0]])[1])
        for other in ("consolidated.safetensors", "adapter_model.safetensors", "copy.safetensors"):
            yield self._case(folder, {**files, other: whole}, f"{other} beside", "read", names)
        yield self._case(folder, {_PARTS[0]: files[_PARTS[0]]}, "one part of two", "refuse")
        yield self._case(
            folder, {_PARTS[0]: files[_PARTS[0]], _INDEX: files[_INDEX]}, "one part and the index", "refuse"
        )
        w = np.ones((8, 8), dtype=np.float32)
        coded = {
            "float8": {"up.weight": w.astype(DTYPES["F8_E4M3"]), "up.weight_scale_inv": w[:1]},
            "GPTQ": {
                "up.qweight": w.astype(np.int32),
                "up.scales": w.astype(np.float16),
                "up.qzeros": w.astype(np.int32),
            },
        }
        for made, arrays in coded.items():
            yield self._case(folder, {"model.safetensors": written({}, _stored(arrays))}, made, "refuse")
        d = lq.decompose(w, lq.BlockFormat.parse("nf4/4"), rank=1)
        lq.save(folder / "own.safetensors", {"up": d})
        own = {"model.safetensors": (folder / "own.safetensors").read_bytes()}
        yield self._case(folder, own, "a checkpoint of lqlora", "refuse")
        for value in (
            None,
            5,
            [],
            "x",
            {},
            {"up": 5},
            {"up": "../x.safetensors"},
            {"up": "a\0.safetensors"},
            Raw("[" * 100_000),
        ):
            made = changed(index, {"weight_map": value}).encode()
            yield self._case(folder, {**files, _INDEX: made}, f"weight_map {str(value)[:20]}")
        for text in (
            b"",
            b"null",
            b"5",
            b"\xff",
            b"[" * 100_000,
            json.dumps({"weight_map": {"\x1b[2J" * 200: "\x1b[2J" * 200}}).encode(),
        ):
            yield self._case(folder, {**files, _INDEX: text}, f"index {text[:9]!r}")
        for name in ("\x1b[2J" * 200, "\u202e.weight", "", "x" * 10_000, ".weight"):
            tensors = _stored({name: w, "scales_of_nothing": w})
            yield self._case(folder, {"model.safetensors": written({}, tensors)}, f"a tensor {name[:9]!r}")
            tensors = _stored({f"{name}.weight_scale": w})
            yield self._case(folder, {"model.safetensors": written({}, tensors)}, f"scales of {name[:9]!r}")
        tensors = _stored({"up": w, "up.weight": w})
        yield self._case(folder, {"model.safetensors": written({}, tensors)}, "two matrices of one name", "refuse")

    def _case(
        self,
        folder: Path,
        files: dict[str, bytes],
        made: str,
        must: Literal["", "read", "refuse"] = "",
        names: tuple[str, ...] | None = None,
    ) -> Case:
        self._count += 1
        path = folder / f"model{self._count % 2}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        readers: dict[str, Callable[[], Any]] = {"open_weights": lambda: _matrices(path)}
        judge = functools.partial(_judge, files, names)
        return Case(made, sum(map(len, files.values())), (path.name,), readers, judge, must)


def _matrices(path: Path) -> dict[str, Any]:
    """Return all matrices of a model, as ``cost_table`` reads them."""
    return {name: load() for name, load in open_weights(path, exclude=()).items()}


def _judge(files: dict[str, bytes], names: tuple[str, ...] | None, results: dict[str, Any]) -> None:
    if "open_weights" not in results:
        return
    found = results["open_weights"]
    if names is not None:
        same("names of matrices", sorted(found), sorted(names))
    for name, values in found.items():
        assert values.ndim == 2, f"{name!r} has the shape {values.shape}"
        assert values.dtype == np.float32, f"{name!r} is of dtype {values.dtype}"
        keys = [key for key in (name, f"{name}.weight") if not re.search("lora_[AB]", key)]
        stored = [own[key] for own in map(_arrays_of, files.items()) for key in keys if key in own]
        array, _, index = name.rpartition(".")
        if index.isdigit():  # one of an array of experts
            arrays = [
                own[key] for own in map(_arrays_of, files.items()) for key in (array, f"{array}.weight") if key in own
            ]
            stored += [own[int(index)] for own in arrays if own.ndim == 3 and int(index) < len(own)]
        with np.errstate(all="ignore"):
            wanted = [own.astype(np.float32).tobytes() for own in stored if own.dtype != np.uint8]
        assert values.tobytes() in wanted or any(own.dtype == np.uint8 for own in stored), (
            f"{name!r} is not in the files"
        )


def _arrays_of(file: tuple[str, bytes]) -> dict[str, np.ndarray]:
    """Return the arrays of a file that NumPy can hold."""
    name, data = file
    if name == _INDEX:
        return {}
    try:
        return as_arrays(read(data)[1])
    except (KeyError, RecursionError, TypeError, ValueError):
        return {}
