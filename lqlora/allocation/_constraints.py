"""Constraints of an allocation, applied to a cost table: allowed configurations, minimum bits, ties and limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from lqlora._messages import given
from lqlora._options import require_kind
from lqlora._patterns import NameIndex
from lqlora.allocation.limits import Limit
from lqlora.allocation.ties import tie_groups
from lqlora.costs.table import Configuration, CostTable
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.solvers import Budget

if TYPE_CHECKING:
    from lqlora._patterns import Pattern
    from lqlora.allocation.ties import Tie

__all__ = ["AppliedLimit", "Choices", "Wanted", "constrain"]

#: Formats or configurations that a caller fixes or forbids. A format stands for itself at every rank.
Wanted: TypeAlias = "BlockFormat | Configuration | Iterable[BlockFormat | Configuration]"


@dataclass(frozen=True, eq=False)
class AppliedLimit:
    """A limit, applied to the rows of a table.

    Parameters
    ----------
    limit : Limit
        The limit as the caller gave it.
    members : ndarray of bool, shape (n,)
        Rows that count.
    weight_count : int
        Number of weights of these rows.
    bits : int
        The limit in whole bits: rounded down if it is an upper limit, rounded up if it is a lower one.
    smallest, largest : int
        Range of the size of these rows in bits if no other limit holds.
    """

    limit: Limit
    members: npt.NDArray[np.bool_]
    weight_count: int
    bits: int
    smallest: int
    largest: int

    @property
    def is_out_of_reach(self) -> bool:
        """True if no choice meets the limit, even without the other limits."""
        return self.largest < self.bits if self.limit.at_least else self.smallest > self.bits

    def budget(self) -> Budget:
        """Return the limit as a budget of solvers, in whole bits on some rows."""
        members = None if self.members.all() else self.members
        return Budget(lower=self.bits, members=members) if self.limit.at_least else Budget(self.bits, members=members)


@dataclass(frozen=True, eq=False)
class Choices:
    """A cost table, with the choices that are left for its n matrices among k configurations.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    index : NameIndex
        Names of the matrices.
    size : ndarray of int64, shape (n, k)
        Bits that count in every budget and limit.
    allowed : ndarray of bool, shape (n, k)
        Configurations that a matrix may take.
    ties : ndarray of int64, shape (n,)
        Matrices with equal numbers take one configuration.
    counts_factors : bool
        Whether the bits of the low-rank factors are in ``size``.
    limits : tuple of AppliedLimit
        Limits other than the budget.
    """

    table: CostTable
    index: NameIndex
    size: npt.NDArray[np.int64]
    allowed: npt.NDArray[np.bool_]
    ties: npt.NDArray[np.int64]
    counts_factors: bool
    limits: tuple[AppliedLimit, ...] = ()

    def apply(self, limit: Limit) -> AppliedLimit:
        """Find the matrices of a limit, and its range in bits."""
        rows = self.index.rows(limit.include, limit.exclude, parameter="Limit.include")
        if not rows:
            raise InvalidArgumentError(f"Limit.exclude must leave a matrix, but it leaves none: {limit}.")
        members = np.zeros(len(self.ties), dtype=np.bool_)
        members[rows] = True
        # Sizes are whole bits, so a limit of B bits may be rounded to a whole number without loss: size <= B is the
        # same as size <= floor(B), and size >= B the same as size >= ceil(B). B is an exact fraction here.
        count = sum(map(math.prod, map(self.table.shapes.__getitem__, rows)))
        bits = limit.in_bits(count)
        whole = math.ceil(bits) if limit.at_least else math.floor(bits)
        return AppliedLimit(limit, members, count, whole, *self._size_range(members))

    def refuse_contradictions(self) -> None:
        """Raise if tied matrices have no configuration in common."""
        rows = np.arange(len(self.ties))
        if (self.ties == rows).all():  # no ties: each row has a configuration, as _allowed has checked
            return
        order, first = self._groups(rows >= 0)
        empty = ~np.logical_and.reduceat(self.allowed[order], first).any(axis=1)
        if empty.any():
            tied = np.flatnonzero(self.ties == self.ties[order[first[empty][0]]])
            some = ", ".join(repr(self.table.names[row]) for row in tied[:5])
            raise InvalidArgumentError(
                f"ties must leave a configuration that all tied matrices may take, but there is none for {some}. "
                "Fix or forbid fewer formats."
            )

    def _size_range(self, members: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """Return the smallest and the largest total size of some rows, in bits, without any limit."""
        # A group of tied rows takes one column j. Its rows outside `members` take part in deciding which j are allowed,
        # but add no bits. With the groups G that have a member, and A(G) the columns that all of G may take,
        #   smallest = sum_G min_{j in A(G)} sum_{i in G and members} size_ij, and largest the same with max.
        # A(G) is not empty: see refuse_contradictions. So the fillers of forbidden columns below are never chosen.
        order, first = self._groups(np.isin(self.ties, self.ties[members]))
        allowed = np.logical_and.reduceat(self.allowed[order], first)
        size = np.add.reduceat(np.where(members[order, None], self.size[order], 0), first)
        least = np.where(allowed, size, np.iinfo(np.int64).max).min(axis=1)
        return int(least.sum()), int(np.where(allowed, size, -1).max(axis=1).sum())

    def _groups(self, rows: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return rows sorted by tie, and the index at which each tie begins, for ``ufunc.reduceat``."""
        # A stable sort keeps the rows of a tie in order. A tie begins where the sorted numbers change; -1 is below all
        # of them.
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
    """Apply every constraint but the budget to a table."""
    require_kind(table, "table", CostTable, "a CostTable")
    for name, by_pattern in (("fixed", fixed), ("forbidden", forbidden), ("minimum_bits", minimum_bits)):
        if by_pattern is not None:
            require_kind(by_pattern, name, Mapping, "a mapping from patterns")
    for name, several in (("limits", limits), ("ties", ties)):
        require_kind(several, name, Iterable, "a list or another iterable")
    limits = tuple(limits)
    for limit in limits:
        require_kind(limit, "limits", Limit, "an iterable of Limit")
    if count_factors is not None:
        require_kind(count_factors, "count_factors", (bool, np.bool_), "True, False or None")
    index = NameIndex(table.names)
    counts_factors = len(table.ranks) > 1 if count_factors is None else bool(count_factors)
    choices = Choices(
        table,
        index,
        table.sizes + table.factor_sizes if counts_factors else table.sizes,
        _allowed(table, index, fixed or {}, forbidden or {}, minimum_bits or {}),
        tie_groups(index, ties),
        counts_factors,
    )
    choices.refuse_contradictions()
    return dataclasses.replace(choices, limits=tuple(map(choices.apply, limits)))


def _allowed(
    table: CostTable,
    index: NameIndex,
    fixed: Mapping[Pattern, Wanted],
    forbidden: Mapping[Pattern, Wanted],
    minimum_bits: Mapping[Pattern, float | Fraction],
) -> npt.NDArray[np.bool_]:
    """Return the mask of shape (n, k) of the configurations that each matrix may take, ties and limits aside."""
    # Constraints on single matrices become a mask, and only ties and sums reach the solver. Each of them can only
    # remove configurations, so their order does not matter. An infinite cost is how a table forbids a configuration.
    allowed = np.isfinite(table.costs)
    for pattern, wanted in fixed.items():
        allowed[index.rows(pattern, parameter="fixed")] &= _columns(table, wanted, "fixed")
    for pattern, wanted in forbidden.items():
        allowed[index.rows(pattern, parameter="forbidden")] &= ~_columns(table, wanted, "forbidden")
    for pattern, bits in minimum_bits.items():
        rate = _rate(bits)
        for row in index.rows(pattern, parameter="minimum_bits"):
            # Exact: sizes are whole bits, so size >= rate * weights is the same as size >= ceil(rate * weights).
            allowed[row] &= table.sizes[row] >= math.ceil(rate * math.prod(table.shapes[row]))
    empty = np.flatnonzero(~allowed.any(axis=1))
    if len(empty):
        raise InvalidArgumentError(
            f"fixed, forbidden and minimum_bits must leave a configuration for each matrix, but there is none for "
            f"{table.names[empty[0]]!r}. Fix or forbid fewer formats, or add larger ones to the table."
        )
    return allowed


def _columns(table: CostTable, wanted: Wanted, parameter: str) -> npt.NDArray[np.bool_]:
    """Return a mask of shape (k,): the configurations that have one of the given formats, or are given themselves."""
    if isinstance(wanted, BlockFormat | Configuration):
        wanted = (wanted,)
    require_kind(wanted, parameter, Iterable, "formats or configurations, or iterables of them, by pattern")
    several = tuple(wanted)
    for one in several:
        if not isinstance(one, BlockFormat | Configuration) or (
            one not in table.formats and one not in table.configurations
        ):
            shown = one if isinstance(one, BlockFormat | Configuration) else given(one)
            raise InvalidArgumentError(f"{parameter} must name formats of the cost table, got {shown}.")
    return np.array([own in several or own.format in several for own in table.configurations])


def _rate(bits: float | Fraction) -> Fraction:
    try:
        return bits if isinstance(bits, Fraction) else Fraction(float(bits))
    except (OverflowError, TypeError, ValueError):
        raise InvalidArgumentError(
            f"minimum_bits must be finite numbers of bits per weight, got {given(bits)}."
        ) from None
