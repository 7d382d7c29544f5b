"""Description of quantized matrices in the ``config.json`` of a model of transformers.

The key ``quantization_config`` has ``"quant_method": "lqlora"`` and ``groups``. A group has the names of the matrices that share a
format, a rank and a scaling. Shapes are those of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from msgspec import UNSET, Meta, Struct, UnsetType

from lqlora._documents import LONGEST, Number, Reader, Text, key_step, present_fields
from lqlora.codebooks import check_work, codebook_from_json, codebook_to_json
from lqlora.codebooks.codebook import StoredNormalization
from lqlora.errors import CheckpointError, LQLoRAError
from lqlora.formats import BlockFormat, codebook_name

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["METHOD", "MatrixFormat", "describe_matrices", "read_matrices"]

#: Value of ``quant_method``.
METHOD = "lqlora"


class MatrixFormat(NamedTuple):
    """Format, rank and scaling of one matrix.

    Parameters
    ----------
    format : BlockFormat
        Format of the quantized part.
    rank : int
        Rank of the low-rank part.
    scaling : float
        Factor of the low-rank part.
    """

    format: BlockFormat
    rank: int
    scaling: float


class _Group(Struct, frozen=True, forbid_unknown_fields=True):
    format: Text
    rank: Annotated[int, Meta(ge=0, le=LONGEST)]
    scaling: Number
    matrices: Annotated[list[Text], Meta(min_length=1)]
    levels: list[Number] | UnsetType = UNSET
    normalization: StoredNormalization | UnsetType = UNSET


class _Config(Struct, frozen=True):
    """Other keys are those of transformers."""

    groups: Annotated[list[_Group], Meta(min_length=1)]


def describe_matrices(matrices: Mapping[str, MatrixFormat]) -> dict[str, Any]:
    """Return the entry ``quantization_config`` of a model.

    Parameters
    ----------
    matrices : mapping of str to MatrixFormat
        Quantized matrices by module name.

    Returns
    -------
    dict
        Values of JSON.

    Examples
    --------
    >>> import lqlora as lq
    >>> row = MatrixFormat(lq.BlockFormat.parse("nf4/64:float16"), 8, 1.0)
    >>> describe_matrices({"up": row, "down": row})["groups"]
    [{'format': 'nf4/64:float16', 'rank': 8, 'scaling': 1.0, 'matrices': ['up', 'down']}]
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, row in matrices.items():
        group = groups.get(row)
        if group is None:
            own: dict[str, Any] = {"format": str(row.format), "rank": row.rank, "scaling": row.scaling, "matrices": []}
            group = groups[row] = own | codebook_to_json(row.format.codebook)
        group["matrices"].append(name)
    return {"quant_method": METHOD, "groups": list(groups.values())}


def read_matrices(config: Mapping[str, Any], source: str) -> dict[str, MatrixFormat]:
    """Return the quantized matrices of a model from the entry of :func:`describe_matrices`.

    Parameters
    ----------
    config : mapping
        The entry, of which other keys are ignored.
    source : str
        Where it comes from, for errors.

    Returns
    -------
    dict of str to MatrixFormat
        Matrices by module name.

    Raises
    ------
    CheckpointError
        If the entry is not one of this library, or names a matrix twice.
    """
    reader = Reader(f"{source} is not a quantization_config of lqlora", CheckpointError)
    groups = reader.convert(dict(config), _Config).groups
    found: dict[str, MatrixFormat] = {}
    place = "groups"
    try:
        check_work(codebook_name(own.format) for own in groups if isinstance(own.levels, UnsetType))
        for index, own in enumerate(groups):
            place = f"groups[{index}].format"
            codebook = codebook_from_json(codebook_name(own.format), present_fields(own, "levels", "normalization"))
            row = MatrixFormat(BlockFormat.parse(own.format, codebook), own.rank, own.scaling)
            for name in own.matrices:
                if name in found:
                    raise reader.fault(f"groups[{index}].matrices{key_step(name)}", "must be in one group only.")
                found[name] = row
    except LQLoRAError as error:
        if isinstance(error, CheckpointError):
            raise
        raise reader.fault(place, f": {error}") from error
    return found
