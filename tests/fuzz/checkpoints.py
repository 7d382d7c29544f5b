"""Fuzzer of checkpoints: the JSON document, the tensors and the header of safetensors, mostly with the right hash."""

from __future__ import annotations

import functools
import json
import math
import operator
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

import lqlora as lq
from lqlora._optional import is_installed
from lqlora.checkpoint._container import digest
from tests.fuzz.mutate import Pairs, Raw, changed, mutated_bytes, mutated_text, to_json
from tests.fuzz.running import Case, same
from tests.fuzz.safetensors_files import (
    DTYPES,
    Tensors,
    as_arrays,
    content,
    is_finite,
    mutated_tensors,
    read,
    with_value,
    written,
)
from tests.fuzz.spelling import canonical

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

__all__ = ["Checkpoints"]

_SPELLINGS = (
    *(
        "nf4",
        "nf4/0:float32",
        "nf3/16:float16",
        "nf4/4@0:float32",
        "nf4/4@-1:float32",
        "nf4/4@7:float32",
        "nf2/7:bfloat16",
    ),
    *("nf4+fit/4:float32", "nf4+fit1/4@-1:float32", "nf4+fit/4@-9:float32", "affine4/4:float32", "bof4s-64/4:float32"),
    *(
        "int5/8:u8/16:float16",
        "nf4/4:u8+none/4:float32",
        "nf4/4:d8/256:float32",
        "nf4/4:l3/1:float16",
        "log8/4:float32",
    ),
    *("nf8/1:u3+none/4:u8/256:bfloat16", "nf4/4:" + "u8/2:" * 7 + "float32", "nf4/4:" + "u8/2:" * 50 + "float32"),
    *("e2m1/32:float16", "af4-64/64:float32", "bof4-64/64:float32", "sf4-3/64:float32", "sf4-9999999999/64:float32"),
    *(
        "bof8-9999999999/64:float32",
        "nf4/999999999999999999:float32",
        "ternary/5:u8/256:float32",
        "x/4",
        "nf4/4:\x1b[31m",
    ),
    *(
        "\u0661/4",
        "nf4/\u0664:float32",
        "nf4 /4",
        " nf4/4:float32\n",
        "NF4/4:float32",
        "fp4-bnb/4:float32",
        "uint1/4:u1/1:float32",
    ),
)


@dataclass(frozen=True)
class _Parts:
    """A checkpoint in parts: the text of its document, and the dtype, shape and bytes of each tensor."""

    document: str
    tensors: Tensors


@functools.cache
def originals() -> tuple[_Parts, ...]:
    """Return checkpoints of several formats, one of them of a torch model with tied weights if torch is installed."""
    rng = np.random.default_rng(0)
    ternary = lq.BlockFormat(lq.Codebook([-1, 0, 1], name="ternary"), 5, lq.ScaleFormat(8, 256))
    spellings = (
        "nf4/4:float32",
        "nf3/16:float16",
        "affine4/5@-1:bfloat16",
        "nf2+fit2/4@-1:u8/16:float32",
        "bof4s-64/8:i8/4:float16",
    )
    matrices = {}
    for i, fmt in enumerate([*map(lq.BlockFormat.parse, spellings), ternary]):
        w = rng.standard_normal((6, 10)).astype(np.float32)
        matrices[f"layers.{i}"] = lq.decompose(w, fmt, rank=i % 3, max_iter=1)
    tensors = {
        "norm": np.arange(5, dtype=np.float32),
        "half": np.ones((2, 2), dtype=ml_dtypes.bfloat16),
        "steps": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        lq.save(path, matrices, tensors, {"seed": 3, "names": ["a", {"b": None}]})
        found = [_parts(path.read_bytes())]
        lq.save(path, {"m": matrices["layers.0"]})
        found.append(_parts(path.read_bytes()))
        # Matrices of one format and shape are checked together.
        lq.save(path, {f"{name}.{i}": matrix for name, matrix in matrices.items() for i in range(3)})
        found.append(_parts(path.read_bytes()))
        if is_installed("torch"):
            lq.nn.save_model(path, _quantized_model())
            found.append(_parts(path.read_bytes()))
    return tuple(found)


def _model() -> Any:
    import torch

    model = torch.nn.ModuleDict(
        {
            "up": torch.nn.Linear(8, 6),
            "norm": torch.nn.LayerNorm(6),
            "last": torch.nn.LayerNorm(6),
            "head": torch.nn.Linear(6, 4),
        }
    )
    model["last"].weight = model["norm"].weight
    return model


def _quantized_model() -> Any:
    import torch

    torch.manual_seed(0)
    model = _model()
    lq.nn.quantize_model(model, lq.BlockFormat.parse("nf4/4:float32"), rank=1, include=["up", "head"])
    return model


class Checkpoints:
    """Mutated checkpoints."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated checkpoint."""
        original = rng.choice(originals())
        parts, said = original, []
        header: str | None = None
        kind = rng.random()
        if kind < 0.8:
            changes = [
                _change_document,
                _change_spelling,
                _change_tensors,
                _change_tensors,
            ]
            for _ in range(rng.choice((1, 1, 2, 3))):
                parts, done = rng.choice(changes)(rng, parts)
                said.append(done)
            hashed = rng.random() < 0.75
            data = _file(_hashed(parts) if hashed else parts)
        else:
            hashed, data = False, _file(parts)
            length = int.from_bytes(data[:8], "little")
            if kind < 0.93:
                header, done = mutated_text(rng, data[8 : 8 + length].decode())
                coded = header.encode("utf-8", errors="surrogatepass")
                stored = rng.choice((len(coded),) * 8 + (0, 2**62, 2**64 - 1, len(coded) + 1))
                data = stored.to_bytes(8, "little") + coded + data[8 + length :]
            else:
                data, done = mutated_bytes(rng, data)
            said.append(f"header: {done}" if header is not None else done)
        return self._case(
            folder, data, f"{'hashed' if hashed else 'not hashed'}: {'; '.join(said)}", original, hashed=hashed
        )

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield checkpoints that were once read wrong, or ended in an error of another library."""
        for original in originals():
            yield self._case(folder, _file(original), "unchanged", original, hashed=False, must="read")
        first = originals()[0]
        for parts, made in _corpus_of_parts(first):
            for hashed in (True, False) if slow else (True,):
                data = _file(_hashed(parts) if hashed else parts)
                yield self._case(folder, data, made, first, hashed=hashed)
        # The fingerprint was once of texts without their lengths, so that these two had the same.
        split = {"x": ("U8", [5], b"ABCDE"), "y": ("U8", [1], b"Z")}
        joined = {"x uint8 (5,)\nABCDEy": ("U8", [1], b"Z")}
        parts = replace(_hashed(replace(first, tensors=first.tensors | split)), tensors=first.tensors | joined)
        yield self._case(folder, _file(parts), "another content with the same hash", first, hashed=False)
        data = _file(first)
        for changed_data, made in _corpus_of_bytes(data):
            yield self._case(folder, changed_data, made, first, hashed=False)
        for original in [own for own in originals() if '"tied' in own.document]:
            complex_bias = ("C64", [6], bytes(48))
            parts = _hashed(replace(original, tensors=original.tensors | {"norm.bias": complex_bias}))
            yield self._case(folder, _file(parts), "a complex tensor of a real model", original, hashed=True)
            for tied in (
                {"last.weight": 5},
                {"2.bias": 5},
                {"last.weight": None},
                {"last.weight": []},
                {"last.weight": "up"},
                5,
                [],
            ):
                document = json.loads(original.document)
                for key in [key for key in document["metadata"] if "tied" in key]:
                    document["metadata"][key] = tied
                parts = _hashed(replace(original, document=json.dumps(document)))
                yield self._case(folder, _file(parts), f"ties {tied}", original, hashed=True)

    def _case(
        self,
        folder: Path,
        data: bytes,
        made: str,
        original: _Parts,
        *,
        hashed: bool,
        must: Literal["", "read", "refuse"] = "",
    ) -> Case:
        self._count += 1
        path = folder / f"model{self._count % 2}.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        readers: dict[str, Callable[[], Any]] = {
            "load": lambda: lq.load(path),
            "load mapped": lambda: lq.load(path, mapped=True),
            "verify": lambda: lq.verify(path),
        }
        if '"tied' in original.document:
            readers["load_model"] = lambda: lq.nn.load_model(path, _model())
        judge = functools.partial(_judge, folder, data, original, hashed, self._count % 10 == 0)
        return Case(made, len(data), (path.name,), readers, judge, must)


def _corpus_of_parts(first: _Parts) -> Iterator[tuple[_Parts, str]]:
    document, name = first.document, next(iter(json.loads(first.document)["matrices"]))
    row = json.loads(document)["matrices"][name]
    for key, values in (
        ("spec", (None, True, 2.0, "2", 3, Raw("9" * 5000))),
        (
            "matrices",
            (
                None,
                5,
                [],
                "x",
                Raw("[" * 100_000),
                Pairs([(name, 5)]),
                Pairs([(name, [])]),
                Pairs([("\x1b[2J" * 200, row)]),
            ),
        ),
        (
            "metadata",
            (None, 5, [], Raw("NaN"), Pairs([("a", Raw("NaN"))]), Pairs([("\ud800", "\ud800")]), Raw("[" * 100_000)),
        ),
        ("sha256", (None, 5, [], "", "0" * 64, "\x1b[2J")),
    ):
        for value in values:
            yield replace(first, document=changed(document, {key: value})), f"{key} is {str(value)[:9]}"
    fields = {
        "format": (*_SPELLINGS, None, 5, [], "\x1b[2J" * 300, "x" * 10_000),
        "shape": (
            [2**62, 2**62],
            [2**31 - 1] * 2,
            [0, 2**30],
            [6],
            [6, 10, 1],
            [6.0, 10],
            [True, 10],
            ["6", 10],
            5,
            None,
            [-6, -10],
        ),
        "scaling": (None, True, "1", [], *map(Raw, ("NaN", "1e999", "9" * 5000, "1" + "0" * 400)), -0.0, 1e308),
        "normalization": (None, 5, "signed", "affine", [], "\x1b[2J" * 300),
    }
    for field, values in fields.items():
        for value in values:
            for own in (name, "layers.5"):
                matrices = json.loads(document)["matrices"]
                matrices[own][field] = value
                yield (
                    replace(first, document=changed(document, {"matrices": matrices})),
                    f"{field} is {str(value)[:20]}",
                )
    yield _many_codebooks(), "100 codebooks that take long to make"
    yield from _corpus_of_tensors(first)


def _corpus_of_tensors(first: _Parts) -> Iterator[tuple[_Parts, str]]:
    for key in (
        "\x1b[2J" * 200,
        "",
        "layers.0.quantized.\x1b[31m",
        "layers.0.quantized." + "x" * 500,
        "\u202e",
        "\x00",
    ):
        yield replace(first, tensors=first.tensors | {key: ("F32", [1], bytes(4))}), f"a tensor of the name {key[:9]!r}"
    for value in (np.nan, np.inf, -1.0, 3e38):
        for key in (
            "layers.0.quantized.scales",
            "layers.3.quantized.scales.offset",
            "layers.3.quantized.levels",
            "layers.5.quantized.codebook",
        ):
            yield replace(first, tensors=with_value(first.tensors, key, 0, value)), f"{key} has {value}"
    for dtype, size in (
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("F8_E8M0", 1),
        ("F4", 1),
        ("C64", 8),
        ("I7", 1),
        ("\x1b[2J", 1),
    ):
        yield replace(first, tensors=first.tensors | {"x": (dtype, [8 // size], bytes(8))}), f"a tensor of {dtype!r}"


def _many_codebooks() -> _Parts:
    """Return a small checkpoint with 100 codebooks, each of which takes a tenth of a second to compute."""
    row = {"shape": [6, 10], "scaling": 1.0, "normalization": "absmax"}
    parts = {
        "quantized.codes": ("U8", [60], bytes(60)),
        "quantized.scales": ("F32", [15], bytes(60)),
        "lora_A": ("F32", [0, 10], b""),
        "lora_B": ("F32", [6, 0], b""),
    }
    rows = {f"m{i}": row | {"format": f"bof8-{1000 + i}/4:float32"} for i in range(100)}
    tensors = {f"{name}.{key}": own for name in rows for key, own in parts.items()}
    return _Parts(json.dumps({"spec": 2, "matrices": rows, "metadata": {}, "sha256": ""}), tensors)


def _corpus_of_bytes(data: bytes) -> Iterator[tuple[bytes, str]]:
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    def put(changes: dict[str, Any]) -> bytes:
        coded = to_json(header | changes).encode("utf-8", errors="surrogatepass")
        return len(coded).to_bytes(8, "little") + coded + rest

    for offsets in (
        [0, 2**62],
        [2**62, 2**62 + 20],
        [-1, 20],
        [20, 0],
        [0],
        [0, 20, 40],
        None,
        "x",
        [0.0, 20.0],
        [0, 10**20],
    ):
        yield put({"norm": header["norm"] | {"data_offsets": offsets}}), f"offsets {offsets}"
    for shape in ([2**62], [2**32, 2**32], [2**63, 2], [-5], [5.0], None, [[5]], [1] * 10_000, [5] + [1] * 100):
        yield put({"norm": header["norm"] | {"shape": shape}}), f"shape {str(shape)[:20]} of a tensor"
    for value in (
        None,
        5,
        {},
        [],
        {"lqlora": 5},
        {"lqlora": None},
        {"lqlora": ""},
        {"lqlora": "{}"},
        {"lqlora": "\x1b[2J"},
        {"a": "b"},
    ):
        yield put({"__metadata__": value}), f"metadata {value}"
    yield put({"norm": header["half"]}), "two tensors of the same bytes"
    for text in (
        b"",
        b"\0" * 8,
        b"\xff" * 16,
        (2**40).to_bytes(8, "little") + b"{}",
        b"version https://git-lfs",
        b"PK\x03\x04",
    ):
        yield text, f"bytes {text[:9]!r}"
    for nested in (b"[" * 100_000, b'{"a":' * 100_000, b"{" + b'"a":1,' * 100_000 + b'"b":2}'):
        yield len(nested).to_bytes(8, "little") + nested, f"header {nested[:9]!r}"
    for cut in (1, len(rest), len(data) - 8, len(data) - 4):
        yield data[: len(data) - cut], f"{cut} bytes less"
    yield data + b"\0", "one byte more"


def _parts(data: bytes) -> _Parts:
    """Return the parts of a file, or raise an error of Python."""
    metadata, tensors = read(data)
    return _Parts(metadata["lqlora"], tensors)


def _file(parts: _Parts) -> bytes:
    return written({"lqlora": parts.document}, parts.tensors)


def _hashed(parts: _Parts) -> _Parts:
    """Return the parts with the fingerprint of their content in the document, if the content has one."""
    try:
        document = json.loads(parts.document)
        total = digest(as_arrays(parts.tensors), document)
        return replace(parts, document=changed(parts.document, {"sha256": total}))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return parts


def _change_document(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    try:
        document, said = mutated_text(rng, parts.document)
    except (RecursionError, ValueError):  # it was mutated before
        return parts, "nothing"
    return replace(parts, document=document), f"document: {said}"


def _change_tensors(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    tensors, said = mutated_tensors(rng, parts.tensors)
    return replace(parts, tensors=tensors), said


def _change_spelling(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    """Change the format of a matrix, and most often the tensors with it, so that they fit."""
    try:
        document = json.loads(parts.document)
        name = rng.choice(list(document["matrices"]))
        row = document["matrices"][name]
        text = rng.choice(_SPELLINGS)
        row["format"] = text
        if rng.random() < 0.3:
            row["shape"] = rng.choice(([10, 6], [6, 9], [60, 1], [0, 10], [1, 60], [5, 12]))
        parts = replace(parts, document=json.dumps(document))
        stored = lq.BlockFormat.parse(text).stored_arrays([operator.index(length) for length in row["shape"]])
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return parts, "format that does not exist"
    tensors = {key: own for key, own in parts.tensors.items() if not key.startswith(f"{name}.quantized.")}
    names = {dtype.name: key for key, dtype in DTYPES.items()}
    for key, (dtype, shape) in stored.items():
        if math.prod(shape) < 10_000:
            values = np.frombuffer(rng.randbytes(math.prod(shape)), dtype=np.uint8)
            array = values if dtype == "uint8" else (np.sort(values) / 7).astype(DTYPES[names[dtype]])
            tensors[f"{name}.quantized.{key}"] = (names[dtype], list(shape), array.tobytes())
    return replace(parts, tensors=tensors), f"format {text!r} of shape {row['shape']}"


def _judge(folder: Path, data: bytes, original: _Parts, hashed: bool, again: bool, results: dict[str, Any]) -> None:
    if not results:
        return
    parts = _parts(data)
    arrays, document = as_arrays(parts.tensors), json.loads(parts.document)
    for name, found in results.items():
        _compare(name, found, arrays, document)
        if again:
            lq.save(folder / "again.safetensors", found.matrices, found.tensors, found.metadata)
            _compare("save and load", lq.load(folder / "again.safetensors"), arrays, document)
    if "verify" in results:
        same("hash of a verified file", digest(arrays, document), document["sha256"])
        for name, array in arrays.items():
            assert is_finite(array), f"verify passed {name!r}, which is not finite"
        if not hashed:
            same("document of a file that was changed", document, json.loads(original.document))
            same("tensors of a file that was changed", content(arrays), content(as_arrays(original.tensors)))
    else:
        whole = set(arrays) and "load" in results and _is_hashed(arrays, document)
        assert not whole or not all(map(is_finite, arrays.values())), "verify refused a file with the right hash"


def _is_hashed(arrays: dict[str, np.ndarray], document: dict[str, Any]) -> bool:
    try:
        return bool(digest(arrays, document) == document.get("sha256"))
    except ValueError:  # a number like 1e400 is infinite, and no document with one is written
        return False


def _compare(reader: str, found: Any, arrays: dict[str, np.ndarray], document: dict[str, Any]) -> None:
    """Compare a checkpoint with the tensors and the document of its file, as NumPy and the standard library read them."""
    rows, left = document["matrices"], content(arrays)
    same(f"{reader}: names of matrices", list(found.matrices), list(rows))
    same(f"{reader}: metadata", found.metadata, document["metadata"])
    for name, matrix in found.matrices.items():
        same(f"{reader}: format", canonical(str(matrix.quantized.format)), canonical(rows[name]["format"]))
        same(f"{reader}: shape", matrix.quantized.shape, rows[name]["shape"])
        same(f"{reader}: scaling", matrix.scaling, float(rows[name]["scaling"]))
        own = {f"{name}.quantized.{key}": array for key, array in matrix.quantized.to_arrays().items()}
        own |= {f"{name}.lora_A": matrix.lora_A, f"{name}.lora_B": matrix.lora_B}
        if f"{name}.quantized.codebook" in left:
            own[f"{name}.quantized.codebook"] = matrix.quantized.codebook.levels
        for key, stored in content(own).items():
            same(f"{reader}: {key}", stored, left.pop(key))
        _check_decoded(matrix.quantized)
    same(f"{reader}: tensors", content(found.tensors), left)


def _check_decoded(q: Any) -> None:
    """Raise if a matrix of finite arrays does not decode, or to numbers beyond what scales and levels allow."""
    with np.errstate(all="ignore"):
        bound = _bound(q)
        if bound < 3e38:
            dense = lq.dequantize(q)
            assert np.isfinite(dense).all(), "decoded weights are not finite"
            assert np.abs(dense, dtype=np.float64).max(initial=0) <= bound * 1.01, "decoded weights exceed their scales"


def _bound(q: Any) -> float:
    """Return a bound on the magnitude of decoded weights: largest level times largest scale, plus the offset."""
    levels = q.codebook.levels if q.levels is None else q.levels
    level = np.abs(levels, dtype=np.float64).max(initial=0)
    if isinstance(q.scales, lq.QuantizedArray):
        scale = _bound(q.scales)
    else:
        scale = np.abs(q.scales.astype(np.float64)).max(initial=0)
    offset = 0 if q.offset is None else np.abs(q.offset.astype(np.float64)).max(initial=0)
    total = float(level * scale + offset)
    return math.inf if math.isnan(total) else total
