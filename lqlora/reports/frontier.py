"""Points of a Pareto frontier: sizes and errors of several plans of the same matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lqlora._annotations import annotated
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lqlora.allocation.plan import Plan

__all__ = ["ParetoPoint", "pareto_points"]


class ParetoPoint(NamedTuple):
    """Size and error of one plan.

    Parameters
    ----------
    bits_per_weight : float
        Counted bits per weight: low-rank factors are among them if the plan counts them.
    error : float
        Sum of the costs.
    """

    bits_per_weight: float
    error: float


@annotated
def pareto_points(plans: Iterable[Plan]) -> list[ParetoPoint]:
    """Return sizes and errors of plans, smallest first: the data of :func:`lqlora.reports.plot_pareto`.

    Parameters
    ----------
    plans : iterable of Plan
        Plans of one cost table.

    Returns
    -------
    list of ParetoPoint
        One for each plan. Plans of one size are sorted by falling error.

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
    for number, plan in enumerate(plans):
        if plan.shapes != plans[0].shapes:
            raise InvalidArgumentError(f"plans must have the same matrices, but plan {number} differs from plan 0.")
        if plan.counts_factors != plans[0].counts_factors:
            raise InvalidArgumentError(
                f"plans must count the same parts, but counts_factors is {plan.counts_factors} in plan {number} and "
                f"{plans[0].counts_factors} in plan 0."
            )
    # Points of equal size are sorted by falling error. A line through all points then drops vertically there, and goes
    # on from the least error of that size.
    points = [ParetoPoint(float(plan.counted_bits_per_weight), plan.error) for plan in plans]
    return sorted(points, key=lambda point: (point.bits_per_weight, -point.error))
