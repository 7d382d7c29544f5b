"""A cost table with what an allocation may choose from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lqlora.allocation._allowed import allowed_columns
from lqlora.allocation._names import Names
from lqlora.allocation.ties import tie_groups
from lqlora.errors import InvalidArgumentError
from lqlora.solvers import Budget

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from fractions import Fraction

    from lqlora._patterns import Pattern
    from lqlora.allocation._allowed import Wanted
    from lqlora.allocation.limits import Limit
    from lqlora.allocation.ties import Tie
    from lqlora.costs.table import CostTable

__all__ = ["Bound", "Choices", "constrain"]


@dataclass(frozen=True, eq=False)
class Bound:
    """A limit with the rows that count, mask of shape (n,), their number of weights, and whole bits."""

    limit: Limit
    members: npt.NDArray[np.bool_]
    weight_count: int
    bits: int

    def budget(self) -> Budget:
        """Return what solvers need to know of it."""
        members = None if self.members.all() else self.members
        return Budget(lower=self.bits, members=members) if self.limit.at_least else Budget(self.bits, members=members)

    def breaks(self, used: float) -> bool:
        """Tell whether so many bits break the limit."""
        return used < self.bits if self.limit.at_least else used > self.bits


@dataclass(frozen=True, eq=False)
class Choices:
    """A cost table, the bits that count, what may be chosen, what is tied, and limits."""

    table: CostTable
    size: npt.NDArray[np.int64]
    allowed: npt.NDArray[np.bool_]
    ties: npt.NDArray[np.int64]
    bounds: tuple[Bound, ...]
    counts_factors: bool

    def bound(self, limit: Limit) -> Bound:
        """Look up the matrices of a limit."""
        return _bound(self.table, Names(self.table.names), limit)

    def size_range(self, members: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """Return the least and the greatest size in bits that some rows may have together, whatever limits say."""
        order, first = self._groups(np.isin(self.ties, self.ties[members]))
        allowed = np.logical_and.reduceat(self.allowed[order], first)
        size = np.add.reduceat(np.where(members[order, None], self.size[order], 0), first)
        least = np.where(allowed, size, np.iinfo(np.int64).max).min(axis=1)
        return int(least.sum()), int(np.where(allowed, size, -1).max(axis=1).sum())

    def refuse_contradictions(self) -> None:
        """Raise if tied rows have no choice in common."""
        order, first = self._groups(np.ones(len(self.ties), dtype=np.bool_))
        empty = ~np.logical_and.reduceat(self.allowed[order], first).any(axis=1)
        if empty.any():
            tied = np.flatnonzero(self.ties == self.ties[order[first[empty][0]]])
            some = ", ".join(repr(self.table.names[row]) for row in tied[:5])
            raise InvalidArgumentError(f"Tied matrices have no format in common: {some}.")

    def _groups(self, rows: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return rows with those of each tie side by side, and where each tie begins among them."""
        chosen = np.flatnonzero(rows)
        order = chosen[np.argsort(self.ties[chosen], kind="stable")]
        return order, np.flatnonzero(np.diff(self.ties[order], prepend=-1))


def constrain(
    table: CostTable,
    *,
    limits: Iterable[Limit],
    ties: Iterable[Tie],
    fixed: Mapping[Pattern, Wanted] | None,
    forbidden: Mapping[Pattern, Wanted] | None,
    minimum_bits: Mapping[Pattern, float | Fraction] | None,
    count_factors: bool | None,
) -> Choices:
    """Apply every constraint to a table but the budget."""
    names = Names(table.names)
    counts_factors = len(table.ranks) > 1 if count_factors is None else bool(count_factors)
    choices = Choices(
        table,
        table.sizes + table.factor_sizes if counts_factors else table.sizes,
        allowed_columns(table, names, fixed or {}, forbidden or {}, minimum_bits or {}),
        tie_groups(table.names, ties),
        tuple(_bound(table, names, limit) for limit in limits),
        counts_factors,
    )
    choices.refuse_contradictions()
    return choices


def _bound(table: CostTable, names: Names, limit: Limit) -> Bound:
    rows = names.rows(limit.include, limit.exclude)
    if not rows:
        raise InvalidArgumentError(f"There is no matrix for the limit of {limit}.")
    members = np.zeros(len(table.names), dtype=np.bool_)
    members[rows] = True
    count = sum(math.prod(table.shapes[row]) for row in rows)
    bits = limit.in_bits(count)
    return Bound(limit, members, count, math.ceil(bits) if limit.at_least else math.floor(bits))
