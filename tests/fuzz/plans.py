"""Fuzzer of plans: JSON documents of ``Plan.to_json``, also of version 3."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lqlora as lq
from tests.fuzz.mutate import Pairs, Raw, changed, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.spelling import canonical
from tests.fuzz.tables import made_table

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

__all__ = ["Plans"]

_LIMIT_KEYS = {3: ("demands", "what", "weights"), 4: ("limits", "matrices", "weight_count")}


@functools.cache
def documents() -> tuple[str, ...]:
    """Return plans in standard formats, in codebooks that are stored with their levels, and of version 3."""
    table = made_table()
    plans = [
        lq.allocate(table, bits_per_weight=5.5, limits=[lq.Limit("layers.0.*", bits_per_weight=6)]),
        lq.allocate(table, max_error=table.costs.min(axis=1).sum() * 1.5),
    ]
    old = (Path(__file__).parents[1] / "allocation" / "data" / "plan_v3_error.json").read_text(encoding="utf-8")
    return (*(plan.to_json() for plan in plans), old)


class Plans:
    """Mutated plans."""

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated plan."""
        return _case(*mutated_text(rng, rng.choice(documents())))

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield plans that were once read wrong, or ended in an error of another library."""
        for text in documents():
            yield _case(text, "unchanged", must="read")
        first = documents()[0]
        for key in ("objective", "bound"):
            for value in ("1" + "0" * 400, "9" * 5000, "NaN", "1e999", '"\\ud800"', "[" * 100_000 + "]" * 100_000):
                yield _case(changed(first, {key: Raw(value)}), f"{key} {value[:9]}")
        yield _case(changed(first, {"status": "\x1b[2J", "solver": "\x1b]0;x\x07", "note": "\ud800"}), "escapes")
        yield _case(changed(first, {"\x1b[31m" * 200: 1}), "a long key that is unknown")
        yield _case(changed(first, {"limits": [5]}), "a limit that is no object")
        for row in (5, None, [], "nf4", Pairs()):
            yield _case(changed(first, {"matrices": Pairs([("a", row)])}), f"matrix {row!r}")
        for value in (None, 5, [], Pairs(), Raw("[" * 5000 + "]" * 5000)):
            yield _case(changed(first, {"matrices": value}), f"matrices {str(value)[:9]}")
        row = dict(json.loads(first)["matrices"]["layers.0.up"])
        many = [(f"m{i}", row | {"format": f"bof8-{1000 + i}/64:float32"}) for i in range(100)]
        yield _case(changed(first, {"matrices": Pairs(many)}), "100 codebooks that take long to make")
        many = [(f"\x1b[{i}m", row | {"cost": 1e308}) for i in range(20)]
        yield _case(changed(first, {"matrices": Pairs(many)}), "costs whose sum overflows")
        for shape in ([2**62, 2**62], [0, 2**62], [0, 0], [-1, 4], [1.0, 4], [True, 4], ["4", 4], [4], 4):
            yield _case(changed(first, {"matrices": Pairs([("a", row | {"shape": shape})])}), f"shape {shape}")
        for text in ("", "5", "null", "[]", "{}", "\ufeff" + first, first + "x", '{"lqlora_plan": 4}', "[" * 10**6):
            yield _case(text, f"text {text[:9]!r}")


def _case(text: str, made: str, must: Literal["", "read", "refuse"] = "") -> Case:
    size = len(text.encode("utf-8", errors="surrogatepass"))
    readers: dict[str, Callable[[], Any]] = {"Plan.from_json": lambda: lq.Plan.from_json(text)}
    return Case(made, size, ("text",), readers, functools.partial(_judge, text), must)


def _judge(text: str, results: dict[str, Any]) -> None:
    for plan in results.values():
        same("a plan that is written and read again", lq.Plan.from_json(plan.to_json()), plan)
        _compare(plan, json.loads(text, parse_int=_integer))


def _integer(digits: str) -> int:
    """Return an integer; one that Python refuses to convert is only in a key that readers ignore."""
    return int(digits) if len(digits) <= 4000 else -1


def _compare(plan: Any, document: dict[str, Any]) -> None:
    """Compare a plan with its document, as the standard library reads it."""
    rows = document["matrices"]
    same("names", list(plan.matrices), list(rows))
    for own, row in zip(plan.matrices.values(), rows.values(), strict=True):
        same("format", canonical(str(own.format)), canonical(row["format"]))
        for key in ("rank", "shape", "cost", "factor_bits"):
            same(key, getattr(own, key), row[key])
        if "levels" in row:
            book = own.format.codebook
            same("levels", book.levels.tolist(), np.array(row["levels"], dtype=np.float32).tolist())
            same("normalization", book.normalization, row["normalization"])
    for key in ("status", "solver", "note", "goal", "objective", "counts_factors"):
        same(key, getattr(plan, key), document[key])
    same("bound", plan.bound, -math.inf if document["bound"] is None else document["bound"])
    limits, matrices, count = _LIMIT_KEYS[document["lqlora_plan"]]
    found = [[own.matrices, own.used, own.upper, own.lower, own.unit, own.weight_count] for own in plan.limits]
    keys = (matrices, "used", "upper", "lower", "unit", count)
    same("limits", found, [[row[key] for key in keys] for row in document[limits]])
