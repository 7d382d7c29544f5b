"""Mutations of JSON documents and of bytes, drawn from a seeded generator, for the fuzzers of file readers."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, MutableSequence

__all__ = ["NAMES", "Pairs", "Raw", "changed", "mutated_bytes", "mutated_text", "mutated_tree", "to_json"]


class Raw(str):
    """JSON text that is written as it is, such as ``NaN``, a number of 5,000 digits, or 100,000 brackets."""

    __slots__ = ()


class Pairs(list[tuple[Any, Any]]):
    """A JSON object as a list of keys and values, so that a key can occur twice."""


class _Place(NamedTuple):
    """A value in a tree: the list or object that holds it, and its index."""

    parent: Any
    index: int

    @property
    def value(self) -> Any:
        found = self.parent[self.index]
        return found[1] if isinstance(self.parent, Pairs) else found

    def put(self, value: Any) -> None:
        self.parent[self.index] = (self.parent[self.index][0], value) if isinstance(self.parent, Pairs) else value


#: Texts that readers, terminals or file systems may take for something else.
NAMES = (
    "",
    " ",
    "\x00",
    "\x1b[2J\x1b[31mred",
    "a\nb",
    "\r",
    "\u202egnp.exe",
    "\ud800",
    "\udc80\ud83d",
    "é名\U0001f600",
    "../../etc/passwd",
    "__metadata__",
    "a.quantized.codes",
    "None",
    "nf4/64:float32",
    "0",
    "n" * 300,
    "\x1b" * 500,
    "x" * 20_000,
)

_NUMBERS = (
    *(0, -1, 1, 2, 255, 256, 2**31 - 1, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18, 10**19),
    *(0.5, -0.5, 1.0, 1e-320, 1e308, -1e308, 3.5e38, 1e16, 1e-9),
    *map(
        Raw, ("NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e400", "-1e999", "1E5", "0.1e1", "01", "+1", ".5", "1.")
    ),
    *map(Raw, ("1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "0." + "1" * 5000, "1" + "0" * 5000 + ".0")),
)

_OTHERS = (
    *(None, True, False, Pairs(), [], [None], [[]], [0, 0], [1, 2, 3], Pairs([("a", 1)]), [Pairs()]),
    *map(Raw, ("[" * 200 + "]" * 200, "[" * 50_000 + "]" * 50_000, "[" * 50_000, '{"a":' * 3000 + "1" + "}" * 3000)),
    *map(Raw, ("[" + "0," * 5000 + "0]", '"\\ud800"', '"\\u0000"', '"\x01"', '"', "null", "nul", "")),
)


def to_json(tree: Any) -> str:
    """Return a tree as JSON text; :class:`Raw` texts may make it invalid."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{to_json(key)}: {to_json(value)}" for key, value in tree) + "}"
    if isinstance(tree, dict):
        return to_json(Pairs(tree.items()))
    if isinstance(tree, list):
        return "[" + ", ".join(map(to_json, tree)) + "]"
    return json.dumps(tree)


def changed(text: str, values: dict[str, Any]) -> str:
    """Return a JSON object with other values of some keys."""
    pairs = json.loads(text, object_pairs_hook=Pairs)
    kept = [(key, values.get(key, value)) for key, value in pairs]
    added = [(key, value) for key, value in values.items() if key not in dict(pairs)]
    return to_json(Pairs([*kept, *added]))


def mutated_tree(rng: random.Random, text: str) -> tuple[Any, str]:
    """Return the tree of a JSON text after one to three mutations, and a description of them."""
    root = [json.loads(text, object_pairs_hook=Pairs)]
    said = [_mutate_once(rng, root) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return root[0], ", ".join(said)


def mutated_text(rng: random.Random, text: str) -> tuple[str, str]:
    """Return a JSON text after mutations of its tree, or of its characters, and a description of them."""
    if rng.random() < 0.85:
        tree, said = mutated_tree(rng, text)
        return to_json(tree), said
    data, said = mutated_bytes(rng, text.encode())
    return data.decode("utf-8", errors=rng.choice(("replace", "surrogateescape"))), said


def mutated_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Return bytes of which some are changed, removed, repeated or inserted, and a description."""
    array, said = bytearray(data), []
    for _ in range(rng.choice((1, 1, 2, 5))):
        change = rng.choice(_BYTE_CHANGES)
        change(rng, array)
        said.append(change.__name__.strip("_"))
    return bytes(array), "bytes: " + ", ".join(said)


def _mutate_once(rng: random.Random, root: list[Any]) -> str:
    # Containers near the root have few values and leaves are many, so a depth is drawn before a place.
    by_depth = list(_by_depth(root))
    place = rng.choice(by_depth[min(rng.randrange(len(by_depth) + 1), len(by_depth) - 1)])
    change = rng.choice(_CHANGES)
    before = to_json(place.value)[:40]
    change(rng, place, [other for level in by_depth for other in level])
    return f"{change.__name__.strip('_')} at {before}"


def _by_depth(root: list[Any]) -> Iterator[list[_Place]]:
    level = [_Place(root, 0)]
    while level:
        yield level
        values = [place.value for place in level]
        level = [_Place(value, i) for value in values if isinstance(value, list) for i in range(len(value))]


def _any_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((NAMES, _NUMBERS, _NUMBERS, _OTHERS))))


def _replace(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    place.put(_any_value(rng))


def _nudge(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    """Change a value a little: a number to a neighbor, a text in one character, a list in its length."""
    value = place.value
    if isinstance(value, bool) or value is None or isinstance(value, Raw):
        place.put(not value)
    elif isinstance(value, int | float):
        place.put(
            rng.choice((value + 1, value - 1, -value, 2 * value, value // 2, Raw(f"{value}.0"), str(value), [value]))
        )
    elif isinstance(value, str):
        at = rng.randint(0, len(value))
        place.put(
            value[:at] + rng.choice(("", "9", "\x1b", "/", "+", ":", " ", "0", "é")) + value[at + rng.randint(0, 1) :]
        )
    else:
        _resize(rng, value)


def _resize(rng: random.Random, values: MutableSequence[Any]) -> None:
    if not values:
        values.append(("a", 1) if isinstance(values, Pairs) else 1)
        return
    index, kind = rng.randrange(len(values)), rng.randrange(4)
    if kind == 0:
        del values[index]
    elif kind == 1:
        values.insert(rng.randrange(len(values) + 1), copy.deepcopy(values[index]))
    elif kind == 2:
        rng.shuffle(values)
    else:
        extra = _any_value(rng)
        values.append((rng.choice(NAMES), extra) if isinstance(values, Pairs) else extra)


def _delete(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    del place.parent[place.index]
    if not place.parent:  # the root needs a value
        place.parent.append(("", None) if isinstance(place.parent, Pairs) else None)


def _repeat(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    """Repeat a key with another value, or an entry of a list."""
    if isinstance(place.parent, Pairs):
        place.parent.insert(rng.randrange(len(place.parent) + 1), (place.parent[place.index][0], _any_value(rng)))
    else:
        place.put([place.value, copy.deepcopy(place.value)])


def _rename(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    """Give a key another name: a strange one, or that of another key."""
    if not isinstance(place.parent, Pairs):
        place.put(_any_value(rng))
        return
    keys = [other.parent[other.index][0] for other in others if isinstance(other.parent, Pairs)]
    key, value = place.parent[place.index]
    renamed = rng.choice((rng.choice(NAMES), rng.choice(keys), f"{key}2", key.upper(), key[1:]))
    place.parent[place.index] = (renamed, value)


def _exchange(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    """Copy the value of another place, most often of the same type, over this one."""
    alike = [other for other in others if type(other.value) is type(place.value)]
    place.put(copy.deepcopy(rng.choice(alike if rng.random() < 0.8 else others).value))


def _wrap(rng: random.Random, place: _Place, others: list[_Place]) -> None:
    place.put(rng.choice(([place.value], Pairs([("a", place.value)]), to_json(place.value))))


_CHANGES: tuple[Callable[[random.Random, _Place, list[_Place]], None], ...] = (
    *(_replace, _replace, _nudge, _nudge, _delete, _repeat, _rename, _exchange, _wrap),
)


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _write(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, 10, 27, 34, 91, 123))


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randint(0, len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    begin = rng.randint(0, len(data))
    del data[begin : begin + rng.choice((1, 8, 64))]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.choice((b"\0", b"\n", b"\xff" * 8, b"\x1b[31m", rng.randbytes(rng.randint(1, 40)), b"[" * 3000))


def _double(rng: random.Random, data: bytearray) -> None:
    begin = rng.randint(0, len(data))
    part = data[begin : begin + rng.choice((1, 8, 200))]
    data[begin:begin] = part


def _number(rng: random.Random, data: bytearray) -> None:
    """Overwrite eight bytes, as a length or an offset would be stored."""
    if len(data) >= 8:
        at = rng.randrange(len(data) - 7)
        data[at : at + 8] = rng.choice((0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)).to_bytes(8, "little")


_BYTE_CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _write, _write, _cut, _remove, _insert, _double, _number),
)
