"""What is gained by more bits: the errors of several plans over their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lqlora.errors import InvalidArgumentError
from lqlora.reports import pictures as _plots

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lqlora.allocation.plan import Plan

__all__ = ["ParetoPoint", "pareto_points", "plot_pareto"]


class ParetoPoint(NamedTuple):
    """Size and error of one plan.

    Parameters
    ----------
    bits_per_weight : float
        What budgets counted, per weight.
    error : float
        Sum of the costs.
    """

    bits_per_weight: float
    error: float


def pareto_points(plans: Iterable[Plan]) -> list[ParetoPoint]:
    """Return sizes and errors of plans, smallest first: the data of :func:`plot_pareto`.

    Parameters
    ----------
    plans : iterable of Plan
        Of one cost table.

    Returns
    -------
    list of ParetoPoint
        One for each plan; those of one size by falling error.

    Raises
    ------
    InvalidArgumentError
        If the plans are of different matrices, or some count the factors and others do not.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse("nf2/64:float16"), lq.BlockFormat.parse("nf4/64:float16")]
    >>> table = lq.cost_table({"a": np.random.default_rng(0).standard_normal((32, 32))}, formats, rank=2)
    >>> points = pareto_points(lq.allocate(table, bits_per_weight=bits) for bits in (4.25, 2.25))
    >>> [point.bits_per_weight for point in points], points[0].error > points[1].error
    ([2.25, 4.25], True)
    """
    plans = list(plans)
    if any((plan.shapes, plan.counts_factors) != (plans[0].shapes, plans[0].counts_factors) for plan in plans):
        raise InvalidArgumentError("Plans are compared if they are of the same matrices and count the same parts.")
    points = [ParetoPoint(float(plan.counted_bits_per_weight), plan.error) for plan in plans]
    return sorted(points, key=lambda point: (point.bits_per_weight, -point.error))


def plot_pareto(plans: Iterable[Plan]) -> Any:
    """Draw the errors of plans over their bits per weight.

    Parameters
    ----------
    plans : iterable of Plan
        Of one cost table; one or more.

    Returns
    -------
    matplotlib.figure.Figure
        Belongs to no window; save it, or show it in a notebook.

    Raises
    ------
    InvalidArgumentError
        If there is no plan, the plans are of different matrices, or some count the factors and others do not.
    MissingDependencyError
        If matplotlib is not installed.
    """
    points = pareto_points(plans)
    if not points:
        raise InvalidArgumentError("A picture of plans needs at least one plan.")
    figure = _plots.figure(figsize=(6, 4))
    bits, errors = zip(*points, strict=True)
    _plots.draw_pareto(figure.add_subplot(), bits, errors)
    return figure
