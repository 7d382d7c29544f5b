"""The plan: a format for each matrix, and what is proven about the choice."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from lqlora import _plots
from lqlora.codebooks import Codebook, is_standard
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, codebook_name
from lqlora.solvers import relative_gap

__all__ = ["Plan"]

_SPEC = 3

_HEAD = ("goal", "objective", "bound", "counts_factors", "status", "solver", "note")


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
        What was minimized, and a proven lower bound on it; see ``goal``.
    status : str
        ``"OPTIMAL"`` or ``"FEASIBLE"``: see :class:`lqlora.solvers.Status`.
    solver : str
        Solver and version.
    note : str
        What the caller should know, such as a budget above the dearest choice.
    goal : {"error", "bits"}
        ``"error"`` if the objective is the sum of the costs, ``"bits"`` if it is ``counted_bits``.
    factor_bits : dict of str to int
        Exact bits of the low-rank factors, by matrix.
    counts_factors : bool
        True if the factors counted in every budget and limit.
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
    goal: str = "error"
    factor_bits: dict[str, int] = field(default_factory=dict)
    counts_factors: bool = False
    seconds: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        """Relative gap between objective and bound."""
        return relative_gap(self.objective, self.bound)

    @property
    def error(self) -> float:
        """Sum of the costs, rounded once: the same in any order of the matrices."""
        return math.fsum(self.costs.values())

    @property
    def storage_bits(self) -> int:
        """Exact bits of the quantized parts."""
        return sum(fmt.storage_bits(self.shapes[name]) for name, fmt in self.formats.items())

    @property
    def counted_bits(self) -> int:
        """Exact bits that budgets counted: the quantized parts, and the factors if ``counts_factors``."""
        return self.storage_bits + (sum(self.factor_bits.values()) if self.counts_factors else 0)

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def bits_per_weight(self) -> Fraction:
        """Exact bits per weight of the quantized parts, scales and padding included."""
        return Fraction(self.storage_bits, max(1, self.weight_count))

    @property
    def counted_bits_per_weight(self) -> Fraction:
        """Exact bits per weight of ``counted_bits``: what a budget of bits per weight limits."""
        return Fraction(self.counted_bits, max(1, self.weight_count))

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized parts."""
        return -(-self.storage_bits // 8)

    def to_json(self) -> str:
        """Return the plan as a JSON document.

        Returns
        -------
        str
            The same text for the same plan, indented, formats in their one-line spelling; with the levels of codebooks
            that have no standard name.
        """
        rows: dict[str, dict[str, Any]] = {
            name: {"format": str(fmt), "rank": self.ranks[name], "shape": self.shapes[name], "cost": self.costs[name]}
            for name, fmt in self.formats.items()
        }
        for name, bits in self.factor_bits.items():
            rows[name]["factor_bits"] = bits
        for name, fmt in self.formats.items():
            if not is_standard(fmt.codebook):
                rows[name] |= {"levels": fmt.codebook.levels.tolist(), "normalization": fmt.codebook.normalization}
        head = {name: getattr(self, name) for name in _HEAD}
        head["bound"] = self.bound if math.isfinite(self.bound) else None  # JSON has no infinity
        figures = {"bits_per_weight": float(self.bits_per_weight), "storage_bits": self.storage_bits}
        return json.dumps({"lqlora_plan": _SPEC, **head, **figures, "matrices": rows}, indent=1, allow_nan=False)

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
            document = json.loads(text)
            if document["lqlora_plan"] != _SPEC:
                raise InvalidArgumentError(f"Plan of version {document['lqlora_plan']!r}; this library reads {_SPEC}.")
            rows = {name: _read_row(row) for name, row in document["matrices"].items()}
            bound = -math.inf if document["bound"] is None else _finite(document["bound"])
            return cls(
                {name: row[0] for name, row in rows.items()},
                {name: row[1] for name, row in rows.items()},
                {name: row[2] for name, row in rows.items()},
                {name: row[3] for name, row in rows.items()},
                _finite(document["objective"]),
                bound,
                _word(document["status"]),
                _word(document["solver"]),
                _word(document["note"]),
                _word(document["goal"]),
                {n: _count(row["factor_bits"]) for n, row in document["matrices"].items() if "factor_bits" in row},
                _truth(document["counts_factors"]),
            )
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
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
            lines.append(
                f"| {name} | {fmt} | {_bits(fmt, self.shapes[name]):.3f} | {self.ranks[name]} | {self.costs[name]:.3g} |"
            )
        return "\n".join(lines)

    def bits_by_matrix(self) -> dict[str, float]:
        """Return the bits per weight of each matrix: the data of :meth:`plot`.

        Returns
        -------
        dict of str to float
            Exact storage divided by the number of weights.
        """
        return {name: _bits(fmt, self.shapes[name]) for name, fmt in self.formats.items()}

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


def _bits(fmt: BlockFormat, shape: tuple[int, ...]) -> float:
    return fmt.storage_bits(shape) / max(1, math.prod(shape))


def _read_row(row: dict[str, Any]) -> tuple[BlockFormat, int, tuple[int, ...], float]:
    shape = row["shape"]
    if not isinstance(shape, list):
        raise TypeError(f"{shape!r} is no shape")
    lengths = tuple(_count(length) for length in shape)
    text = _word(row["format"])
    codebook = None
    if "levels" in row:
        codebook = Codebook([_finite(x) for x in row["levels"]], codebook_name(text), row["normalization"])
    return BlockFormat.parse(text, codebook), _count(row["rank"]), lengths, _finite(row["cost"])


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _finite(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
