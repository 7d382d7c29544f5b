"""The plan: a format for each matrix, and what is proven about the choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lqlora.allocation import _document
from lqlora.solvers import relative_gap

if TYPE_CHECKING:
    from lqlora.allocation.demand import Demand
    from lqlora.formats import BlockFormat

__all__ = ["Plan"]


@dataclass(frozen=True, kw_only=True)
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
    factor_bits : dict of str to int
        Exact bits of the low-rank factors of each matrix, as in the cost table.
    counts_factors : bool
        Whether the bits of the factors count in every budget and limit.
    demands : tuple of Demand
        What was asked, the budget first, and what the plan uses of it.
    objective, bound : float
        What was minimized, and a proven lower bound on it; see ``goal``.
    status : str
        ``"OPTIMAL"`` or ``"FEASIBLE"``: see :class:`lqlora.solvers.Status`.
    solver : str
        Solver and version.
    goal : {"error", "bits"}
        ``"error"`` if the objective is the sum of the costs, ``"bits"`` if it is ``counted_bits``.
    note : str
        What the caller should know, such as a budget above the dearest choice.
    seconds : float
        Wall time of the solver. Not written to JSON: equal inputs give equal files.
    """

    formats: dict[str, BlockFormat]
    ranks: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    costs: dict[str, float]
    factor_bits: dict[str, int]
    counts_factors: bool
    demands: tuple[Demand, ...]
    objective: float
    bound: float
    status: str
    solver: str
    goal: str = "error"
    note: str = ""
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
        return sum(self._bits(name) for name in self.formats)

    @property
    def counted_bits(self) -> int:
        """Exact bits that budgets counted: the quantized parts, and the factors if ``counts_factors``."""
        return self.storage_bits + (sum(self.factor_bits.values()) if self.counts_factors else 0)

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(self._count(name) for name in self.shapes)

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
        return _document.write(self)

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
        return cls(**_document.read(text))

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON Schema of the documents that :meth:`to_json` writes.

        Returns
        -------
        dict
            Draft 2020-12. It describes the shape of a document; whether its formats exist, :meth:`from_json` tells.

        Examples
        --------
        >>> Plan.json_schema()["properties"]["lqlora_plan"]
        {'const': 3}
        """
        return _document.schema()

    def bits_by_matrix(self) -> dict[str, float]:
        """Return the bits per weight of each quantized part.

        Returns
        -------
        dict of str to float
            Exact storage divided by the number of weights.
        """
        return {name: self._bits(name) / max(1, self._count(name)) for name in self.formats}

    def error_by_matrix(self) -> dict[str, float]:
        """Return the share of each matrix in the weighted squared error.

        Returns
        -------
        dict of str to float
            They sum to 1, or are all 0 if there is no error.
        """
        total = self.error
        return {name: cost / total if total else 0.0 for name, cost in self.costs.items()}

    def _bits(self, name: str) -> int:
        return self.formats[name].storage_bits(self.shapes[name])

    def _count(self, name: str) -> int:
        return math.prod(self.shapes[name])
