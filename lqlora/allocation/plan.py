"""Plans: a format and a rank for each matrix, the use of each limit, and the proven bound on the objective."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lqlora._shared_settings import collection_paused
from lqlora.allocation import _plan_json
from lqlora.codebooks import codebook_to_json
from lqlora.solvers import relative_gap

if TYPE_CHECKING:
    from lqlora.allocation.limits import LimitUse
    from lqlora.formats import BlockFormat

__all__ = ["Plan", "PlannedMatrix"]


@dataclass(frozen=True)
class PlannedMatrix:
    """The choice of a plan for one matrix, with its cost and its size.

    Parameters
    ----------
    format : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    shape : tuple of int
        Shape of the matrix.
    cost : float
        Weighted squared error, as in the cost table.
    factor_bits : int
        Exact bits of the low-rank factors, as in the cost table.
    """

    format: BlockFormat
    rank: int
    shape: tuple[int, ...]
    cost: float
    factor_bits: int

    # Cached, since reports and budgets ask for it several times. The cache is not a field, so equality ignores it.
    @functools.cached_property
    def storage_bits(self) -> int:
        """Exact bits of the quantized part."""
        return self.format.storage_bits(self.shape)

    @property
    def weight_count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> Fraction:
        """Exact bits per weight of the quantized part, scales and padding included."""
        return Fraction(self.storage_bits, max(1, self.weight_count))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A format and a rank for each matrix, with the proven bound on the objective.

    Parameters
    ----------
    matrices : dict of str to PlannedMatrix
        Choice for each matrix, in the order of the cost table.
    counts_factors : bool
        Whether the bits of the low-rank factors count in every budget and limit.
    limits : tuple of LimitUse
        Budget and limits, the budget first, and how much of each the plan uses.
    objective, bound : float
        Minimized quantity, and a proven lower bound on it. ``goal`` says which quantity it is.
    status : str
        ``"OPTIMAL"`` or ``"FEASIBLE"``: see :class:`lqlora.solvers.Status`.
    solver : str
        Solver and version.
    goal : {"error", "bits"}
        ``"error"`` if the objective is the sum of the costs, ``"bits"`` if it is ``counted_bits``.
    note : str
        Remark for the caller, such as that the budget does not bind.
    seconds : float
        Wall time of the solver. It is not written to JSON, so that equal inputs give equal files.
    """

    matrices: dict[str, PlannedMatrix]
    counts_factors: bool
    limits: tuple[LimitUse, ...]
    objective: float
    bound: float
    status: str
    solver: str
    goal: str = "error"
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def formats(self) -> dict[str, BlockFormat]:
        """Format of each matrix."""
        return {name: own.format for name, own in self.matrices.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each matrix."""
        return {name: own.rank for name, own in self.matrices.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each matrix."""
        return {name: own.shape for name, own in self.matrices.items()}

    @property
    def costs(self) -> dict[str, float]:
        """Weighted squared error of each matrix."""
        return {name: own.cost for name, own in self.matrices.items()}

    @property
    def factor_bits(self) -> dict[str, int]:
        """Exact bits of the low-rank factors of each matrix."""
        return {name: own.factor_bits for name, own in self.matrices.items()}

    @property
    def gap(self) -> float:
        """Relative gap between objective and bound."""
        return relative_gap(self.objective, self.bound)

    @property
    def error(self) -> float:
        """Sum of the costs, rounded once: the same in any order of the matrices."""
        return math.fsum(own.cost for own in self.matrices.values())

    @property
    def storage_bits(self) -> int:
        """Exact bits of the quantized parts."""
        return sum(own.storage_bits for own in self.matrices.values())

    @property
    def counted_bits(self) -> int:
        """Exact bits that budgets count: the quantized parts, and the factors if ``counts_factors``."""
        return self.storage_bits + (sum(self.factor_bits.values()) if self.counts_factors else 0)

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(own.weight_count for own in self.matrices.values())

    @property
    def bits_per_weight(self) -> Fraction:
        """Exact bits per weight of the quantized parts, scales and padding included."""
        # A fraction, since a plan may use its budget to the bit: 2.7 in binary is not 27/10. Empty matrices count as 0.
        return Fraction(self.storage_bits, max(1, self.weight_count))

    @property
    def counted_bits_per_weight(self) -> Fraction:
        """Exact bits per weight of ``counted_bits``, which a budget of bits per weight limits."""
        return Fraction(self.counted_bits, max(1, self.weight_count))

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized parts."""
        return -(-self.storage_bits // 8)

    def bits_by_matrix(self) -> dict[str, float]:
        """Return the bits per weight of each quantized part.

        Returns
        -------
        dict of str to float
            Exact storage divided by the number of weights.
        """
        return {name: float(own.bits_per_weight) for name, own in self.matrices.items()}

    def error_by_matrix(self) -> dict[str, float]:
        """Return the share of each matrix in the weighted squared error.

        Returns
        -------
        dict of str to float
            Shares that sum to 1, or are all 0 if there is no error.
        """
        total = self.error
        return {name: own.cost / total if total else 0.0 for name, own in self.matrices.items()}

    @collection_paused()
    def to_json(self) -> str:
        """Return the plan as a JSON document.

        Returns
        -------
        str
            The same text for the same plan, with a line for each matrix. A format is written as its one-line spelling,
            and a codebook without a standard name with its levels.

        Raises
        ------
        InvalidArgumentError
            If :meth:`from_json` would refuse the text, such as for a name that is not Unicode.
        """
        shares = self.error_by_matrix()
        head = {
            "status": self.status,
            "solver": self.solver,
            "note": self.note,
            "goal": self.goal,
            "objective": self.objective,
            "bound": self.bound if math.isfinite(self.bound) else None,  # JSON has no infinity
            "bits_per_weight": float(self.bits_per_weight),
            "storage_bits": self.storage_bits,
            "factor_bits": sum(self.factor_bits.values()),
            "counts_factors": self.counts_factors,
            "limits": [vars(own) for own in self.limits],
        }
        matrices = {
            name: {
                "format": str(own.format),
                "rank": own.rank,
                "shape": list(own.shape),
                "cost": own.cost,
                "storage_bits": own.storage_bits,
                "factor_bits": own.factor_bits,
                **codebook_to_json(own.format.codebook),
                "bits_per_weight": float(own.bits_per_weight),
                "error_share": shares[name],
            }
            for name, own in self.matrices.items()
        }
        return _plan_json.write(head, matrices)

    @classmethod
    @collection_paused()
    def from_json(cls, text: str) -> Plan:
        """Read a document that :meth:`to_json` wrote, of this version or of version 3.

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
            If the text is not such a document.
        """
        fields = _plan_json.read(text)
        matrices = {name: PlannedMatrix(**row) for name, row in fields.pop("matrices").items()}
        return cls(matrices=matrices, **fields)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON Schema of the documents that :meth:`to_json` writes.

        Returns
        -------
        dict
            Draft 2020-12. It describes the structure of a document. Only :meth:`from_json` checks that formats exist.

        Examples
        --------
        >>> Plan.json_schema()["properties"]["lqlora_plan"]
        {'const': 4}
        """
        return _plan_json.schema()
