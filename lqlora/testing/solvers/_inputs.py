"""Problems for the properties of solvers: small enough for enumeration, and hard in one respect each.

A simple problem allows every choice, has one upper limit that can be met, costs between 0.5 and 100, and sizes that are
small multiples of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lqlora.solvers import Budget, Problem
from lqlora.testing.solvers._subject import optimum

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from hypothesis.strategies import DrawFn

    from lqlora.testing.solvers._subject import SolverSubject

Inputs: TypeAlias = SearchStrategy[dict[str, Any]]

_COSTS = st.sampled_from([0.5, 1.0, 1.25, 2.0, 3.75, 7.0, 100.0])
_SIZES = st.integers(1, 12).map(lambda size: 16 * size)


@st.composite
def _table(draw: DrawFn, cells: SearchStrategy[Any], rows: int, columns: int, dtype: Any) -> npt.NDArray[Any]:
    values = draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns))
    return np.array(values, dtype=dtype).reshape(rows, columns)


@st.composite
def _tables(
    draw: DrawFn, costs: SearchStrategy[float] = _COSTS, sizes: SearchStrategy[int] = _SIZES, least: int = 1
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    rows, columns = draw(st.integers(least, 4)), draw(st.integers(least, 4))
    return draw(_table(costs, rows, columns, np.float64)), draw(_table(sizes, rows, columns, np.int64))


def _limit(draw: DrawFn, size: npt.NDArray[np.int64]) -> int:
    """Draw an upper limit that can be met."""
    low, high = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    return draw(st.integers(low, max(low, high)))


def _problems(make: Callable[..., SearchStrategy[Problem]], *args: Any) -> Callable[[SolverSubject], Inputs]:
    def inputs(_: SolverSubject) -> Inputs:
        return st.fixed_dictionaries({"problem": make(*args)})

    return inputs


@st.composite
def _one_budget(draw: DrawFn, costs: SearchStrategy[float] = _COSTS, least: int = 1) -> Problem:
    cost, size = draw(_tables(costs, least=least))
    return Problem(cost, size, budgets=[Budget(upper=_limit(draw, size))])


@st.composite
def _scaled(draw: DrawFn, factor: float) -> Problem:
    problem = draw(_one_budget())
    return Problem(problem.cost * factor, problem.size, budgets=problem.budgets)


@st.composite
def _with_mask(draw: DrawFn) -> Problem:
    cost, size = draw(_tables())
    allowed = draw(_table(st.booleans(), cost.shape[0], cost.shape[1], np.bool_))
    # Problem refuses a row without an allowed choice. In the range of the limit, forbidden sizes count as the largest one,
    # so that no limit is below the least total of allowed sizes.
    allowed[~allowed.any(axis=1)] = True
    return Problem(cost, size, allowed, budgets=[Budget(upper=_limit(draw, np.where(allowed, size, size.max())))])


@st.composite
def _with_ties(draw: DrawFn) -> Problem:
    cost, size = draw(_tables())
    ties = draw(st.lists(st.integers(0, 2), min_size=len(cost), max_size=len(cost)))
    column = draw(st.integers(0, cost.shape[1] - 1))  # a column that every row can take
    limit = draw(st.integers(int(size[:, column].sum()), int(size.max(axis=1).sum())))
    return Problem(cost, size, ties=ties, budgets=[Budget(upper=limit)])


@st.composite
def _with_budgets(draw: DrawFn) -> Problem:
    cost, size = draw(_tables())
    some = draw(st.lists(st.booleans(), min_size=len(cost), max_size=len(cost)).map(np.array))
    # Each limit can be met alone, but the three may contradict each other: the check allows an infeasible problem.
    parts = [np.ones(len(cost), dtype=bool), some, ~some]
    limits = [_limit(draw, size[members]) if members.any() else 0 for members in parts]
    return Problem(cost, size, budgets=[Budget(upper=u, members=m) for u, m in zip(limits, parts, strict=True)])


@st.composite
def _with_lower_limit(draw: DrawFn) -> Problem:
    cost, size = draw(_tables())
    upper = _limit(draw, size)
    return Problem(cost, size, budgets=[Budget(upper=upper, lower=draw(st.integers(0, upper)))])


@st.composite
def _without_budget(draw: DrawFn) -> Problem:
    return Problem(*draw(_tables()))


@st.composite
def _met_to_the_unit(draw: DrawFn) -> Problem:
    # Solvers scale the rows of a problem and accept violations of about 1e-6 of a row. Totals of some 2**20 units make
    # that a whole unit or more, and the limit is exactly a total that is reached, or one unit less.
    sizes = st.tuples(st.integers(1, 3), st.integers(0, 5)).map(lambda pair: pair[0] * 2**20 + pair[1])
    cost, size = draw(_tables(sizes=sizes))
    chosen = draw(st.lists(st.integers(0, cost.shape[1] - 1), min_size=len(cost), max_size=len(cost)))
    used = int(size[np.arange(len(cost)), chosen].sum())
    least = int(size.min(axis=1).sum())
    return Problem(cost, size, budgets=[Budget(upper=max(least, used - draw(st.integers(0, 1))))])


@st.composite
def _exact_limit(draw: DrawFn) -> Problem:
    cost, size = draw(_tables())
    limit = _limit(draw, size)
    return Problem(cost, size, budgets=[Budget(upper=limit, lower=limit)])


def _infeasible() -> SearchStrategy[Problem]:
    """Draw infeasible problems: the total size must equal a value that no assignment has."""
    # Presolve finds a total outside the range infeasible, so it would not reach the solver.
    return _exact_limit().filter(lambda problem: np.isinf(optimum(problem)))


def _costs_of_many_sizes() -> SearchStrategy[Problem]:
    return _one_budget(st.integers(-27, 27).map(lambda exponent: 10.0 ** (exponent / 6)), least=3)


def larger_problem(seed: int, rows: int = 200, columns: int = 30) -> Problem:
    """Return a problem whose costs fall with size, as for formats, with a budget between the extremes."""
    # One more bit halves the step of a quantizer, and so divides its squared error by four: 4**-bits. The noise
    # of each cost is wider than the step from one format to the next, so that some choices are dominated.
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.uniform(2, 8, columns))
    size = (rng.integers(1, 9, (rows, 1)) * 4096 * bits).astype(np.int64) // 8 * 8
    cost = rng.lognormal(sigma=1.5, size=(rows, 1)) * 4.0**-bits * rng.uniform(0.8, 1.25, (rows, columns))
    low, high = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    return Problem(cost, size, budgets=[Budget(upper=low + (high - low) // 3)])


def nothing(_: SolverSubject) -> Inputs:
    """Return a strategy for checks that need no input."""
    return st.just({})


def seeds(_: SolverSubject) -> Inputs:
    """Draw seeds of larger problems, which are too long to print."""
    return st.fixed_dictionaries({"seed": st.integers(0, 1)})


easy = _problems(_one_budget)
tiny_costs, huge_costs = _problems(_scaled, 1e-12), _problems(_scaled, 1e12)
negative_costs = _problems(_one_budget, _COSTS.map(lambda cost: 3.0 - cost))
equal_costs = _problems(_one_budget, st.sampled_from([0.0, 1.0]))
wide_costs = _problems(_costs_of_many_sizes)
masks, ties = _problems(_with_mask), _problems(_with_ties)
several_budgets, lower_limits, no_budget = (
    _problems(_with_budgets), _problems(_with_lower_limit), _problems(_without_budget),
)  # fmt: skip
to_the_unit, infeasible = _problems(_met_to_the_unit), _problems(_infeasible)
