"""Embeddings of a model that can be quantized: which by default, and what shares their tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lqlora._patterns import matches, values_by_name
from lqlora._printable import printable
from lqlora.errors import FormatError, InvalidArgumentError
from lqlora.formats import BlockFormat
from lqlora.nn.embedding import QuantizedEmbedding, ScaledEmbedding, scaled
from lqlora.nn.holders import find_holders
from lqlora.nn.linear_maps import offers_more
from lqlora.nn.selection import DenseReason
from lqlora.quantized.quantization import with_fitted_levels

if TYPE_CHECKING:
    from collections.abc import Collection

    from lqlora.nn.selection import LinearMaps

__all__ = ["EmbeddingTable", "choose_tables", "embedding_fault", "scale_of"]

_MAX_NORM = DenseReason(
    "embeddings with max_norm", "has max_norm, so each call changes its table. Set max_norm to None first"
)
_CLASS = DenseReason(
    "embeddings of other classes", "is of a class that does not look rows up and multiply them by one number alone"
)

#: Attributes of every embedding of torch, which are not numbers that rows are multiplied by.
_USUAL = frozenset(vars(nn.Embedding(1, 1, device="meta")))


@dataclass(frozen=True)
class EmbeddingTable:
    """Weight of an embedding, and the modules that use it.

    Parameters
    ----------
    weight : torch.nn.Parameter
        The table, of shape (num_embeddings, embedding_dim).
    embeddings : dict of str to torch.nn.Module
        Embeddings that look rows up, by name. The first one gives the table its name.
    heads : dict of str to torch.nn.Module
        Linear layers that multiply by it.
    fault : DenseReason, optional
        Reason why the table cannot be quantized.
    """

    weight: nn.Parameter
    embeddings: dict[str, nn.Embedding]
    heads: dict[str, nn.Linear]
    fault: DenseReason | None


def _tables(maps: LinearMaps, without: Collection[nn.Module]) -> dict[str, EmbeddingTable]:
    """Return the tables of a model by the first name of an embedding. Some linear layers share none of them any more."""
    names = {own: name for name, own in maps.modules.items()}
    embeddings = {name: own for name, own in maps.modules.items() if isinstance(own, nn.Embedding)}
    found: dict[str, EmbeddingTable] = {}
    seen: set[nn.Module] = set()
    for name, own in embeddings.items():
        if own in seen:
            continue
        weight = own._parameters.get("weight")  # noqa: SLF001 - of torch; a computed weight is an attribute alone
        uses = [(own, f"{name}.weight")] if weight is None else maps.uses_of(weight)
        uses = [(user, place) for user, place in uses if user not in without]
        tied = {names[user]: user for user, _ in uses if isinstance(user, nn.Embedding)}
        heads = {
            names[user]: user for user, _ in uses if isinstance(user, nn.Linear) and names[user] not in maps.faults
        }
        others = [place for user, place in uses if user not in tied.values() and user not in heads.values()]
        fault = next((reason for key, one in tied.items() if (reason := embedding_fault(maps, key, one))), None)
        if others:
            fault = DenseReason(
                "shared weights", f"shares its weight with {others[0]!r}, which cannot use a quantized table"
            )
        seen.update(cast("Any", tied.values()))
        found[name] = EmbeddingTable(cast("nn.Parameter", weight), tied, heads, fault)
    return found


def embedding_fault(maps: LinearMaps, name: str, embedding: nn.Embedding) -> DenseReason | None:
    """Return why an embedding cannot be quantized, or None if it can.

    Parameters
    ----------
    maps : LinearMaps
        Modules of the model.
    name : str
        Name of the embedding.
    embedding : torch.nn.Embedding
        The embedding, also of a derived class.

    Returns
    -------
    DenseReason or None
        The first reason that applies.
    """
    held = find_holders(maps.modules, [embedding])
    buffers = embedding._buffers  # noqa: SLF001 - of torch
    numbers = {key for key, own in buffers.items() if own is not None and own.ndim == 0}
    if reason := maps.common_fault(name, embedding, held, numbers - embedding.state_dict().keys()):
        return reason
    if embedding.max_norm is not None:
        return _MAX_NORM
    return _CLASS if scale_of(embedding) is None else None


def scale_of(embedding: nn.Embedding) -> tuple[float, bool] | None:
    """Return the number that an embedding multiplies its rows by, or None if it computes something else.

    Numbers among the buffers and attributes are tried out on some rows of a random table, in training and in evaluation.

    Parameters
    ----------
    embedding : torch.nn.Embedding
        Embedding, of any values, also on the meta device.

    Returns
    -------
    (float, bool) or None
        The number, and whether it is rounded to the dtype of the rows before the product.
    """
    if type(embedding) is nn.Embedding:
        return 1.0, False
    if type(embedding) is ScaledEmbedding:
        return embedding.scale, embedding.rounds_scale
    if offers_more(embedding, nn.Embedding):
        return None
    given = [(float(own), True) for own in embedding._buffers.values() if own is not None]  # noqa: SLF001 - of torch
    given += [(own, False) for key, own in vars(embedding).items() if key not in _USUAL and type(own) in (int, float)]
    try:
        probe = _with_random_rows(embedding)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return next((own for own in [*given, (1.0, False)] if _is_lookup(probe, *own)), None)
    except Exception:  # noqa: BLE001 - code of others; whatever it raises, it does not take any input
        return None


def _with_random_rows(embedding: nn.Embedding) -> nn.Embedding:
    """Return a shallow copy of an embedding with another table: rows of zeros or NaN would not show the number."""
    found = copy.copy(embedding)
    rows, columns = embedding.weight.shape
    place = torch.device("cpu") if embedding.weight.is_meta else embedding.weight.device
    # Row i holds the numbers from the i-th on. So rows differ, and a large table takes the memory of one row and one column.
    numbers = torch.randn(rows + columns, generator=torch.Generator().manual_seed(0)).to(place, embedding.weight.dtype)
    table = nn.Parameter(numbers.as_strided((rows, columns), (1, 1)), requires_grad=False)
    found._parameters = {**embedding._parameters, "weight": table}  # noqa: SLF001 - of torch, which shares the dict
    return found


def _is_lookup(embedding: nn.Embedding, scale: float, rounds_scale: bool) -> bool:  # noqa: FBT001 - of a pair
    weight = embedding.weight
    last = len(weight) - 1
    for embedding.training in (True, False):
        for ids in (torch.tensor([[0, last]]), torch.tensor([last // 2, last // 3, last])):
            own = ids.to(weight.device)
            if not torch.equal(
                type(embedding).forward(embedding, own), scaled(weight[own], scale, rounds_scale=rounds_scale)
            ):
                return False
    return True


def _require_first_names(formats: Mapping[Any, Any], tables: Mapping[str, EmbeddingTable]) -> None:
    """Raise if a name selects no table, but a further module that shares one."""
    for given in formats:
        if isinstance(given, str) and not any(matches(name, given) for name in tables):
            for name, table in tables.items():
                for other in (*table.embeddings, *table.heads):
                    if matches(other, given):
                        raise InvalidArgumentError(
                            f"embeddings must name the first embedding of a table, but {printable(other)!r} shares the table of "
                            f"{printable(name)!r}. Name that one."
                        )


def choose_tables(
    maps: LinearMaps, formats: Any, without: Collection[nn.Module], *, fits_levels: bool
) -> dict[str, tuple[EmbeddingTable, BlockFormat]]:
    """Return the tables to quantize with their formats, and note in ``maps`` which ones stay dense for a reason.

    Parameters
    ----------
    maps : LinearMaps
        Modules of the model.
    formats : BlockFormat, or mapping of pattern to BlockFormat
        One format for the embeddings of tokens, or formats of embeddings by name.
    without : collection of torch.nn.Module
        Linear layers that get weights of their own.
    fits_levels : bool
        Whether levels are fitted to the tables.

    Returns
    -------
    dict of str to tuple of EmbeddingTable and BlockFormat
        Tables in the order of the model.

    Raises
    ------
    InvalidArgumentError
        If no table is selected, one cannot be quantized, or a format does not fit.
    """
    tables = _tables(maps, without)
    if not tables:
        before = any(isinstance(own, QuantizedEmbedding) for own in maps.modules.values())
        raise InvalidArgumentError(
            "embeddings must be None for a model without torch.nn.Embedding, got formats."
            + " Its embeddings are quantized already." * before
        )
    if isinstance(formats, BlockFormat):
        tokens = {name for name, own in tables.items() if not maps.heads.inputs.isdisjoint(own.embeddings.values())}
        by_name = dict.fromkeys(tokens or tables, formats)
        maps.dense_tables = {
            key: own.fault for name, own in tables.items() if name in by_name and own.fault for key in own.embeddings
        }
        usable = {name: fmt for name, fmt in by_name.items() if not tables[name].fault}
    else:
        if not isinstance(formats, Mapping) or not formats:
            raise InvalidArgumentError(
                f"embeddings must be a BlockFormat or a mapping of names or patterns to formats, got {formats!r:.80}."
            )
        _require_first_names(formats, tables)
        by_name = usable = values_by_name(formats, [*tables], parameter="embeddings", what="embedding")
    for name in [] if usable and not isinstance(formats, Mapping) else by_name:
        if reason := tables[name].fault:
            raise InvalidArgumentError(
                f"embeddings must name embeddings that can be quantized, but {printable(name)!r} {reason.sentence}."
            )
    for name, fmt in usable.items():
        if not isinstance(fmt, BlockFormat) or fmt.couples_rows:
            raise InvalidArgumentError(
                f"embeddings must give {printable(name)!r} a BlockFormat with blocks along rows and no rotation of outputs, got {fmt!s:.80}."
            )
        try:
            _ = with_fitted_levels(fmt) if fits_levels else fmt
        except FormatError as error:
            raise InvalidArgumentError(
                f"embeddings must give {printable(name)!r} a format whose levels can be fitted, got {fmt!s:.80}: {error}"
            ) from None
    return {name: (own, usable[name]) for name, own in tables.items() if name in usable}
