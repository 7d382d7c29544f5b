"""Matrices of a plan grouped by kind, such as all query projections, and by layer: bits, ranks, shares of the error."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lqlora._annotations import annotated

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from lqlora.allocation.plan import Plan, PlannedMatrix

__all__ = [
    "Grid",
    "Kind",
    "bits_by_layer",
    "by_kind",
    "by_layer",
    "error_by_layer",
    "kind_and_layer",
    "ranks_by_layer",
]


class Grid(NamedTuple):
    """Values by kind of matrix and by layer.

    Parameters
    ----------
    kinds : list of str
        One a row.
    layers : list of int
        One a column, sorted.
    values : ndarray of float64, shape (kinds, layers)
        NaN where there is no matrix.
    """

    kinds: list[str]
    layers: list[int]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """All matrices of one kind in a plan.

    Parameters
    ----------
    name : str
        Name of the matrices, with ``*`` for layers and experts.
    matrices, weights : int
        Number of matrices and number of their weights.
    storage_bits, factor_bits : int
        Exact bits of their quantized parts and of their low-rank factors.
    lowest, highest : Fraction
        Least and greatest bits per weight of a quantized part.
    ranks : tuple of int
        Smallest and largest rank.
    error_share : float
        Share of these matrices in the weighted squared error of the plan.
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


@annotated
def by_kind(plan: Plan) -> tuple[Kind, ...]:
    """Summarize the matrices of each kind: the data of the table by kind.

    Parameters
    ----------
    plan : Plan
        Any plan.

    Returns
    -------
    tuple of Kind
        Kinds in the order of first appearance.
    """
    members: dict[str, list[PlannedMatrix]] = {}
    for name, own in plan.matrices.items():
        members.setdefault(kind_and_layer(name)[0], []).append(own)
    total = plan.error
    return tuple(_summarize(kind, own, total) for kind, own in members.items())


@annotated
def bits_by_layer(plan: Plan) -> Grid:
    """Return the bits per weight of the quantized parts by kind and layer.

    Parameters
    ----------
    plan : Plan
        Any plan.

    Returns
    -------
    Grid
        Matrices that share kind and layer, such as the experts of a layer, are taken together.
    """
    # The mean is over the weights, not over the matrices: experts of a layer may differ in shape. A cell without a
    # matrix is NaN in both grids and stays NaN, since np.maximum passes NaN on. An empty matrix has 0 bits per weight,
    # not 0 / 0.
    bits = by_layer({name: own.storage_bits for name, own in plan.matrices.items()})
    counts = by_layer({name: own.weight_count for name, own in plan.matrices.items()})
    return bits._replace(values=bits.values / np.maximum(counts.values, 1))


@annotated
def ranks_by_layer(plan: Plan) -> Grid:
    """Return the ranks by kind and layer.

    Parameters
    ----------
    plan : Plan
        Any plan.

    Returns
    -------
    Grid
        The mean over matrices that share kind and layer.
    """
    ranks, ones = by_layer(plan.ranks), by_layer(dict.fromkeys(plan.ranks, 1))
    return ranks._replace(values=ranks.values / ones.values)


@annotated
def error_by_layer(plan: Plan) -> Grid:
    """Return the shares of the weighted squared error by kind and layer.

    Parameters
    ----------
    plan : Plan
        Any plan.

    Returns
    -------
    Grid
        The sum over matrices that share kind and layer.
    """
    return by_layer(plan.error_by_matrix())


def by_layer(values: Mapping[str, float]) -> Grid:
    """Arrange values of named matrices by kind and by layer.

    Parameters
    ----------
    values : mapping of str to float
        Values by name of the matrix. If several matrices share kind and layer, such as experts, their values are added.

    Returns
    -------
    Grid
        Kinds in the order of first appearance. A kind is shortened to its last word if all last words differ.

    Examples
    --------
    >>> by_layer({"layers.0.q_proj": 2.0, "layers.1.q_proj": 4.0})
    Grid(kinds=['q_proj'], layers=[0, 1], values=array([[2., 4.]]))
    """
    keys = {name: kind_and_layer(name) for name in values}
    kinds = {kind: row for row, kind in enumerate(dict.fromkeys(kind for kind, _ in keys.values()))}
    layers = {layer: column for column, layer in enumerate(sorted({layer for _, layer in keys.values()}))}
    grid = np.full((len(kinds), len(layers)), np.nan)
    for name, (kind, layer) in keys.items():
        cell = kinds[kind], layers[layer]
        # nansum takes NaN, which stands for no matrix, as 0: the first value of a cell replaces it.
        grid[cell] = np.nansum([grid[cell], values[name]])
    # Last words alone are ambiguous where a layer has two parts of the same structure: self_attn.out_proj and
    # cross_attn.out_proj are both "out_proj". Then all kinds keep their whole names.
    short = [kind.rpartition(".")[2] for kind in kinds]
    return Grid(short if len(set(short)) == len(kinds) else list(kinds), list(layers), grid)


def kind_and_layer(name: str) -> tuple[str, int]:
    """Split the name of a matrix into its kind and its layer.

    Parameters
    ----------
    name : str
        Name of the matrix, with dots between its parts.

    Returns
    -------
    kind : str
        The name with ``*`` for each part that is a number. If no part is one, ``*`` stands for the first number inside
        a part.
    layer : int
        The first of those numbers, 0 if there is none.

    Examples
    --------
    >>> kind_and_layer("gpt2.h.3.experts.1.up")
    ('gpt2.h.*.experts.*.up', 3)
    >>> kind_and_layer("layer_3/kernel")
    ('layer_*/kernel', 3)
    """
    # ASCII digits only: str.isdigit is true of "²", too, which int() refuses. The first number is the layer, since
    # names go from the outside in: the number of an expert follows that of its layer. All parts that are numbers
    # become "*", so that the experts of a layer are one kind.
    parts = name.split(".")
    if numbers := [part for part in parts if re.fullmatch(r"[0-9]+", part)]:
        return ".".join("*" if part in numbers else part for part in parts), int(numbers[0])
    number = re.search(r"[0-9]+", name)
    return (name, 0) if number is None else (re.sub(r"[0-9]+", "*", name, count=1), int(number[0]))


def _summarize(kind: str, matrices: list[PlannedMatrix], total_error: float) -> Kind:
    # Bits are fractions, so the extremes are exact. The sum of errors is rounded once, as in Plan.error.
    bits = [own.bits_per_weight for own in matrices]
    ranks = [own.rank for own in matrices]
    error = math.fsum(own.cost for own in matrices)
    return Kind(
        kind,
        len(matrices),
        sum(own.weight_count for own in matrices),
        sum(own.storage_bits for own in matrices),
        sum(own.factor_bits for own in matrices),
        min(bits),
        max(bits),
        (min(ranks), max(ranks)),
        error / total_error if total_error else 0.0,
    )
