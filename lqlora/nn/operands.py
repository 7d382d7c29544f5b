"""How a quantized array crosses the boundary of a torch operator: a list of tensors, and three words about them.

An operator takes tensors, numbers and strings. The tensors are those of :meth:`QuantizedArray.to_arrays`, in its order;
the format is its one-line spelling. A codebook that is not known by its name is spelled beside it, level by level, so
that a graph that holds the operator holds all there is to know.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch

from lqlora import ops
from lqlora.codebooks import Codebook, is_standard
from lqlora.errors import FormatError, InvalidArgumentError, MixedArraysError
from lqlora.formats import BlockFormat, ScaleFormat, codebook_name
from lqlora.quantized import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Operands", "check_tensors", "from_operands", "operands", "read_format", "spell_codebook", "stored_tensors"]

#: Dtype and shape of each stored tensor, by name and in order.
Stored: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Operands(NamedTuple):
    """A quantized array as the operators of ``torch.ops.lqlora`` take it.

    Parameters
    ----------
    tensors : list of Tensor
        The stored arrays, in the order of :meth:`lqlora.QuantizedArray.to_arrays`.
    fmt : str
        Spelling of the format.
    shape : tuple of int
        Shape of the dense array.
    codebook : str, optional
        Spelling of the codebook, where the format names one that :func:`lqlora.codebooks.by_name` does not know:
        normalization and levels, such as ``"absmax -1.0 0.0 1.0"``.
    """

    tensors: list[torch.Tensor]
    fmt: str
    shape: tuple[int, ...]
    codebook: str | None = None


def operands(quantized: QuantizedArray) -> Operands:
    """Return a quantized array as the operators take it.

    Parameters
    ----------
    quantized : QuantizedArray
        Of torch tensors; ``quantized.to(torch)`` makes one of any.

    Returns
    -------
    Operands
        ``torch.ops.lqlora.matmul(x, *operands(q))`` is how they are used. Shares the tensors, no copy.

    Raises
    ------
    MixedArraysError
        If the arrays are not torch tensors.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> q = lq.quantize(torch.eye(4), lq.BlockFormat.parse("nf4/4:float32"))
    >>> operands(q)[1:]
    ('nf4/4:float32', (4, 4), None)
    >>> torch.ops.lqlora.matmul(torch.ones(1, 4), *operands(q))
    tensor([[1., 1., 1., 1.]])
    """
    arrays = list(quantized.to_arrays().values())
    if not all(isinstance(array, torch.Tensor) for array in arrays):
        raise MixedArraysError("The operators of torch take tensors: move the quantized array by .to(torch) first.")
    return Operands(arrays, str(quantized.format), tuple(quantized.shape), spell_codebook(quantized.format))


def from_operands(
    tensors: Sequence[torch.Tensor], fmt: str, shape: Sequence[int], codebook: str | None = None
) -> QuantizedArray:
    """Rebuild the quantized array: the inverse of :func:`operands`.

    Parameters
    ----------
    tensors : sequence of Tensor
        The stored arrays, as ``torch.ops.lqlora.quantize`` returns them.
    fmt : str
        Spelling of the format.
    shape : sequence of int
        Shape of the dense array. The first of the tensors, the codes, tells how many leading dimensions count the
        arrays of a stack.
    codebook : str, optional
        Spelling of the codebook.

    Returns
    -------
    QuantizedArray
        Shares the tensors. Their number, dtypes, shapes and devices were checked, their values were not: reading them
        would make a GPU wait in every call.

    Raises
    ------
    FormatError
        If the spelling is none, or there are tensors too many or too few, or of another dtype or shape.
    MixedArraysError
        If the tensors are on two devices.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> tensors = torch.ops.lqlora.quantize(torch.eye(4), "nf4/4:float32")
    >>> lq.dequantize(from_operands(tensors, "nf4/4:float32", (4, 4))).equal(torch.eye(4))
    True
    """
    levels, stored = _description(fmt, codebook, tuple(shape), tensors[0].dim() - 1 if tensors else 0)
    check_tensors(tensors, stored, fmt)
    quantized: Any = tensors[len(levels)]  # the scales of the innermost level; from there outwards
    optional = iter(tensors[len(levels) + 1 :])
    for level, packed in zip(reversed(levels), reversed(tensors[: len(levels)]), strict=True):
        own = {name: next(optional) for name in level.optional}
        quantized = QuantizedArray(packed, quantized, level.format, level.shape, **own)
    return cast("QuantizedArray", quantized)


class _Level(NamedTuple):
    """An array, or the scales of one, which are an array too; with what it stores beside codes and scales."""

    format: BlockFormat
    shape: tuple[int, ...]
    blocks: int
    codes: tuple[torch.dtype, tuple[int, ...]]
    optional: Stored


def _level(fmt: BlockFormat, shape: tuple[int, ...], batch_dims: int, *, offset: bool) -> _Level:
    batch, own = shape[:batch_dims], shape[batch_dims:]
    lines, length = fmt.lines(own)
    blocks = lines * -(-length // fmt.block_size)
    codes = torch.uint8, (*batch, ops.packed_size(lines * length, fmt.bits))
    optional: Stored = {"offset": (torch.float32, (*batch, 1))} if offset else {}
    if fmt.codebook.normalization == "affine":
        optional["zero_points"] = torch.uint8, (*batch, ops.packed_size(blocks, fmt.bits))
    if fmt.levels != "codebook":
        optional["levels"] = torch.float32, (*batch, fmt.level_sets(own), len(fmt.codebook))
    return _Level(fmt, shape, blocks, codes, optional)


def _levels(fmt: BlockFormat, shape: tuple[int, ...], batch_dims: int) -> list[_Level]:
    """Return the array itself, its scales, the scales of these, and so on."""
    if not 0 <= batch_dims <= len(shape):
        raise InvalidArgumentError(f"batch_dims is 0 to the {len(shape)} dimensions of the array, not {batch_dims}.")
    found = [_level(fmt, shape, batch_dims, offset=False)]
    while isinstance(scales := found[-1].format.scales, ScaleFormat):
        inner = (*shape[:batch_dims], found[-1].blocks)
        found.append(_level(scales.format, inner, batch_dims, offset=scales.offset != "none"))
    return found


def stored_tensors(fmt: BlockFormat, shape: Sequence[int], batch_dims: int = 0) -> Stored:
    """Return what an array will be stored as; lengths may be the symbols of a tracing compiler."""
    return _stored(_levels(fmt, tuple(shape), batch_dims), tuple(shape[:batch_dims]))


def _stored(levels: list[_Level], batch: tuple[int, ...]) -> Stored:
    prefixes = ["scales." * depth for depth in range(len(levels))]
    found = {f"{prefix}codes": level.codes for prefix, level in zip(prefixes, levels, strict=True)}
    found[f"{prefixes[-1]}scales"] = getattr(torch, str(levels[-1].format.scales)), (*batch, levels[-1].blocks)
    for prefix, level in zip(reversed(prefixes), reversed(levels), strict=True):
        found |= {f"{prefix}{name}": kind for name, kind in level.optional.items()}
    return found


@functools.lru_cache(maxsize=4096)
def _description(
    fmt: str, codebook: str | None, shape: tuple[int, ...], batch_dims: int
) -> tuple[list[_Level], Stored]:
    levels = _levels(read_format(fmt, codebook), shape, batch_dims)
    return levels, _stored(levels, shape[:batch_dims])


def check_tensors(tensors: Sequence[torch.Tensor], expected: Stored, fmt: str) -> None:
    """Refuse tensors that are not those of a format, before a kernel trusts their sizes."""
    if len(tensors) != len(expected):
        wanted = f"{len(expected)} tensors ({', '.join(expected)})"
        raise FormatError(f"An array of format {fmt} is stored as {wanted}, not {len(tensors)}.")
    device = tensors[0].device
    for (name, (dtype, shape)), tensor in zip(expected.items(), tensors, strict=True):
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise FormatError(f"Tensor {name!r} of format {fmt} should be {dtype} of shape {shape}, not {found}.")
        if tensor.device != device:
            raise MixedArraysError(f"Tensors on {device} and {tensor.device} in one quantized array: move one.")


@functools.lru_cache(maxsize=1024)
def read_format(fmt: str, codebook: str | None = None) -> BlockFormat:
    """Read the two strings that an operator knows a format by."""
    if codebook is None:
        return BlockFormat.parse(fmt)
    normalization, *levels = codebook.split() or [""]
    try:
        own = Codebook([float(level) for level in levels], codebook_name(fmt), normalization)  # type: ignore[arg-type]
    except ValueError as error:  # of float() or of the codebook
        raise FormatError(
            f"{codebook[:80]!r} spells no codebook, expected such as 'absmax -1.0 0.0 1.0': {error}"
        ) from None
    return BlockFormat.parse(fmt, own)


def spell_codebook(fmt: BlockFormat) -> str | None:
    """Spell normalization and levels of a codebook that its name alone does not tell, else return None."""
    book = fmt.codebook
    return None if is_standard(book) else " ".join([book.normalization, *map(repr, book.levels.tolist())])
