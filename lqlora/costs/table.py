"""Cost tables: error and size of every matrix in every configuration, from which allocations choose, and their JSON."""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lqlora._annotations import annotated_class
from lqlora._dispatch import array_library, plain_array
from lqlora._messages import shown
from lqlora._shared_settings import collection_paused
from lqlora.codebooks import check_work, codebook_from_json, codebook_to_json
from lqlora.errors import InvalidArgumentError
from lqlora.formats import BlockFormat, codebook_name

if TYPE_CHECKING:
    import numpy.typing as npt

    from lqlora._documents import Reader
    from lqlora.costs._schema import Column

__all__ = ["Configuration", "CostTable"]

_SPEC = 1


@dataclass(frozen=True)
class Configuration:
    """A way to store a matrix: the format of its quantized part, and the rank of its low-rank part.

    Parameters
    ----------
    format : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.

    Examples
    --------
    >>> import lqlora as lq
    >>> str(Configuration(lq.BlockFormat.parse("nf4/64:float16"), 8))
    'nf4/64:float16 rank 8'
    """

    format: BlockFormat
    rank: int

    def __str__(self) -> str:
        """Return format and rank as reports and errors print them."""
        return f"{self.format} rank {self.rank}"


@annotated_class
@dataclass(frozen=True, eq=False)
class CostTable:
    """Error and size of every matrix in every configuration.

    Parameters
    ----------
    names : tuple of str
        Names of the n matrices, which are the rows.
    shapes : tuple of tuple of int
        Shapes of the matrices.
    configurations : tuple of Configuration
        The k pairs of format and rank, which are the columns.
    costs : ndarray of float64, shape (n, k)
        Weighted squared error of each decomposition. An infinite cost forbids a configuration.
    sizes : ndarray of int64, shape (n, k)
        Exact storage of the quantized part in bits.
    factor_sizes : ndarray of int64, shape (n, k)
        Exact storage of the low-rank factors in bits.

    Raises
    ------
    InvalidArgumentError
        If the arrays do not have a row for each matrix and a column for each configuration, a matrix or a configuration
        occurs twice, a cost is NaN or negative, or a size is negative.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    configurations: tuple[Configuration, ...]
    costs: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    factor_sizes: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        wanted = (len(self.names), len(self.configurations))
        if len(self.shapes) != len(self.names):
            raise InvalidArgumentError(
                f"shapes must hold one shape for each of the {len(self.names)} names, got {len(self.shapes)}."
            )
        for what in ("costs", "sizes", "factor_sizes"):
            array = plain_array(getattr(self, what), what)
            if array_library(array) != "numpy":
                raise InvalidArgumentError(f"{what} must be a NumPy array, got one of {array_library(array)}.")
            object.__setattr__(self, what, array)
            if getattr(self, what).shape != wanted:
                raise InvalidArgumentError(
                    f"{what} must have the shape {wanted}, for {wanted[0]} matrices and {wanted[1]} configurations, got "
                    f"{getattr(self, what).shape}."
                )
        _check_values(self)

    @property
    def formats(self) -> tuple[BlockFormat, ...]:
        """Formats of the configurations, each once, in the order of the columns."""
        return tuple(dict.fromkeys(map(operator.attrgetter("format"), self.configurations)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the configurations, each once, in the order of the columns."""
        return tuple(dict.fromkeys(map(operator.attrgetter("rank"), self.configurations)))

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(math.prod(shape) for shape in self.shapes)

    @collection_paused()
    def to_json(self) -> str:
        """Return the table as a JSON document.

        Returns
        -------
        str
            The same text for the same table, with a line for each configuration and each matrix.

        Raises
        ------
        InvalidArgumentError
            If :meth:`from_json` would refuse the text, such as for a name that is not Unicode.
        """
        from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec
        from lqlora.costs._schema import Column, Row  # noqa: PLC0415

        # Lines are joined by hand: json.dumps with an indent would put each of thousands of numbers on a separate line.
        # Sizes are stored because a configuration does not determine them: factors may be quantized, or of any dtype.
        columns = [_written(configuration) for configuration in self.configurations]
        rows = [
            {
                "name": name,
                "shape": list(shape),
                "costs": [cost if math.isfinite(cost) else None for cost in self.costs[index].tolist()],
                "sizes": self.sizes[index].tolist(),
                "factor_sizes": self.factor_sizes[index].tolist(),
            }
            for index, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True))
        ]
        check_work(codebook_name(own["format"]) for own in columns if "levels" not in own)
        reader = Reader("table must be one that can be read again", InvalidArgumentError)
        configurations = ",\n".join(reader.write(own, Column) for own in columns)
        matrices = ",\n".join(reader.write(own, Row) for own in rows)
        return (
            f'{{"lqlora_cost_table": {_SPEC},\n"configurations": [\n{configurations}\n],\n'
            f'"matrices": [\n{matrices}\n]}}'
        )

    @classmethod
    @collection_paused()
    def from_json(cls, text: str) -> CostTable:
        """Read the document that :meth:`to_json` writes.

        Parameters
        ----------
        text : str
            JSON.

        Returns
        -------
        CostTable
            Equal to the one written, to the last bit.

        Raises
        ------
        InvalidArgumentError
            If the text is not such a document.
        """
        from lqlora._documents import Reader  # noqa: PLC0415 - imports msgspec
        from lqlora.costs._schema import Table, TableVersion  # noqa: PLC0415

        reader = Reader("text must be a cost table in JSON", InvalidArgumentError)
        plain = reader.parse(text)
        if (version := reader.convert(plain, TableVersion).lqlora_cost_table) != _SPEC:
            raise reader.fault(
                "lqlora_cost_table", f"must be version {_SPEC}, which this library reads, got {shown(version)}."
            )
        document = reader.convert(plain, Table)
        configurations, rows = _configurations(document.configurations, reader), document.matrices
        for index, row in enumerate(rows):
            for key in ("costs", "sizes", "factor_sizes"):
                if len(getattr(row, key)) != len(configurations):
                    place, count = f"matrices[{index}].{key}", len(configurations)
                    raise reader.fault(
                        place, f"must have {count} numbers, as many as configurations, got {len(getattr(row, key))}."
                    )
        wanted = (len(rows), len(configurations))
        # JSON has no infinity: null is a forbidden configuration. Python writes the shortest text that restores a
        # float, so the other costs survive to the last bit.
        costs = [[math.inf if cost is None else cost for cost in row.costs] for row in rows]
        try:
            return cls(
                tuple(row.name for row in rows),
                tuple(row.shape for row in rows),
                configurations,
                np.array(costs, dtype=np.float64).reshape(wanted),
                np.array([row.sizes for row in rows], dtype=np.int64).reshape(wanted),
                np.array([row.factor_sizes for row in rows], dtype=np.int64).reshape(wanted),
            )
        except InvalidArgumentError as error:
            raise reader.fault("", f": {error}") from error


def _check_values(table: CostTable) -> None:
    """Raise if a name or a configuration occurs twice, or a number cannot be an error or a size."""
    for what, labels in (("names", table.names), ("configurations", table.configurations)):
        if len(set(labels)) < len(labels):
            twice = next(label for label, count in Counter(labels).items() if count > 1)
            raise InvalidArgumentError(f"{what} of a cost table must differ, but {str(twice)!r} occurs twice.")
    for what in ("costs", "sizes", "factor_sizes"):
        values = getattr(table, what)
        wrong = np.argwhere(~(values >= 0))  # NaN is not >= 0 either
        if len(wrong):
            row, column = wrong[0]
            raise InvalidArgumentError(
                f"{what} must be at least 0, got {values[row, column]} for {table.names[row]!r} in "
                f"{table.configurations[column]}."
            )


def _written(configuration: Configuration) -> dict[str, Any]:
    """Return a configuration as JSON."""
    own = configuration.format
    return {"format": str(own), "rank": configuration.rank, **codebook_to_json(own.codebook)}


def _configurations(columns: list[Column], reader: Reader) -> tuple[Configuration, ...]:
    """Return the configurations of a document."""
    from lqlora._documents import present_fields  # noqa: PLC0415 - imports msgspec

    found, place = [], "configurations"
    try:
        check_work(codebook_name(column.format) for column in columns if not present_fields(column, "levels"))
        for index, column in enumerate(columns):
            place = f"configurations[{index}].format"
            codebook = codebook_from_json(
                codebook_name(column.format), present_fields(column, "levels", "normalization")
            )
            found.append(Configuration(BlockFormat.parse(column.format, codebook), column.rank))
    except InvalidArgumentError as error:
        raise reader.fault(place, f": {error}") from error
    return tuple(found)
