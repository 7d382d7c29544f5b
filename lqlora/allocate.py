"""Which format for which matrix: a table of costs, an integer linear program, and the plan it gives."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lqlora import _plots
from lqlora._parallel import map_matrices
from lqlora.decompose import Init, decompose
from lqlora.errors import InfeasibleBudgetError, InvalidArgumentError, SolverError
from lqlora.formats import BlockFormat
from lqlora.solvers import Budget, Problem, SolveOptions, solve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from lqlora._typing import Array
    from lqlora.weighting import AbstractWeighting

__all__ = ["CostTable", "Plan", "allocate", "cost_table"]

_SPEC = 1


@dataclass(frozen=True, eq=False)
class CostTable:
    """Error and size of every matrix in every format.

    Parameters
    ----------
    names : tuple of str
        Matrices, one a row.
    shapes : tuple of tuple of int
        Their shapes.
    formats : tuple of BlockFormat
        Formats, one a column.
    costs : ndarray of float64, shape (n, m)
        Weighted squared error of each decomposition.
    sizes : ndarray of int64, shape (n, m)
        Exact storage in bits, without the low-rank factors.
    rank : int
        Rank of the decompositions.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    formats: tuple[BlockFormat, ...]
    costs: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    rank: int

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(math.prod(shape) for shape in self.shapes)


def cost_table(
    weights: Mapping[str, Array | Callable[[], Array]],
    formats: Sequence[BlockFormat],
    *,
    rank: int,
    weighting: Mapping[str, AbstractWeighting] | None = None,
    init: Init = "quantize",
    max_iter: int = 2,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CostTable:
    """Decompose every matrix in every format, and note the error and the size.

    Parameters
    ----------
    weights : mapping of str to array of shape (m, n), or to a callable that returns one
        Matrices by name. A callable is called when its row is computed, so that few matrices are in memory at a time.
    formats : sequence of BlockFormat
        Formats to choose from.
    rank : int
        Rank of the low-rank part.
    weighting : mapping of str to AbstractWeighting, optional
        Norm of each matrix; matrices not named count uniformly. Costs are compared across matrices, so the weightings
        must be on one scale: Fisher information is.
    init, max_iter, seed : str, int, int
        See :func:`lqlora.decompose`. Few iterations suffice: the table ranks formats, it is not the final answer.
    executor : concurrent.futures.Executor, optional
        Where to run, a matrix a task; a thread per core if not given.
    progress : callable, optional
        Called with the number of matrices done and the number of all.

    Returns
    -------
    CostTable
        The same for every executor.

    Raises
    ------
    InvalidArgumentError
        If there are no matrices or no formats, a format occurs twice, or a weighting names no matrix.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse("nf2/64:float16"), lq.BlockFormat.parse("nf4/64:float16")]
    >>> table = lq.cost_table({"a": np.random.default_rng(0).standard_normal((32, 32))}, formats, rank=2)
    >>> bool(table.costs[0, 0] > table.costs[0, 1]), table.sizes.tolist()
    (True, [[2304, 4352]])
    """
    weighting = weighting or {}
    if not weights or not formats:
        raise InvalidArgumentError("A cost table needs at least one matrix and one format.")
    if len(set(formats)) < len(formats):
        raise InvalidArgumentError("A format occurs twice.")
    if unknown := set(weighting) - set(weights):
        raise InvalidArgumentError(f"Weightings for unknown matrices: {', '.join(sorted(unknown))}.")
    row = functools.partial(_cost_row, formats=tuple(formats), rank=rank, init=init, max_iter=max_iter, seed=seed)
    items = [(name, source, weighting.get(name)) for name, source in weights.items()]
    rows = map_matrices(row, items, executor, progress)
    shapes = tuple(shape for shape, _ in rows)
    sizes = np.array([[fmt.storage_bits(shape) for fmt in formats] for shape in shapes], dtype=np.int64)
    return CostTable(tuple(weights), shapes, tuple(formats), np.array([costs for _, costs in rows]), sizes, rank)


def _cost_row(
    item: tuple[str, Array | Callable[[], Array], AbstractWeighting | None],
    *,
    formats: Iterable[BlockFormat],
    rank: int,
    init: Init,
    max_iter: int,
    seed: int,
) -> tuple[tuple[int, ...], list[float]]:
    name, source, weighting = item
    matrix = source() if callable(source) else source
    found = [
        decompose(matrix, fmt, rank, weighting=weighting, init=init, max_iter=max_iter, seed=seed, name=name)
        for fmt in formats
    ]
    return tuple(matrix.shape), [d.squared_error for d in found]


@dataclass(frozen=True)
class Plan:
    """A format and a rank for each matrix, with what is proven about the choice.

    Parameters
    ----------
    formats : dict of str to BlockFormat
        By matrix.
    ranks : dict of str to int
        By matrix.
    shapes : dict of str to tuple of int
        By matrix.
    costs : dict of str to float
        Weighted squared error of each matrix, as in the cost table.
    objective, bound : float
        Sum of the costs, and a proven lower bound on it.
    status : str
        ``"OPTIMAL"`` or ``"FEASIBLE"``: see :class:`lqlora.solvers.Status`.
    solver : str
        Solver and version.
    note : str
        What the caller should know, such as a budget above the dearest choice.
    seconds : float
        Wall time of the solver. Not written to JSON: equal inputs give equal files.
    """

    formats: dict[str, BlockFormat]
    ranks: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    costs: dict[str, float]
    objective: float
    bound: float
    status: str
    solver: str
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        """Relative gap between objective and bound."""
        return (self.objective - self.bound) / abs(self.objective) if self.objective != self.bound else 0.0

    @property
    def storage_bits(self) -> int:
        """Exact bits of the quantized parts."""
        return sum(fmt.storage_bits(self.shapes[name]) for name, fmt in self.formats.items())

    @property
    def bits_per_weight(self) -> Fraction:
        """Exact bits per weight of the quantized parts, scales and padding included."""
        return Fraction(self.storage_bits, sum(math.prod(shape) for shape in self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized parts."""
        return -(-self.storage_bits // 8)

    def to_json(self) -> str:
        """Return the plan as a JSON document.

        Returns
        -------
        str
            The same text for the same plan, indented, formats in their one-line spelling.
        """
        rows = {
            name: {"format": str(fmt), "rank": self.ranks[name], "shape": self.shapes[name], "cost": self.costs[name]}
            for name, fmt in self.formats.items()
        }
        head = {name: getattr(self, name) for name in ("objective", "bound", "status", "solver", "note")}
        figures = {"bits_per_weight": float(self.bits_per_weight), "storage_bits": self.storage_bits}
        return json.dumps({"lqlora_plan": _SPEC, **head, **figures, "matrices": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read the document that :meth:`to_json` writes.

        Parameters
        ----------
        text : str
            JSON.

        Returns
        -------
        Plan
            Equal to the one written.

        Raises
        ------
        InvalidArgumentError
            If the text is no such document.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            if document["lqlora_plan"] != _SPEC:
                raise InvalidArgumentError(f"Plan of version {document['lqlora_plan']!r}; this library reads {_SPEC}.")
            rows = document["matrices"]
            return cls(
                {name: BlockFormat.parse(row["format"]) for name, row in rows.items()},
                {name: int(row["rank"]) for name, row in rows.items()},
                {name: tuple(row["shape"]) for name, row in rows.items()},
                {name: float(row["cost"]) for name, row in rows.items()},
                *(document[key] for key in ("objective", "bound", "status", "solver", "note")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidArgumentError(f"This is no lqlora plan: {type(error).__name__} {error}.") from error

    def table(self) -> str:
        """Return the plan as a Markdown table, one matrix a row.

        Returns
        -------
        str
            Text without a newline at the end.
        """
        lines = ["| matrix | format | bits per weight | rank | cost |", "|---|---|---|---|---|"]
        for name, fmt in self.formats.items():
            bits = fmt.storage_bits(self.shapes[name]) / math.prod(self.shapes[name])
            lines.append(f"| {name} | {fmt} | {bits:.3f} | {self.ranks[name]} | {self.costs[name]:.3g} |")
        return "\n".join(lines)

    def bits_by_matrix(self) -> dict[str, float]:
        """Return the bits per weight of each matrix: the data of :meth:`plot`.

        Returns
        -------
        dict of str to float
            Exact storage divided by the number of weights.
        """
        return {
            name: fmt.storage_bits(self.shapes[name]) / math.prod(self.shapes[name])
            for name, fmt in self.formats.items()
        }

    def plot(self) -> Any:
        """Draw bits per weight by kind of matrix and layer.

        Returns
        -------
        matplotlib.figure.Figure
            Belongs to no window; save it, or show it in a notebook.

        Raises
        ------
        MissingDependencyError
            If matplotlib is not installed.
        """
        figure = _plots.figure(figsize=(8, 3))
        _plots.draw_bits(
            figure.add_subplot(), self.bits_by_matrix(), f"{float(self.bits_per_weight):.3f} bits per weight"
        )
        return figure


def allocate(
    table: CostTable,
    *,
    bits_per_weight: float | Fraction | None = None,
    total_bytes: int | None = None,
    ties: Sequence[Sequence[str]] = (),
    fixed: Mapping[str, BlockFormat] | None = None,
    forbidden: Mapping[str, Sequence[BlockFormat]] | None = None,
    solver: str = "auto",
    time_limit: float | None = None,
    rel_gap: float = 1e-6,
) -> Plan:
    """Choose a format for each matrix, at least total cost within a budget.

    Parameters
    ----------
    table : CostTable
        Costs and sizes.
    bits_per_weight : float or Fraction, optional
        Budget as an average over all weights; codes, scales and second-level scales count, low-rank factors do not.
    total_bytes : int, optional
        Budget in bytes, of the same parts. Exactly one of the two is given.
    ties : sequence of sequences of str, optional
        Matrices of one group get one format, such as those that a serving engine fuses.
    fixed : mapping of str to BlockFormat, optional
        Formats that are decided already.
    forbidden : mapping of str to sequence of BlockFormat, optional
        Formats a matrix must not take.
    solver : str, default "auto"
        See :func:`lqlora.solvers.solve`.
    time_limit : float, optional
        Seconds.
    rel_gap : float, default 1e-6
        Relative gap at which an assignment counts as optimal.

    Returns
    -------
    Plan
        Within the budget, in exact integers. A budget above the dearest choice gives the plan of least cost, and a note.

    Raises
    ------
    InfeasibleBudgetError
        If no choice fits; says what range of budgets is feasible.
    InvalidArgumentError
        If the budget is negative or not a number, or a name or format is not in the table.
    SolverError
        If the solver failed, or found nothing in time.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3.1.

    Examples
    --------
    >>> import numpy as np, lqlora as lq
    >>> formats = [lq.BlockFormat.parse("nf2/64:float16"), lq.BlockFormat.parse("nf4/64:float16")]
    >>> rng = np.random.default_rng(0)
    >>> table = lq.cost_table({n: s * rng.standard_normal((32, 32)) for n, s in [("a", 1), ("b", 9)]}, formats, rank=2)
    >>> {name: str(fmt) for name, fmt in lq.allocate(table, bits_per_weight=3.25).formats.items()}
    {'a': 'nf2/64:float16', 'b': 'nf4/64:float16'}
    """
    budget, asked = _budget_bits(table, bits_per_weight, total_bytes)
    allowed = _allowed(table, fixed or {}, forbidden or {})
    problem = Problem(table.costs, table.sizes, allowed, _tie_groups(table, ties), (Budget(upper=budget),))
    smallest, largest = _size_range(problem)
    if budget < smallest:
        raise _infeasible(table, asked, smallest, largest)
    solution = solve(problem, solver, SolveOptions(time_limit=time_limit, rel_gap=rel_gap))
    if solution.assignment is None:
        raise SolverError(f"{solution.solver}: {solution.status.value} ({solution.message})")
    chosen = dict(zip(table.names, solution.assignment.tolist(), strict=True))
    costs = table.costs[np.arange(len(table.names)), solution.assignment]
    note = "The budget is above the dearest choice of formats: it does not bind." if budget >= largest else ""
    return Plan(
        {name: table.formats[j] for name, j in chosen.items()},
        dict.fromkeys(table.names, table.rank),
        dict(zip(table.names, table.shapes, strict=True)),
        dict(zip(table.names, costs.tolist(), strict=True)),
        solution.objective,
        solution.bound,
        solution.status.name,
        f"{solution.solver} {solution.version}",
        note,
        solution.seconds,
    )


def _budget_bits(
    table: CostTable, bits_per_weight: float | Fraction | None, total_bytes: int | None
) -> tuple[int, Fraction]:
    """Return the budget in whole bits and in bits per weight."""
    if (bits_per_weight is None) == (total_bytes is None):
        raise InvalidArgumentError("Give a budget as bits_per_weight or as total_bytes, and only one of them.")
    try:
        asked = Fraction(bits_per_weight) if total_bytes is None else Fraction(8 * total_bytes, table.weight_count)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        raise InvalidArgumentError(f"A budget is a finite number, not {bits_per_weight or total_bytes!r}.") from None
    if asked < 0:
        raise InvalidArgumentError(f"A budget is not negative: {float(asked):g} bits per weight were asked for.")
    return math.floor(asked * table.weight_count), asked


def _column(table: CostTable, fmt: BlockFormat) -> int:
    if fmt not in table.formats:
        raise InvalidArgumentError(f"Format {fmt} is not in the cost table.")
    return table.formats.index(fmt)


def _row(table: CostTable, name: str) -> int:
    if name not in table.names:
        raise InvalidArgumentError(f"Matrix {name!r} is not in the cost table.")
    return table.names.index(name)


def _allowed(
    table: CostTable, fixed: Mapping[str, BlockFormat], forbidden: Mapping[str, Sequence[BlockFormat]]
) -> npt.NDArray[np.bool_]:
    allowed = np.isfinite(table.costs)
    for name, formats in forbidden.items():
        allowed[_row(table, name), [_column(table, fmt) for fmt in formats]] = False
    for name, fmt in fixed.items():
        column = _column(table, fmt)
        permitted = bool(allowed[_row(table, name), column])
        allowed[_row(table, name)] = False
        allowed[_row(table, name), column] = permitted
    for name, row in zip(table.names, allowed, strict=True):
        if not row.any():
            raise InvalidArgumentError(f"No format is left for {name!r}.")
    return allowed


def _tie_groups(table: CostTable, ties: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Return a group number for each row; overlapping ties merge."""
    groups = np.arange(len(table.names))
    for tie in ties:
        members = {int(groups[_row(table, name)]) for name in tie}
        groups[np.isin(groups, list(members))] = min(members, default=0)
    return groups


def _size_range(problem: Problem) -> tuple[int, int]:
    """Bits of the smallest and the largest assignment, ties respected."""
    smallest = largest = 0
    for tie in np.unique(problem.ties):
        rows = problem.ties == tie
        sizes = problem.size[rows].sum(axis=0)[problem.allowed[rows].all(axis=0)]
        if not sizes.size:
            raise InvalidArgumentError("Tied matrices have no format in common.")
        smallest, largest = smallest + int(sizes.min()), largest + int(sizes.max())
    return smallest, largest


def _infeasible(table: CostTable, asked: Fraction, smallest: int, largest: int) -> InfeasibleBudgetError:
    low, high = Fraction(smallest, table.weight_count), Fraction(largest, table.weight_count)
    message = (
        f"A budget of {float(asked):.4f} bits per weight is infeasible: the formats allow {float(low):.4f} to "
        f"{float(high):.4f}. Raise the budget or add smaller formats."
    )
    return InfeasibleBudgetError(message, asked=asked, minimum=low, maximum=high)
