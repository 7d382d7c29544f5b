"""What an allocation chooses from: error and size of every matrix in every configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lqlora.allocation import _table_file
from lqlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    import os

    import numpy as np
    import numpy.typing as npt

    from lqlora.formats import BlockFormat

__all__ = ["Configuration", "CostTable"]


@dataclass(frozen=True)
class Configuration:
    """One way to store a matrix: the format of its quantized part, and the rank of its low-rank part.

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
        """Return format and rank as they are printed."""
        return f"{self.format} rank {self.rank}"


@dataclass(frozen=True, eq=False)
class CostTable:
    """Error and size of every matrix in every configuration.

    Parameters
    ----------
    names : tuple of str
        Matrices, one a row.
    shapes : tuple of tuple of int
        Their shapes.
    configurations : tuple of Configuration
        Pairs of format and rank, one a column.
    costs : ndarray of float64, shape (n, k)
        Weighted squared error of each decomposition.
    sizes : ndarray of int64, shape (n, k)
        Exact storage of the quantized part in bits.
    factor_sizes : ndarray of int64, shape (n, k)
        Exact storage of the low-rank factors in bits.

    Raises
    ------
    InvalidArgumentError
        If the arrays do not have a row for each matrix and a column for each configuration.
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
            raise InvalidArgumentError(f"A cost table of {len(self.names)} matrices has {len(self.shapes)} shapes.")
        for what in ("costs", "sizes", "factor_sizes"):
            if getattr(self, what).shape != wanted:
                raise InvalidArgumentError(
                    f"{what} of shape {getattr(self, what).shape} are not one for each of {wanted[0]} matrices and "
                    f"{wanted[1]} configurations."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a file. A crash at any moment leaves the old file, or none, never half of one.

        Parameters
        ----------
        path : path-like
            Ends in ``.json`` for JSON, in ``.npz`` for a zip archive of arrays, which is smaller. Equal tables give
            equal files.

        Raises
        ------
        CheckpointError
            If the file cannot be written.
        InvalidArgumentError
            If the name has another end.
        """
        _table_file.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Read a file that :meth:`save` wrote.

        Parameters
        ----------
        path : path-like
            The file.

        Returns
        -------
        CostTable
            Bit for bit what was saved.

        Raises
        ------
        CheckpointError
            If the file is missing or no cost table.
        InvalidArgumentError
            If its name has another end than ``.json`` or ``.npz``.

        Examples
        --------
        >>> import numpy as np, lqlora as lq, tempfile
        >>> table = lq.cost_table({"a": np.eye(8)}, [lq.BlockFormat(lq.NF4, 8)], rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table.save(f"{folder}/costs.json")
        ...     back = lq.CostTable.load(f"{folder}/costs.json")
        >>> back.names, back.sizes.tolist() == table.sizes.tolist()
        (('a',), True)
        """
        fields = _table_file.read(path)
        configurations = tuple(Configuration(fmt, rank) for fmt, rank in fields.pop("configurations"))
        return cls(configurations=configurations, **fields)

    @property
    def formats(self) -> tuple[BlockFormat, ...]:
        """Formats of the configurations, each once, in the order of the columns."""
        return tuple(dict.fromkeys(configuration.format for configuration in self.configurations))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the configurations, each once, in the order of the columns."""
        return tuple(dict.fromkeys(configuration.rank for configuration in self.configurations))

    @property
    def weight_count(self) -> int:
        """Number of weights of all matrices together."""
        return sum(math.prod(shape) for shape in self.shapes)
