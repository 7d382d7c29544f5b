"""Matrices of one kind taken together: all query projections, say, whatever their layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from lqlora.reports.pictures import kind_and_layer

if TYPE_CHECKING:
    from lqlora.allocation.plan import Plan

__all__ = ["Kind", "summarize_kinds"]


@dataclass(frozen=True)
class Kind:
    """All matrices of one kind in a plan.

    Parameters
    ----------
    name : str
        Name of the matrices, with ``*`` for layers and experts.
    matrices, weights : int
        How many there are.
    storage_bits, factor_bits : int
        Exact bits of their quantized parts and of their low-rank factors.
    lowest, highest : Fraction
        Bits per weight of the smallest and of the largest quantized part, relative to its weights.
    ranks : tuple of int
        Least and largest rank.
    error_share : float
        Their share in the weighted squared error of the plan.
    """

    name: str
    matrices: int
    weights: int
    storage_bits: int
    factor_bits: int
    lowest: Fraction
    highest: Fraction
    ranks: tuple[int, int]
    error_share: float

    @property
    def bits_per_weight(self) -> Fraction:
        """Exact bits per weight of the quantized parts together."""
        return Fraction(self.storage_bits, max(1, self.weights))


def summarize_kinds(plan: Plan) -> tuple[Kind, ...]:
    """Take the matrices of each kind of a plan together.

    Parameters
    ----------
    plan : Plan
        Any plan.

    Returns
    -------
    tuple of Kind
        In the order of first appearance.
    """
    members: dict[str, list[str]] = {}
    for name in plan.formats:
        members.setdefault(kind_and_layer(name)[0], []).append(name)
    return tuple(_summarize(plan, kind, names) for kind, names in members.items())


def _summarize(plan: Plan, kind: str, names: list[str]) -> Kind:
    counts = [math.prod(plan.shapes[name]) for name in names]
    bits = [plan.formats[name].storage_bits(plan.shapes[name]) for name in names]
    each = [Fraction(own, max(1, count)) for own, count in zip(bits, counts, strict=True)]
    ranks = [plan.ranks[name] for name in names]
    cost = math.fsum(plan.costs[name] for name in names)
    return Kind(
        kind,
        len(names),
        sum(counts),
        sum(bits),
        sum(plan.factor_bits[name] for name in names),
        min(each),
        max(each),
        (min(ranks), max(ranks)),
        cost / plan.error if plan.error else 0.0,
    )
