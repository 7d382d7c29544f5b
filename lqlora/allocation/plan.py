"""The plan: a format for each matrix, and what is proven about the choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lqlora.allocation import _document
from lqlora.errors import InvalidArgumentError
from lqlora.reports import html as _page
from lqlora.reports import pictures as _plots
from lqlora.reports import tables as _tables
from lqlora.reports.projections import summarize_kinds
from lqlora.solvers import relative_gap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lqlora.allocation.demand import Demand
    from lqlora.formats import BlockFormat
    from lqlora.reports.pictures import Grid
    from lqlora.reports.projections import Kind

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

    def to_html(self, title: str = "Quantization plan", others: Sequence[Plan] = ()) -> str:
        """Return the plan as one HTML page: what was asked, pictures, and tables that can be sorted.

        Parameters
        ----------
        title : str
            Heading of the page.
        others : sequence of Plan
            Plans of the same matrices at other budgets: the page then shows the errors of all of them over their bits.

        Returns
        -------
        str
            Complete: it loads nothing, and holds no script but the one that sorts. The same text for the same plans.

        Raises
        ------
        InvalidArgumentError
            If the other plans are of different matrices, or do not count the same parts.
        """
        return _page.page(self, title, others)

    def table(self, by: Literal["matrix", "kind"] = "matrix") -> str:
        """Return the plan as a Markdown table.

        Parameters
        ----------
        by : {"matrix", "kind"}
            What has a row of its own: each matrix, or all matrices of a kind together.

        Returns
        -------
        str
            Text without a newline at the end.

        Raises
        ------
        InvalidArgumentError
            If ``by`` is another word.
        """
        tables = {"matrix": _tables.matrix_table, "kind": _tables.kind_table}
        if by not in tables:
            raise InvalidArgumentError(f"A table of a plan is by 'matrix' or by 'kind', not {by!r}.")
        return tables[by](self)

    def by_kind(self) -> tuple[Kind, ...]:
        """Return the matrices of each kind taken together: the data of the compact table.

        Returns
        -------
        tuple of Kind
            In the order of first appearance.
        """
        return summarize_kinds(self)

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

    def bits_by_layer(self) -> Grid:
        """Return the bits per weight of the quantized parts by kind and layer.

        Returns
        -------
        Grid
            What shares kind and layer, such as the experts of a layer, is taken together.
        """
        bits = _plots.by_layer({name: self._bits(name) for name in self.formats})
        counts = _plots.by_layer({name: self._count(name) for name in self.formats})
        return bits._replace(values=bits.values / np.maximum(counts.values, 1))

    def ranks_by_layer(self) -> Grid:
        """Return the ranks by kind and layer.

        Returns
        -------
        Grid
            The mean of what shares kind and layer.
        """
        ranks, ones = _plots.by_layer(self.ranks), _plots.by_layer(dict.fromkeys(self.ranks, 1))
        return ranks._replace(values=ranks.values / ones.values)

    def error_by_layer(self) -> Grid:
        """Return the shares in the weighted squared error by kind and layer.

        Returns
        -------
        Grid
            The sum of what shares kind and layer.
        """
        return _plots.by_layer(self.error_by_matrix())

    def plot(self) -> Any:
        """Draw bits per weight, ranks if they differ, and shares of the error, by kind of matrix and layer.

        Returns
        -------
        matplotlib.figure.Figure
            Belongs to no window; save it, or show it in a notebook.

        Raises
        ------
        MissingDependencyError
            If matplotlib is not installed.
        """
        bits = self.bits_by_layer()
        grids = [(bits, f"{float(self.bits_per_weight):.3f} bits per weight", "bits per weight", "{x:g}")]
        if len(set(self.ranks.values())) > 1:
            grids.append((self.ranks_by_layer(), "Ranks", "rank", "{x:g}"))
        grids.append((self.error_by_layer(), "Share of the weighted squared error", "share", "{x:.1%}"))
        figure = _plots.figure(figsize=(8, len(grids) * max(3.0, 1.2 + 0.25 * len(bits.kinds))))
        for axes, (grid, title, label, form) in zip(figure.subplots(len(grids)), grids, strict=True):
            _plots.draw_grid(axes, grid, title, label, form=form)
        return figure

    def _bits(self, name: str) -> int:
        return self.formats[name].storage_bits(self.shapes[name])

    def _count(self, name: str) -> int:
        return math.prod(self.shapes[name])
