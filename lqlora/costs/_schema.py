"""Schemas of the JSON documents of cost tables, and of the lines of stores of costs."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from lqlora._documents import Count, Number, Size, Text
from lqlora.codebooks import Normalization

__all__ = ["Column", "Head", "Line", "Row", "StoreVersion", "StoredCosts", "Table", "TableVersion"]


class TableVersion(Struct):
    """Version of a cost table."""

    lqlora_cost_table: int


class Column(Struct, frozen=True):
    """A configuration of a cost table."""

    format: Text
    rank: Count
    levels: Annotated[list[Number], Meta(min_length=2, max_length=256)] | UnsetType = UNSET
    normalization: Normalization | UnsetType = UNSET


class Row(Struct, frozen=True):
    """A matrix of a cost table. A cost that is null forbids a configuration: JSON has no infinity."""

    name: Text
    shape: tuple[Count, ...]
    costs: list[Size | None]
    sizes: list[Count]
    factor_sizes: list[Count]


class Table(Struct, frozen=True):
    """A cost table. Other keys are not read."""

    configurations: list[Column]
    matrices: list[Row]


class Line(Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a store, with the checksum of its document."""

    sum: Text
    line: dict[str, Any]


class StoreVersion(Struct):
    """Version of a store."""

    lqlora_costs: int


class Head(Struct, frozen=True, forbid_unknown_fields=True):
    """Document of the first line of a store."""

    lqlora_costs: int
    numerics: int
    settings: dict[str, Any]


class StoredCosts(Struct, frozen=True, forbid_unknown_fields=True):
    """Document of a later line of a store."""

    name: Text
    shape: tuple[Count, ...]
    content: Text
    weighting: Text
    costs: dict[Text, Number]
