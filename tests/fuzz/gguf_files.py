"""Fuzzer of GGUF files: counts, types, lengths, offsets and settings of a tiny Llama model."""

from __future__ import annotations

import functools
import math
import struct
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lqlora.integrations.gguf import linear_weights, load_llama
from tests.fuzz.mutate import NAMES, mutated_bytes
from tests.fuzz.running import Case, same
from tests.requirements import import_quietly
from tests.tiny_gguf import permute, write_tiny_llama

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

__all__ = ["GgufFiles"]

#: Formats of the scalar types by their numbers. 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _Q8_0 = 0, 1, 8
_INTEGERS = (24, 25, 26, 27)
#: Numbers of types of tensors, of which the last is not one.
_TYPES = (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 24, 28, 30, 39, 99)
_COUNTS = (0, 1, 3, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class _Tensor:
    """A tensor: its sides from the innermost to the outermost, and its bytes or the offset that is written for it."""

    name: bytes
    sides: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None


@dataclass(frozen=True)
class _Parts:
    """A file in parts. Counts that are given are written instead of the right ones."""

    settings: tuple[tuple[bytes, int, Any], ...]
    tensors: tuple[_Tensor, ...]
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _List:
    """An array: the type of its entries, the entries, and the length that is written for it."""

    type: int
    values: tuple[Any, ...]
    length: int | None = None


class _Raw(bytes):
    """A value that is written as it is."""


class _Reader:
    """Reads numbers and texts from bytes, or raises ValueError beyond their end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError("the file ends")
        part = self.data[self.at : self.at + count]
        self.at += count
        return part

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, length = self.number("I"), self.number("Q")
            if length > len(self.data):
                raise ValueError("the array is longer than the file")
            return _List(inner, tuple(self.value(inner) for _ in range(length)))
        if kind not in _SCALARS:
            raise ValueError("the type is unknown")
        return self.number(_SCALARS[kind])


def _read(data: bytes) -> _Parts:
    """Read a file, or raise ValueError. The bytes of a tensor begin at its offset and go on to the end of the file."""
    reader = _Reader(data)
    magic, version = reader.take(4), reader.number("I")
    tensor_count, count = reader.number("Q"), reader.number("Q")
    if max(tensor_count, count) > len(data):
        raise ValueError("a count is larger than the file")
    settings = []
    for _ in range(count):
        name, kind = reader.text(), reader.number("I")
        settings.append((name, kind, reader.value(kind)))
    found = []
    for _ in range(tensor_count):
        name, dimensions = reader.text(), reader.number("I")
        if dimensions > len(data):
            raise ValueError("a tensor has too many sides")
        sides = tuple(reader.number("Q") for _ in range(dimensions))
        found.append((name, sides, reader.number("I"), reader.number("Q")))
    alignment = {name: value for name, _, value in settings}.get(b"general.alignment", 32)
    begin = reader.at + -reader.at % max(1, alignment)
    tensors = [_Tensor(name, sides, kind, data[begin + offset :], offset) for name, sides, kind, offset in found]
    return _Parts(tuple(settings), tuple(tensors), magic, version, alignment)


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, _Raw):
        return value
    if isinstance(value, _List):
        length = len(value.values) if value.length is None else value.length
        return struct.pack("<IQ", value.type, length) + b"".join(_value(value.type, own) for own in value.values)
    if isinstance(value, bytes):
        return _text(value)
    try:
        return struct.pack(f"<{_SCALARS[kind]}", value)
    except (KeyError, struct.error):  # the type was changed, and the value was not
        return bytes(4)


def _written(parts: _Parts) -> bytes:
    counts = {"tensors": len(parts.tensors), "settings": len(parts.settings)} | parts.counts
    head = parts.magic + struct.pack("<IQQ", parts.version, counts["tensors"], counts["settings"])
    for name, kind, value in parts.settings:
        head += _text(name) + struct.pack("<I", kind) + _value(kind, value)
    rest = b""
    for own in parts.tensors:
        offset = len(rest) if own.offset is None else own.offset
        head += _text(own.name) + struct.pack(f"<I{len(own.sides)}Q", len(own.sides), *own.sides)
        head += struct.pack("<IQ", own.type, offset)
        rest += own.data + bytes(-len(own.data) % 32)
    return head + bytes(-len(head) % 32) + rest


@functools.cache
def originals() -> tuple[_Parts, ...]:
    """Return a tiny Llama model without most of its tokens, and a whole one that transformers can read."""
    import_quietly("transformers")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_tiny_llama(path)
        whole = _read(path.read_bytes())
        load_llama(path)  # imports torch and parts of transformers, which takes seconds
    sizes = {_F32: (4, 1), _F16: (2, 1), _Q8_0: (34, 32)}
    tensors = []
    for own in whole.tensors:
        size, block = sizes[own.type]
        tensors.append(replace(own, data=own.data[: math.prod(own.sides) * size // block], offset=None))
    whole = replace(whole, tensors=tuple(tensors))
    settings = []
    for name, kind, value in whole.settings:
        short = _List(value.type, value.values[:3]) if isinstance(value, _List) else value
        settings.append((name, kind, short))
    few = tuple(own for own in tensors if b"blk." in own.name)
    return replace(whole, settings=tuple(settings), tensors=few), whole


class GgufFiles:
    """Mutated files."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated file."""
        model = rng.random() < 0.02  # a whole model, which takes a tenth of a second
        parts, said = originals()[model], []
        if rng.random() < 0.2:
            data, done = mutated_bytes(rng, _written(parts))
            return self._case(folder, data, done, model=model)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change = rng.choice((_change_setting, _change_setting, _change_tensor, _change_tensor, _change_counts))
            parts, done = change(rng, parts)
            said.append(done)
        return self._case(folder, _written(parts), ", ".join(said), model=model)

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield files that were once read wrong, or ended in an error of another library."""
        small, whole = originals()
        for original in (small, whole) if slow else (small,):
            model = original is whole
            yield self._case(folder, _written(original), "unchanged", model=model, must="read")
            for made, changes in _settings_of_corpus().items():
                kept = [own for own in original.settings if own[0] not in dict.fromkeys(name for name, *_ in changes)]
                data = _written(replace(original, settings=(*kept, *changes)))
                yield self._case(folder, data, made, model=model, must="refuse" if made.startswith("split") else "")
        for data, made in (*_corpus_of_counts(small), *_corpus_of_names(small), *_corpus_of_types(small)):
            yield self._case(folder, data, made)

    def _case(
        self, folder: Path, data: bytes, made: str, *, model: bool = False, must: Literal["", "read", "refuse"] = ""
    ) -> Case:
        # Files are mapped to memory and cached by time and size, so each has a name of its own.
        self._count += 1
        (folder / f"model{self._count - 2}.gguf").unlink(missing_ok=True)
        path = folder / f"model{self._count}.gguf"
        path.write_bytes(data)
        readers: dict[str, Callable[[], Any]] = {"linear_weights": lambda: _matrices(path)}
        if model:
            readers["load_llama"] = lambda: load_llama(path)
        return Case(made, len(data), (path.name,), readers, functools.partial(_judge, data), must)


def _corpus_of_counts(small: _Parts) -> Iterator[tuple[bytes, str]]:
    first, *others = small.tensors
    for count in _COUNTS:
        for what in ("tensors", "settings"):
            yield _written(replace(small, counts={what: count})), f"{count} {what}"
        for listed in (_List(4, (1, 2), count), _List(_STRING, (b"a",), count)):
            settings = ((b"general.tags", _ARRAY, listed), *small.settings)
            yield _written(replace(small, settings=settings)), f"a list of {count} entries"
        for sides in ((count,), (count, count), (32, count), (count, 32), (1, 1, count, 32)):
            tensors = (replace(first, sides=sides), *others)
            yield _written(replace(small, tensors=tensors)), f"a tensor of sides {sides}"
        yield _written(replace(small, tensors=(replace(first, offset=count), *others))), f"a tensor at offset {count}"


def _corpus_of_names(small: _Parts) -> Iterator[tuple[bytes, str]]:
    first, *others = small.tensors
    for twice in (small.settings[0], small.settings[5]):
        yield _written(replace(small, settings=(*small.settings, twice))), "a key that occurs twice"
    yield _written(replace(small, tensors=(first, first, *others))), "a tensor twice"
    taken = replace(first, name=b"model.layers.0.self_attn.q_proj.weight")
    yield _written(replace(small, tensors=(*small.tensors, taken))), "one module under two names"
    for name in (b"\x1b[2J", b"\xff\xfe", b"", b"x" * 10_000, b"\xed\xa0\x80", "\u202e".encode(), b"a\nb"):
        for change in ({"name": name}, {"name": name, "sides": (2**40, 2)}, {"name": name, "type": 99}):
            tensors = (replace(first, **change), *others)
            yield _written(replace(small, tensors=tensors)), f"a tensor with {str(change)[:60]}"
        yield _written(replace(small, settings=((name, 4, 1), *small.settings))), f"key {name[:9]!r}"


def _corpus_of_types(small: _Parts) -> Iterator[tuple[bytes, str]]:
    first, *others = small.tensors
    nested = _Raw(struct.pack("<IQ", _ARRAY, 1) * 2000 + struct.pack("<IQI", 4, 1, 1))
    yield _written(replace(small, settings=(*small.settings, (b"general.x", _ARRAY, nested)))), "nested lists"
    for kind in (*_TYPES, 16, 31, 2**32 - 1):
        yield _written(replace(small, tensors=(replace(first, type=kind), *others))), f"a tensor of type {kind}"
    for data in (b"", b"GGUF", b"GGUF" + b"\xff" * 40, b"\0" * 100):
        yield data, f"bytes {data[:9]!r}"
    for version in (0, 1, 2, 4, 2**31, 3 * 2**16, 3 * 2**24):
        yield _written(replace(small, version=version)), f"version {version}"


def _settings_of_corpus() -> dict[str, list[tuple[bytes, int, Any]]]:
    """Return settings to exchange, by what they are."""
    heads, blocks = b"llama.attention.head_count", b"llama.block_count"
    found: dict[str, list[tuple[bytes, int, Any]]] = {}
    for key in (
        heads,
        heads + b"_kv",
        blocks,
        b"llama.embedding_length",
        b"llama.context_length",
        b"llama.feed_forward_length",
    ):
        for number in (0, 1, 3, 2**31, 2**32 - 1):
            found[f"{key.decode()} {number}"] = [(key, 4, number)]
        found[f"{key.decode()} negative"] = [(key, 5, -4)]
        found[f"{key.decode()} float"] = [(key, 6, 4.0)]
        found[f"{key.decode()} true"] = [(key, 7, True)]
        found[f"{key.decode()} text"] = [(key, _STRING, b"\x1b[2J4")]
        found[f"{key.decode()} list"] = [(key, _ARRAY, _List(4, (4, 4)))]
        found[f"{key.decode()} empty list"] = [(key, _ARRAY, _List(4, ()))]
    for number in (math.nan, math.inf, -1.0, 0.0):
        found[f"epsilon {number}"] = [(b"llama.attention.layer_norm_rms_epsilon", 6, number)]
        found[f"rope {number}"] = [(b"llama.rope.freq_base", 6, number)]
    for number in (0, 1, 3, 2**31, 64):
        found[f"alignment {number}"] = [(b"general.alignment", 4, number)]
    found["alignment is text"] = [(b"general.alignment", _STRING, b"32")]
    for name in (b"\x1b[2J" * 200, b"\xff", b"", b"mamba"):
        found[f"architecture {name[:9]!r}"] = [(b"general.architecture", _STRING, name)]
    found["architecture is a number"] = [(b"general.architecture", 4, 5)]
    found["rope scaling"] = [(b"llama.rope.scaling.type", _STRING, b"linear\x1b[2J")]
    found["split in 2"] = [(b"split.count", 2, 2), (b"split.no", 2, 0), (b"split.tensors.count", 5, 40)]
    return found


def _change_setting(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    settings = list(parts.settings)
    index = rng.randrange(len(settings))
    name, kind, value = settings[index]
    change = rng.choice(("value", "value", "type", "name", "remove", "repeat", "length"))
    if change == "value":
        settings[index] = (name, kind, _other_value(rng, kind, value))
    elif change == "type":
        other = rng.choice((*_SCALARS, _STRING, _ARRAY))
        made = {_STRING: rng.choice(NAMES).encode(errors="replace"), _ARRAY: _List(4, (1, 2))}
        settings[index] = (name, other, made.get(other, rng.choice((0, 1))))
    elif change == "name":
        settings[index] = (rng.choice(NAMES).encode(errors="replace"), kind, value)
    elif change == "remove":
        del settings[index]
    elif change == "repeat":
        settings.insert(rng.randrange(len(settings)), (name, kind, _other_value(rng, kind, value)))
    else:
        settings[index] = (name, _ARRAY, _List(rng.choice((0, 4, 7, _STRING)), (), rng.choice(_COUNTS)))
    return replace(parts, settings=tuple(settings)), f"{change} of {name.decode(errors='replace')[:40]!r}"


def _other_value(rng: random.Random, kind: int, value: Any) -> Any:
    if isinstance(value, _List):
        return _List(
            rng.choice((value.type, 0, _ARRAY, 77)), value.values[: rng.randrange(3)] if value.type != 8 else (), None
        )
    if isinstance(value, bytes):
        return rng.choice(NAMES).encode(errors=rng.choice(("replace", "surrogatepass")))
    if kind in (6, 12):
        return rng.choice((0.0, -1.0, math.nan, math.inf, 1e30, value * 2))
    bits = 8 * struct.calcsize(_SCALARS[kind])
    return min(rng.choice((0, 1, 2, 3, 5, value + 1, 2 * value, 2 ** (bits - 1) - 1)), 2 ** (bits - 1) - 1)


def _change_tensor(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    if not parts.tensors:
        return parts, "nothing"
    tensors = list(parts.tensors)
    index = rng.randrange(len(tensors))
    own = tensors[index]
    change = rng.choice(("sides", "type", "offset", "name", "data", "values", "remove", "repeat", "shuffle"))
    if change == "remove":
        del tensors[index]
    elif change == "repeat":
        tensors.append(own)
    elif change == "shuffle":
        rng.shuffle(tensors)
    else:
        tensors[index] = _other_tensor(rng, own, change, rng.choice(tensors).name)
    return replace(parts, tensors=tuple(tensors)), f"{change} of {own.name.decode(errors='replace')[:40]!r}"


def _other_tensor(rng: random.Random, own: _Tensor, change: str, other: bytes) -> _Tensor:
    """Return a tensor of which one field is changed."""
    count, data = math.prod(own.sides), bytearray(own.data)
    if change == "sides":
        fit = ((count,), (count, 1), (1, count), own.sides[::-1], (*own.sides, 1), (32, count // 32), ())
        wide = (
            (2**40, 2),
            (2**32, 2**32),
            (0, 5),
            (5, 0),
            (2**63, 2),
            tuple(side + 1 for side in own.sides),
            (1,) * 40,
        )
        return replace(own, sides=rng.choice(fit if rng.random() < 0.5 else wide))
    if change == "type":
        return replace(own, type=rng.choice(_TYPES))
    if change == "offset":
        return replace(own, offset=rng.choice((0, 1, 32, 64, *_COUNTS)))
    if change == "name":
        far = own.name.replace(b"blk.0", b"blk.99999999999")
        return replace(own, name=rng.choice((rng.choice(NAMES).encode(errors="replace"), other, far, own.name + b"x")))
    if change == "data":
        return replace(own, data=rng.choice((own.data[:-1], own.data[: len(data) // 2], b"", own.data * 2)))
    for _ in range(rng.choice((1, 8)) if data else 0):
        data[rng.randrange(len(data))] = rng.choice((0, 127, 128, 255))
    return replace(own, data=bytes(data))


def _change_counts(rng: random.Random, parts: _Parts) -> tuple[_Parts, str]:
    change = rng.choice(("tensors", "settings", "magic", "version"))
    if change in ("tensors", "settings"):
        right = len(parts.tensors if change == "tensors" else parts.settings)
        count = rng.choice((right - 1, right + 1, *_COUNTS))
        return replace(parts, counts=parts.counts | {change: count}), f"{count} {change}"
    if change == "magic":
        return replace(parts, magic=rng.choice((b"GGUF", b"FUGG", b"gguf", b"\0\0\0\0"))), "magic"
    return replace(parts, version=rng.choice((0, 1, 2, 4, 2**16, 3 * 2**16, 2**24 * 3))), "version"


def _matrices(path: Path) -> dict[str, Any]:
    """Return all matrices of a file, as ``cost_table`` reads them."""
    return {name: load() for name, load in linear_weights(path).items()}


def _judge(data: bytes, results: dict[str, Any]) -> None:
    if "linear_weights" not in results:
        assert not results, "load_llama read a file that linear_weights refused"
        return
    parts = _read(data)
    settings = {name: value for name, _, value in parts.settings}
    matrices = [own for own in parts.tensors if len(own.sides) == 2 and own.type not in _INTEGERS]
    same("number of matrices", len(results["linear_weights"]), len(matrices))
    for own, (name, values) in zip(matrices, results["linear_weights"].items(), strict=True):
        same(f"shape of {name!r}", values.shape, own.sides[::-1])
        expected = _decoded(own)
        if expected is None or name.startswith("blk."):  # a name that no layer of a model has
            continue
        same(f"values of {name!r}", _as_stored(own.name, values, settings).tobytes(), expected.tobytes())


def _as_stored(name: bytes, values: np.ndarray, settings: dict[bytes, Any]) -> np.ndarray:
    """Return the rows of a matrix in the order of the file."""
    heads = settings.get(b"llama.attention.head_count")
    if b".attn_k." in name:
        heads = settings.get(b"llama.attention.head_count_kv", heads)
    elif b".attn_q." not in name:
        return values
    return np.ascontiguousarray(permute(values, heads))


def _decoded(own: _Tensor) -> np.ndarray | None:
    """Return a tensor as float32, or None for types that are compared elsewhere."""
    count = math.prod(own.sides)
    if own.type in (_F32, _F16):
        dtype = np.dtype(np.float32 if own.type == _F32 else np.float16)
        return np.frombuffer(own.data, dtype=dtype, count=count).astype(np.float32).reshape(own.sides[::-1])
    if own.type != _Q8_0:
        return None
    blocks = np.frombuffer(own.data, dtype=np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), count=count // 32)
    with np.errstate(all="ignore"):
        return (blocks["scale"].astype(np.float32)[:, None] * blocks["codes"].astype(np.float32)).reshape(
            own.sides[::-1]
        )
