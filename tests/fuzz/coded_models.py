"""Fuzzer of models whose weights are codes and scales: GPTQ, compressed-tensors and float8, with the configuration that describes them."""

from __future__ import annotations

import functools
import json
import shutil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lqlora as lq
from lqlora.integrations.compressed_tensors import to_compressed_tensors
from lqlora.integrations.gptq import to_gptq
from lqlora.integrations.sources import open_weights
from tests.fuzz.mutate import mutated_bytes, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import DTYPES, Tensors, as_arrays, mutated_tensors, read, written

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["CodedModels"]

_MODEL, _CONFIG = "model.safetensors", "config.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SETTINGS = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "weight_block_size": [4, 8]}
_NAMES = ("by_block", "by_row", "four", "packed", "plain", "three", "two")


def _stored(arrays: dict[str, np.ndarray]) -> Tensors:
    return {name: (_DTYPE_NAMES[own.dtype], list(own.shape), own.tobytes()) for name, own in arrays.items()}


@functools.cache
def original() -> dict[str, bytes]:
    """Return the files of a model with a weight of each layout."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32)

    def coded(text: str, *shape: int) -> lq.QuantizedArray:
        return lq.quantize(values(*shape), lq.BlockFormat.parse(text))

    arrays = {
        **to_gptq(coded("affine4/8:float16", 8, 16), "four", checkpoint_format="gptq_v2"),
        **to_gptq(coded("affine2/16:float16", 16, 32), "two", checkpoint_format="gptq_v2"),
        **to_compressed_tensors(coded("affine3/16:float16", 5, 32), "three.weight"),
        **to_compressed_tensors(coded("affine8/8:float32", 3, 32), "packed.weight"),
        "by_row.weight": values(6, 5).astype(DTYPES["F8_E4M3"]),
        "by_row.weight_scale": np.abs(values(6, 1)),
        "by_block.weight": values(9, 10).astype(DTYPES["F8_E5M2"]),
        "by_block.weight_scale_inv": np.abs(values(3, 2)),
        "by_block.input_scale": values(1),
        "plain.weight": values(4, 6),
    }
    del arrays["packed.weight_zero_point"]
    config = {"model_type": "llama", "quantization_config": _SETTINGS}
    return {_MODEL: written({"format": "pt"}, _stored(arrays)), _CONFIG: json.dumps(config).encode()}


class CodedModels:
    """Mutated models."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a model of which one file is mutated."""
        files = dict(original())
        kind = rng.random()
        if kind < 0.2:
            text, said = mutated_text(rng, files[_CONFIG].decode())
            files[_CONFIG] = text.encode("utf-8", errors="surrogatepass")
        elif kind < 0.85:
            metadata, tensors = read(files[_MODEL])
            tensors, said = mutated_tensors(rng, tensors)
            files[_MODEL] = written(metadata, tensors)
        elif kind < 0.95:
            data = files[_MODEL]
            length = int.from_bytes(data[:8], "little")
            header, said = mutated_text(rng, data[8 : 8 + length].decode())
            coded = header.encode("utf-8", errors="surrogatepass")
            files[_MODEL] = len(coded).to_bytes(8, "little") + coded + data[8 + length :]
        else:
            files[_MODEL], said = mutated_bytes(rng, files[_MODEL])
        return self._case(folder, files, said)

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield models that must be read or refused."""
        files = original()
        yield self._case(folder, files, "unchanged", "read")
        without = {"model_type": "llama"}
        yield self._case(folder, {**files, _CONFIG: json.dumps(without).encode()}, "no settings", "refuse")
        for key, value in (("checkpoint_format", "marlin"), ("checkpoint_format", None), ("quant_method", "awq")):
            made = {**without, "quantization_config": _SETTINGS | {key: value}}
            yield self._case(folder, {**files, _CONFIG: json.dumps(made).encode()}, f"{key} {value}", "refuse")
        metadata, tensors = read(files[_MODEL])
        for lost in tensors:
            few = {name: own for name, own in tensors.items() if name != lost}
            yield self._case(folder, {**files, _MODEL: written(metadata, few)}, f"without {lost}")

    def _case(self, folder: Path, files: dict[str, bytes], made: str, must: Literal["", "read", "refuse"] = "") -> Case:
        self._count += 1
        path = folder / f"coded{self._count % 2}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        readers: dict[str, Callable[[], Any]] = {"open_weights": lambda: _matrices(path)}
        judge = functools.partial(_judge, files, must)
        return Case(made, sum(map(len, files.values())), (path.name,), readers, judge, must)


def _matrices(path: Path) -> dict[str, Any]:
    """Return all matrices of a model, as ``cost_table`` reads them."""
    return {name: load() for name, load in open_weights(path, exclude=()).items()}


def _judge(files: dict[str, bytes], must: str, results: dict[str, Any]) -> None:
    if "open_weights" not in results:
        return
    found, arrays = results["open_weights"], as_arrays(read(files[_MODEL])[1])
    if must == "read":
        same("names of matrices", sorted(found), sorted(_NAMES))
    try:
        config = json.loads(files[_CONFIG])
    except ValueError:
        config = {}
    settings = config.get("quantization_config") if isinstance(config, dict) else {}
    settings = settings if isinstance(settings, dict) else {}
    for name, values in found.items():
        with np.errstate(all="ignore"):
            expected = _decoded(arrays, name, settings)
        assert values.shape == expected.shape, f"{name!r} has the shape {values.shape}, not {expected.shape}"
        assert values.tobytes() == expected.tobytes(), f"{name!r} has other values than the files"


def _decoded(arrays: dict[str, np.ndarray], name: str, settings: dict[str, Any]) -> np.ndarray:
    """Return a weight number by number, as the layouts are described."""
    prefix = f"{name}." if name else ""
    if f"{prefix}qweight" in arrays:
        words, zeros, scales, index = (arrays[f"{prefix}{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))
        columns, rows = len(index), scales.shape[1]
        bits = next(own for own in (2, 3, 4, 8) if columns * own == 32 * len(words))
        less = 1 if settings.get("checkpoint_format", "gptq") == "gptq" else 0
        codes = np.array([_codes(words[:, row], bits, columns) for row in range(rows)])
        points = np.array([_codes(own, bits, rows) for own in zeros]) + less
        return _product(scales.T[:, index], codes - points.T[:, index])
    if f"{name}.weight_packed" in arrays:
        words, scales = arrays[f"{name}.weight_packed"], arrays[f"{name}.weight_scale"]
        rows, columns = map(int, arrays[f"{name}.weight_shape"])
        zeros = arrays.get(f"{name}.weight_zero_point")
        bits = next(
            own
            for own in range(1, 9)
            if -(-columns * own // 32) == words.shape[1] and (zeros is None or -(-rows * own // 32) == len(zeros))
        )
        codes = np.array([_codes(own, bits, columns) for own in words])
        points = (
            np.full((1, 1), 2 ** (bits - 1))
            if zeros is None
            else np.array([_codes(own, bits, rows) for own in zeros.T]).T
        )
        group = np.arange(columns) // (columns // scales.shape[1])
        return _product(scales[:, group], codes - (points[:, group] if zeros is not None else points))
    weight = arrays[name] if name in arrays and f"{prefix}weight" not in arrays else arrays[f"{prefix}weight"]
    if weight.dtype.itemsize > 1:
        return weight.astype(np.float32)
    key = next(own for own in ("weight_scale_inv", "weight_scale") if f"{prefix}{own}" in arrays)
    scales = arrays[f"{prefix}{key}"].astype(np.float32)
    (rows, columns), stated = weight.shape, settings.get("weight_block_size")
    is_size = isinstance(stated, list) and len(stated) == 2 and all(type(own) is int and own > 0 for own in stated)
    high, wide = stated if is_size else (128, 128)
    if scales.size == 1:
        spread = np.broadcast_to(scales.reshape(1, 1), weight.shape)
    elif scales.shape in ((rows,), (rows, 1)):
        spread = np.broadcast_to(scales.reshape(-1, 1), weight.shape)
    else:
        spread = scales[np.arange(rows)[:, None] // high, np.arange(columns) // wide]
    return weight.astype(np.float32) * spread


def _codes(words: np.ndarray, bits: int, count: int) -> list[int]:
    stream = int.from_bytes(np.ascontiguousarray(words).astype("<i4").tobytes(), "little")
    return [stream >> number * bits & 2**bits - 1 for number in range(count)]


def _product(scales: np.ndarray, differences: np.ndarray) -> np.ndarray:
    found: np.ndarray = scales.astype(np.float32) * differences.astype(np.float32)
    return found
