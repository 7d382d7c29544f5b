"""Schemas of the JSON documents of plans, versions 3 and 4."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from lqlora._documents import Count, Number, Size, Text
from lqlora.codebooks import Normalization

__all__ = ["Limit", "Matrix", "PlanV3", "PlanV4", "Version"]

#: Whole numbers of bits stay integers.
_Amount = Annotated[int, Meta(ge=0, le=2**63 - 1)] | Size


class Version(Struct):
    """The one field of a document that is the same in all versions."""

    lqlora_plan: int


class Matrix(Struct, frozen=True, forbid_unknown_fields=True):
    """Choice for a matrix. The last three fields follow from others, and are not used."""

    format: Text
    rank: Count
    shape: tuple[Count, Count]
    cost: Size
    factor_bits: Count
    levels: Annotated[list[Number], Meta(min_length=2, max_length=256)] | UnsetType = UNSET
    normalization: Normalization | UnsetType = UNSET
    bits_per_weight: Number | UnsetType = UNSET
    storage_bits: int | UnsetType = UNSET
    error_share: Number | UnsetType = UNSET


class Limit(Struct, frozen=True, forbid_unknown_fields=True):
    """Use of the budget or of a limit."""

    matrices: Text
    used: _Amount
    upper: _Amount | None
    lower: _Amount | None
    unit: Literal["bits", "error"]
    weight_count: Count


class _LimitV3(Limit, frozen=True, forbid_unknown_fields=True):
    """Use of a limit with the keys of version 3."""

    matrices: Text = field(name="what")
    weight_count: Count = field(name="weights")


# An unknown key may be misspelled or belong to a later version. To ignore it would be to read another plan.
class PlanV4(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Document of version 4. The last three fields follow from others, and are not used."""

    lqlora_plan: int
    status: Text
    solver: Text
    note: Text
    goal: Literal["error", "bits"]
    objective: Number
    bound: Number | None
    counts_factors: bool
    limits: list[Limit]
    matrices: dict[Text, Matrix]
    bits_per_weight: Number | UnsetType = UNSET
    storage_bits: int | UnsetType = UNSET
    factor_bits: int | UnsetType = UNSET


class PlanV3(PlanV4, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Document of version 3."""

    limits: list[_LimitV3] = field(name="demands")  # type: ignore[assignment] # the same class, with other keys in JSON
