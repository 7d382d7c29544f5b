"""Fuzzer of stores of costs: lines of JSON with checksums, which are computed again after most mutations."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, Literal

from lqlora.costs import store as module
from lqlora.costs.store import CostStore, StoredRow
from tests.fuzz.mutate import Pairs, Raw, changed, mutated_bytes, mutated_tree, to_json
from tests.fuzz.running import Case, same

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Stores"]

_SETTINGS = {"seed": 0, "init": "svd", "formats": ["nf4/64:float16", "nf2/64:float16"]}
_ROWS = (
    StoredRow("layers.0.up", (8, 16), "c0ffee", "none", {"nf4/64:float16 rank 8": 0.1, "nf2/64:float16 rank 8": 1e-9}),
    StoredRow("layers.0.down", (16, 8), "beef", "d1ce", {"nf4/64:float16 rank 8": 2.5}),
    StoredRow("layers.0.up", (8, 16), "c0ffee", "none", {"nf4/64:float16 rank 0": 3e300}),
    StoredRow("é\n\x1b[31m", (0, 3), "", "", {}),
)


def _documents() -> list[str]:
    head = {"lqlora_costs": 1, "numerics": module.NUMERICS, "settings": _SETTINGS}
    rows = [{**vars(row), "shape": list(row.shape)} for row in _ROWS]
    return [json.dumps(own) for own in (head, *rows)]


def _line(text: str) -> bytes:
    """Return a line for the text of a document, with the checksum that the store computes if it can be read."""
    try:
        total = module._checksum(json.dumps(json.loads(text)))
    except (RecursionError, ValueError):
        total = "0" * 16
    return f'{{"sum": "{total}", "line": {text}}}\n'.encode("utf-8", errors="surrogatepass")


def _original() -> bytes:
    return b"".join(map(_line, _documents()))


class Stores:
    """Mutated stores."""

    def __init__(self) -> None:
        self._count = 0

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated store."""
        kind = rng.random()
        if kind < 0.6:  # documents, with the right checksums
            texts, said = _documents(), []
            for _ in range(rng.choice((1, 1, 2))):
                index = rng.choice((0, 0, *range(len(texts))))
                tree, done = mutated_tree(rng, texts[index])
                texts[index] = to_json(tree).replace("\n", " ")
                said.append(f"line {index + 1}: {done}")
                if not _is_readable(texts[index]):
                    break
            data = b"".join(map(_line, texts))
        elif kind < 0.75:  # lines, without
            lines = _original().splitlines(keepends=True)
            index = rng.randrange(len(lines))
            tree, done = mutated_tree(rng, lines[index].decode())
            lines[index] = to_json(tree).replace("\n", " ").encode("utf-8", errors="surrogatepass") + b"\n"
            data, said = b"".join(lines), [f"line {index + 1} as a whole: {done}"]
        elif kind < 0.9:
            lines = _original().splitlines(keepends=True)
            said = [rng.choice(("shuffle", "repeat", "remove", "cut", "join"))]
            data = b"".join(_rearranged(rng, said[0], lines))
        else:
            data, done = mutated_bytes(rng, _original())
            said = [done]
        return self._case(folder, data, "; ".join(said))

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield stores that were once read wrong, or damaged when they were opened, and files that are no stores."""
        yield self._case(folder, _original(), "unchanged", must="read")
        head, *rows = _documents()
        for key in ("settings", "numerics", "lqlora_costs"):
            for value in (None, 5, "x", [], Pairs(), Raw("9" * 5000), Raw("[" * 5000 + "]" * 5000), True, 1.0):
                yield self._case(folder, _lines(changed(head, {key: value}), *rows), f"{key} {str(value)[:9]}")
            without = to_json(Pairs([(own, value) for own, value in json.loads(head).items() if own != key]))
            yield self._case(folder, _lines(without, *rows), f"no {key}")
        values = (None, 5, "\x1b[2J" * 200, [], [[]], Pairs(), True, -1, "\ud800", [2**62] * 2, [-1], [True], ["4"])
        for key in ("name", "shape", "content", "weighting", "costs"):
            for value in values:
                changed_row = changed(rows[0], {key: value})
                yield self._case(folder, _lines(head, changed_row, *rows[1:]), f"{key} {str(value)[:9]!r}")
        for cost in (None, True, 1, "1", Raw("NaN"), Raw("1e999"), Raw("-1.0"), Raw("1" + "0" * 400), Raw("9" * 5000)):
            own = changed(rows[0], {"costs": Pairs([("\x1b[31m", cost)])})
            yield self._case(folder, _lines(head, own, *rows[1:]), f"cost {str(cost)[:9]}")
        other = changed(rows[0], {"costs": Pairs([("nf4/64:float16 rank 8", 0.2)])})
        yield self._case(folder, _lines(head, *rows, other), "two costs of one cell")
        yield self._case(folder, _lines(head, *rows, changed(rows[0], {"shape": [9, 9]})), "two shapes of one matrix")
        yield self._case(folder, _lines(*rows), "rows without a head")
        for text in (b"", b"{", b'{"sum": "', b"precious\ndata", b"\x00" * 100, b"[" * 10**6, b"\xff\xfe{\n", b"\n\n"):
            yield self._case(folder, text, f"text {text[:9]!r}")
        yield self._case(folder, json.dumps({"a": 1}, indent=1).encode(), "a text that ends in an incomplete line")
        for cut in (1, 20, len(_line(rows[-1])), len(_line(rows[-1])) + 1):
            yield self._case(folder, _original()[:-cut], f"{cut} bytes less")

    def _case(self, folder: Path, data: bytes, made: str, must: Literal["", "read", "refuse"] = "") -> Case:
        self._count += 1
        path = folder / f"costs{self._count % 2}.jsonl"
        path.write_bytes(data)
        return Case(
            made,
            len(data),
            (path.name,),
            {"CostStore.read": lambda: CostStore.read(path), "CostStore": lambda: _opened(path, data)},
            functools.partial(_judge, path, data),
            must,
        )


def _lines(*texts: str) -> bytes:
    return b"".join(map(_line, texts))


def _is_readable(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def _rearranged(rng: random.Random, change: str, lines: list[bytes]) -> list[bytes]:
    index = rng.randrange(len(lines))
    if change == "shuffle":
        rng.shuffle(lines)
    elif change == "repeat":
        lines.insert(rng.randrange(len(lines) + 1), lines[index])
    elif change == "remove":
        del lines[index]
    elif change == "cut":
        lines = [*lines[:index], lines[index][: rng.randrange(len(lines[index]))]]
    else:
        lines[index] = lines[index].rstrip(b"\n")
    return lines


def _whole_lines(data: bytes) -> bytes:
    """Return the lines that a store keeps: those that end, and a last one that lacks only its line break."""
    last = data[data.rfind(b"\n") + 1 :]
    try:
        outer = json.loads(last)
        ends = json.loads(_line(json.dumps(outer["line"], allow_nan=False)))["sum"] == outer["sum"]
    except (KeyError, RecursionError, TypeError, ValueError):
        ends = False
    return data + b"\n" if ends else data[: len(data) - len(last)]


def _opened(path: Path, data: bytes) -> dict[str, StoredRow]:
    """Open a store as ``cost_table`` does, and return its rows. A store that is refused must stay as it is."""
    try:
        with CostStore(path, _SETTINGS) as store:
            rows = dict(store.rows)
    finally:
        kept = path.read_bytes()
        whole = _whole_lines(data)
        assert kept in (data, whole) or not whole, f"the file was changed to {kept[:80]!r}"
    return rows


def _judge(path: Path, data: bytes, results: dict[str, Any]) -> None:
    whole = _whole_lines(data)
    if "CostStore" not in results:
        same("the file that was refused", path.read_bytes(), data)
    elif whole:
        same("the file without its last, incomplete line", path.read_bytes(), whole)
    for found in results.values():
        same("rows", {name: vars(row) for name, row in found.items()}, _expected(whole) if whole else {})
    if "CostStore" in results:
        with CostStore(path, _SETTINGS) as store:
            store.append(StoredRow("added later", (1, 1), "a", "b", {"nf4/64:float16 rank 8": 1.0}))
        same("rows after one is added", CostStore.read(path).keys(), {*results["CostStore"], "added later"})


def _expected(whole: bytes) -> dict[str, dict[str, Any]]:
    """Return the rows of a store, as the standard library reads them."""
    head, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    rows: dict[str, dict[str, Any]] = {}
    for outer in (head, *lines):
        same("the checksum of a line that was read", module._checksum(json.dumps(outer["line"])), outer["sum"])
    for outer in lines:
        own = outer["line"]
        kept = {key: own[key] for key in ("name", "shape", "content", "weighting")}  # other keys are not read
        known = rows.setdefault(own["name"], {**kept, "shape": tuple(own["shape"]), "costs": {}})
        same("shape", known["shape"], tuple(own["shape"]))
        known["costs"] |= {key: float(cost) for key, cost in own["costs"].items()}
    return rows
