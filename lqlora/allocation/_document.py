"""A plan as a JSON document, and back."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

from lqlora.allocation.demand import Demand
from lqlora.codebooks import Codebook, is_standard
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, codebook_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora.allocation.plan import Plan

__all__ = ["VERSION", "read", "schema", "write"]

VERSION = 3

# What follows from the rest: it is written for readers, and computed afresh when a document is read.
_DERIVED = {"bits_per_weight", "storage_bits", "factor_bits"}
_DERIVED_OF_ROW = {"bits_per_weight", "storage_bits", "error_share"}


def write(plan: Plan) -> str:
    """Return the document, a line for each matrix."""
    head: dict[str, Any] = {
        "lqlora_plan": VERSION,
        "status": plan.status,
        "solver": plan.solver,
        "note": plan.note,
        "goal": plan.goal,
        "objective": plan.objective,
        "bound": plan.bound if math.isfinite(plan.bound) else None,  # JSON has no infinity
        "bits_per_weight": float(plan.bits_per_weight),
        "storage_bits": plan.storage_bits,
        "factor_bits": sum(plan.factor_bits.values()),
        "counts_factors": plan.counts_factors,
        "demands": [vars(demand) for demand in plan.demands],
    }
    bits, shares = plan.bits_by_matrix(), plan.error_by_matrix()
    rows = {name: _row(plan, name) | {"bits_per_weight": bits[name], "error_share": shares[name]} for name in bits}
    lines = [f"  {json.dumps(name)}: {json.dumps(row, allow_nan=False)}" for name, row in rows.items()]
    start = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{start},\n "matrices": {{\n' + ",\n".join(lines) + "\n }\n}"


def _row(plan: Plan, name: str) -> dict[str, Any]:
    fmt = plan.formats[name]
    row = {
        "format": str(fmt),
        "rank": plan.ranks[name],
        "shape": list(plan.shapes[name]),
        "cost": plan.costs[name],
        "storage_bits": fmt.storage_bits(plan.shapes[name]),
        "factor_bits": plan.factor_bits[name],
    }
    if is_standard(fmt.codebook):
        return row
    return row | {"levels": fmt.codebook.levels.tolist(), "normalization": fmt.codebook.normalization}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the document."""
    text = resources.files("lqlora.allocation").joinpath("plan.schema.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


def read(text: str) -> dict[str, Any]:
    """Return the fields of the plan that a document describes."""
    try:
        document = json.loads(text)
        if document["lqlora_plan"] != VERSION:
            raise InvalidArgumentError(f"Plan of version {document['lqlora_plan']!r}; this library reads {VERSION}.")
        return _read_head(document)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"This is no lqlora plan: {type(error).__name__} {error}.") from error


def _read_head(document: dict[str, Any]) -> dict[str, Any]:
    head = {key: value for key, value in document.items() if key not in _DERIVED}
    words = ("status", "solver", "note", "goal")
    _only(head, {"lqlora_plan", "objective", "bound", "counts_factors", "demands", "matrices", *words})
    rows = {name: _read_row(row) for name, row in head["matrices"].items()}
    if not isinstance(head["counts_factors"], bool):
        raise TypeError(f"{head['counts_factors']!r} is neither true nor false")
    if not isinstance(head["demands"], list):
        raise TypeError(f"{head['demands']!r} is no list of demands")
    if head["goal"] not in ("error", "bits"):
        raise ValueError(f"{head['goal']!r} is neither 'error' nor 'bits'")
    return {
        "objective": _finite(head["objective"]),
        "bound": -math.inf if head["bound"] is None else _finite(head["bound"]),
        "counts_factors": head["counts_factors"],
        "demands": tuple(_read_demand(demand) for demand in head["demands"]),
        **{word: _word(head[word]) for word in words},
        **{
            field: {name: row[field] for name, row in rows.items()}
            for field in ("formats", "ranks", "shapes", "costs", "factor_bits")
        },
    }


def _read_row(row: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in row.items() if key not in _DERIVED_OF_ROW}
    _only(own, {"format", "rank", "shape", "cost", "factor_bits", "levels", "normalization"})
    if not isinstance(own["shape"], list) or len(own["shape"]) != 2:
        raise TypeError(f"{own['shape']!r} is no shape")
    text = _word(own["format"])
    codebook = None
    if "levels" in own or "normalization" in own:
        codebook = Codebook([_finite(x) for x in own["levels"]], codebook_name(text), own["normalization"])
    return {
        "formats": BlockFormat.parse(text, codebook),
        "ranks": _count(own["rank"]),
        "shapes": tuple(_count(length) for length in own["shape"]),
        "costs": _positive(own["cost"]),
        "factor_bits": _count(own["factor_bits"]),
    }


def _read_demand(row: dict[str, Any]) -> Demand:
    _only(row, {"what", "used", "upper", "lower", "unit", "weights"})
    limits = {key: row[key] for key in ("upper", "lower") if row[key] is not None}
    for number in (row["used"], *limits.values()):
        _finite(number)
    # As they are: whole numbers of bits stay whole.
    return Demand(_word(row["what"]), row["used"], **limits, unit=_word(row["unit"]), weights=_count(row["weights"]))


def _only(found: Mapping[str, Any], known: set[str]) -> None:
    if unknown := set(found) - known:
        raise ValueError(f"it has an unknown key {min(unknown)!r}")


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _finite(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _positive(value: object) -> float:
    if _finite(value) < 0:
        raise ValueError(f"{value!r} is below zero")
    return _finite(value)


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
