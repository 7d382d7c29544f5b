"""JSON documents of plans: writing version 4, reading versions 3 and 4, and the JSON Schema."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

from lqlora._messages import shown
from lqlora.allocation.limits import LimitUse
from lqlora.codebooks import check_work, codebook_from_json
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, codebook_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lqlora._documents import Reader
    from lqlora.allocation._schema import Limit, Matrix

__all__ = ["read", "schema", "write"]

_VERSION = 4


def write(head: Mapping[str, Any], matrices: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the document of the given keys, with a line for each matrix."""
    from lqlora._documents import Reader, Text  # noqa: PLC0415 - imports msgspec
    from lqlora.allocation._schema import Matrix, PlanV4  # noqa: PLC0415

    # One line a matrix, so that a diff of two plans shows the matrices that differ. The head ends in no matrices, which
    # are taken off for those to follow.
    check_work(codebook_name(row["format"]) for row in matrices.values() if "levels" not in row)
    reader = Reader("plan must be one that can be read again", InvalidArgumentError)
    names = Reader("matrices must have names that can be read again", InvalidArgumentError)
    lines = [f"  {names.write(name, Text)}: {reader.write(row, Matrix)}" for name, row in matrices.items()]
    start = reader.write({"lqlora_plan": _VERSION, **head, "matrices": {}}, PlanV4, indent=1).removesuffix("}\n}")
    return start + "\n" + ",\n".join(lines) + "\n }\n}"


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the documents that are written."""
    text = resources.files("lqlora.allocation").joinpath("plan.schema.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


def read(text: str) -> dict[str, Any]:
    """Return the fields of a plan from its document, with a dict of fields for each matrix."""
    from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec
    from lqlora.allocation._schema import PlanV3, PlanV4, Version  # noqa: PLC0415

    reader = Reader("text must be a plan in JSON", InvalidArgumentError)
    plain = reader.parse(text)
    version = reader.convert(plain, Version).lqlora_plan
    if version not in (3, 4):
        raise reader.fault("lqlora_plan", f"must be version 3 or 4, which this library reads, got {shown(version)}.")
    document = reader.convert(plain, PlanV3 if version == 3 else PlanV4)
    limits = "demands" if version == 3 else "limits"
    return {
        "matrices": _matrices(document.matrices, reader),
        "bound": -math.inf if document.bound is None else document.bound,
        "limits": tuple(_limit(row, reader, f"{limits}[{index}]") for index, row in enumerate(document.limits)),
        **{key: getattr(document, key) for key in ("objective", "counts_factors", "status", "solver", "note", "goal")},
    }


def _matrices(rows: Mapping[str, Matrix], reader: Reader) -> dict[str, dict[str, Any]]:
    from lqlora._documents import key_step, present_fields  # noqa: PLC0415 - imports msgspec

    found, place = {}, "matrices"
    try:
        check_work(codebook_name(row.format) for row in rows.values() if not present_fields(row, "levels"))
        for name, row in rows.items():
            place = f"matrices{key_step(name)}.format"
            codebook = codebook_from_json(codebook_name(row.format), present_fields(row, "levels", "normalization"))
            own = BlockFormat.parse(row.format, codebook)
            own.lines(row.shape)  # refuses an axis that the matrix does not have
            found[name] = {
                "format": own,
                "rank": row.rank,
                "shape": row.shape,
                "cost": row.cost,
                "factor_bits": row.factor_bits,
            }
    except InvalidArgumentError as error:
        raise reader.fault(place, f": {error}") from error
    if not math.isfinite(sum(row.cost for row in rows.values())):
        raise reader.fault("matrices", "must have costs whose sum is finite, got more.")
    return found


def _limit(row: Limit, reader: Reader, place: str) -> LimitUse:
    bounds = {key: value for key in ("upper", "lower") if (value := getattr(row, key)) is not None}
    try:
        return LimitUse(row.matrices, row.used, **bounds, unit=row.unit, weight_count=row.weight_count)
    except InvalidArgumentError as error:
        raise reader.fault(place, f": {error}") from error
