"""JSON documents of plans: writing version 4, reading versions 3 and 4, and the JSON Schema."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

from lqlora.allocation.limits import LimitUse
from lqlora.codebooks import codebook_from_json
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, codebook_name

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read", "schema", "write"]

_VERSION = 4

#: By version, the keys of the list of limits, of the matrices of a limit, and of their number of weights.
_KEYS = {3: ("demands", "what", "weights"), 4: ("limits", "matrices", "weight_count")}

# Keys whose values follow from other keys. They are written for readers, and computed afresh when a document is read.
_DERIVED = {"bits_per_weight", "storage_bits", "factor_bits"}
_DERIVED_OF_MATRIX = {"bits_per_weight", "storage_bits", "error_share"}

_TEXTS = ("status", "solver", "note", "goal")


def write(head: Mapping[str, Any], matrices: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the document of the given keys, with a line for each matrix."""
    # One line a matrix, so that a diff of two plans shows the matrices that differ. The head ends in a brace, which is
    # taken off for the matrices to follow.
    lines = [f"  {json.dumps(name)}: {json.dumps(row, allow_nan=False)}" for name, row in matrices.items()]
    start = json.dumps({"lqlora_plan": _VERSION, **head}, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{start},\n "matrices": {{\n' + ",\n".join(lines) + "\n }\n}"


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the documents that are written."""
    text = resources.files("lqlora.allocation").joinpath("plan.schema.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


def read(text: str) -> dict[str, Any]:
    """Return the fields of a plan from its document, with a dict of fields for each matrix."""
    try:
        document = json.loads(text)
        if document["lqlora_plan"] not in _KEYS:
            raise ValueError(f"its version is {document['lqlora_plan']!r}, and this library reads versions 3 and 4")
        return _read_head(document)
    except KeyError as error:
        raise InvalidArgumentError(f"text must be a plan in JSON, but the key {error} is missing.") from error
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"text must be a plan in JSON: {type(error).__name__}, {error}.") from error


def _read_head(document: dict[str, Any]) -> dict[str, Any]:
    keys = _KEYS[document["lqlora_plan"]]
    head = {key: value for key, value in document.items() if key not in _DERIVED}
    _only(head, {"lqlora_plan", "objective", "bound", "counts_factors", keys[0], "matrices", *_TEXTS})
    rows = {name: _read_matrix(row) for name, row in head["matrices"].items()}
    if not isinstance(head["counts_factors"], bool):
        raise TypeError(f"counts_factors must be true or false, got {head['counts_factors']!r}")
    if not isinstance(head[keys[0]], list):
        raise TypeError(f"{keys[0]} must be a list, got {head[keys[0]]!r}")
    if head["goal"] not in ("error", "bits"):
        raise ValueError(f"goal must be 'error' or 'bits', got {head['goal']!r}")
    return {
        "matrices": rows,
        "objective": _finite("objective", head["objective"]),
        "bound": -math.inf if head["bound"] is None else _finite("bound", head["bound"]),
        "counts_factors": head["counts_factors"],
        "limits": tuple(_read_limit(row, keys) for row in head[keys[0]]),
        **{key: _text(key, head[key]) for key in _TEXTS},
    }


def _read_matrix(row: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in row.items() if key not in _DERIVED_OF_MATRIX}
    _only(own, {"format", "rank", "shape", "cost", "factor_bits", "levels", "normalization"})
    if not isinstance(own["shape"], list) or len(own["shape"]) != 2:
        raise TypeError(f"shape must be a list of two lengths, got {own['shape']!r}")
    spelling = _text("format", own["format"])
    return {
        "format": BlockFormat.parse(spelling, codebook_from_json(codebook_name(spelling), own)),
        "rank": _count("rank", own["rank"]),
        "shape": tuple(_count("shape", length) for length in own["shape"]),
        "cost": _at_least_0("cost", own["cost"]),
        "factor_bits": _count("factor_bits", own["factor_bits"]),
    }


def _read_limit(row: dict[str, Any], keys: tuple[str, str, str]) -> LimitUse:
    _, matrices, weight_count = keys
    _only(row, {matrices, "used", "upper", "lower", "unit", weight_count})
    given = {key: row[key] for key in ("upper", "lower") if row[key] is not None}
    for key, number in {"used": row["used"], **given}.items():
        _finite(key, number)
    # Numbers are passed on as they were read: whole numbers of bits stay integers.
    unit, count = _text("unit", row["unit"]), _count(weight_count, row[weight_count])
    return LimitUse(_text(matrices, row[matrices]), row["used"], **given, unit=unit, weight_count=count)


def _only(found: Mapping[str, Any], known: set[str]) -> None:
    # An unknown key may be misspelled or belong to a later version. To ignore it would be to read another plan.
    if unknown := set(found) - known:
        raise ValueError(f"the key {min(unknown)!r} is unknown")


def _count(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a whole number of at least 0, got {value!r}")
    return value


def _finite(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    return float(value)


def _at_least_0(key: str, value: object) -> float:
    if _finite(key, value) < 0:
        raise ValueError(f"{key} must be at least 0, got {value!r}")
    return _finite(key, value)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key} must be text, got {value!r}")
    return value
