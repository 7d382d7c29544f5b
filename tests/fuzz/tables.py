"""Fuzzer of cost tables: JSON documents of ``CostTable.to_json``."""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import lqlora as lq
from tests.fuzz.mutate import Pairs, Raw, changed, mutated_text
from tests.fuzz.running import Case, same
from tests.fuzz.spelling import canonical

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Tables", "made_table"]


def made_table() -> lq.CostTable:
    """Return a table of four matrices in standard formats, and in codebooks that are stored with their levels."""
    rng = np.random.default_rng(0)
    weights = {f"layers.{i}.{kind}": rng.standard_normal((8, 16)) for i in range(2) for kind in ("up", "down")}
    ternary = lq.BlockFormat(lq.Codebook([-1, 0, 1], name="ternary"), 8, "float16")
    formats = [lq.BlockFormat.parse("nf2/8:u8/16:float32"), ternary, lq.BlockFormat.parse("nf4+fit/16@-1:bfloat16")]
    return lq.cost_table(weights, formats, ranks=(0, 2), max_iter=1)


@functools.cache
def documents() -> tuple[str, ...]:
    """Return a table with a forbidden configuration, and one of a single matrix."""
    table = made_table()
    table.costs[1, 2] = math.inf
    w = np.random.default_rng(0).standard_normal((8, 16))
    return (table.to_json(), lq.cost_table({"a": w}, [table.formats[0]], rank=1).to_json())


class Tables:
    """Mutated tables."""

    def draw(self, rng: random.Random, folder: Path) -> Case:
        """Return a mutated table."""
        return _case(*mutated_text(rng, rng.choice(documents())))

    def corpus(self, folder: Path, *, slow: bool = False) -> Iterator[Case]:
        """Yield tables that were once read wrong, or ended in an error of another library."""
        for text in documents():
            yield _case(text, "unchanged", must="read")
        first = documents()[0]
        rows, columns = json.loads(first)["matrices"], json.loads(first)["configurations"]
        for value in (None, 5, "x", [], Pairs(), [5], [None], [[]], Raw("[" * 100_000 + "]" * 100_000)):
            yield _case(changed(first, {"matrices": value}), f"matrices {str(value)[:9]}")
            yield _case(changed(first, {"configurations": value}), f"configurations {str(value)[:9]}")
        for name in ([], 5, None, "\x1b[2J\n" * 200, "\ud800", rows[1]["name"]):
            yield _case(changed(first, {"matrices": [rows[0] | {"name": name}, *rows[1:]]}), f"name {str(name)[:9]!r}")
        for cost in (*map(Raw, ("NaN", "-1", "1e999", "9" * 5000, "1" + "0" * 400)), "1", True, [1.0], Pairs()):
            costs = [cost, *rows[0]["costs"][1:]]
            yield _case(changed(first, {"matrices": [rows[0] | {"costs": costs}, *rows[1:]]}), f"cost {str(cost)[:9]}")
        for size in (*map(Raw, (str(2**63), "9" * 5000, "1.0")), -1, True, "1", None):
            for key in ("sizes", "factor_sizes"):
                sizes = [size, *rows[0][key][1:]]
                yield _case(changed(first, {"matrices": [rows[0] | {key: sizes}, *rows[1:]]}), f"{key} {str(size)[:9]}")
        for shape in ([2**62, 2**62], [-1, 4], [True, 4], [4.0, 4], ["4", 4], 4, None, [0] * 10_000):
            made = changed(first, {"matrices": [rows[0] | {"shape": shape}, *rows[1:]]})
            yield _case(made, f"shape {str(shape)[:20]}")
        for fmt in (None, 5, "", "nf4", "\x1b[31m" * 300, "nf4/64:u8/256", "nf4/" + "9" * 30, columns[1]["format"]):
            made = changed(first, {"configurations": [columns[0] | {"format": fmt}, *columns[1:]]})
            yield _case(made, f"format {str(fmt)[:9]!r}")
        many = [Pairs([("format", f"bof8-{1000 + i}/64:float32"), ("rank", 0)]) for i in range(100)]
        yield _case(changed(first, {"configurations": many, "matrices": []}), "100 codebooks that take long to make")
        for text in (
            "",
            "5",
            "null",
            "[]",
            "{}",
            "\ufeff" + first,
            first + "x",
            '{"lqlora_cost_table": 1}',
            "[" * 10**6,
        ):
            yield _case(text, f"text {text[:9]!r}")


def _case(text: str, made: str, must: Literal["", "read", "refuse"] = "") -> Case:
    size = len(text.encode("utf-8", errors="surrogatepass"))
    readers: dict[str, Callable[[], Any]] = {"CostTable.from_json": lambda: lq.CostTable.from_json(text)}
    return Case(made, size, ("text",), readers, functools.partial(_judge, text), must)


def _judge(text: str, results: dict[str, Any]) -> None:
    for table in results.values():
        again = lq.CostTable.from_json(table.to_json())
        for key in ("names", "shapes", "configurations"):
            same(f"{key}, written and read again", getattr(again, key), getattr(table, key))
        for key in ("costs", "sizes", "factor_sizes"):
            same(f"{key}, written and read again", getattr(again, key).tobytes(), getattr(table, key).tobytes())
        _compare(table, json.loads(text))


def _compare(table: Any, document: dict[str, Any]) -> None:
    """Compare a table with its document, as the standard library reads it."""
    rows, columns = document["matrices"], document["configurations"]
    same("names", list(table.names), [row["name"] for row in rows])
    same("shapes", [list(shape) for shape in table.shapes], [row["shape"] for row in rows])
    wanted = [[math.inf if cost is None else _float(cost) for cost in row["costs"]] for row in rows]
    same("costs", table.costs.tolist(), wanted)
    for key in ("sizes", "factor_sizes"):
        same(key, getattr(table, key).tolist(), [row[key] for row in rows])
    for own, column in zip(table.configurations, columns, strict=True):
        same("format", canonical(str(own.format)), canonical(column["format"]))
        same("rank", own.rank, column["rank"])
        if "levels" in column:
            book = own.format.codebook
            same("levels", book.levels.tolist(), np.array(column["levels"], dtype=np.float32).tolist())
            same("normalization", book.normalization, column["normalization"])


def _float(cost: Any) -> Any:
    """Return a whole number as the float that it is stored as."""
    return float(cost) if type(cost) is int else cost
