"""Operands of torch operators: a quantized array as a list of tensors with its format, shape and codebook.

An operator takes tensors, numbers and strings. The tensors are those of :meth:`QuantizedArray.to_arrays`, in its order,
which :meth:`BlockFormat.stored_arrays` knows. The format is its one-line spelling. A codebook that is not known by its name
is spelled beside it, level by level, so that a saved graph needs nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from lqlora._annotations import annotated
from lqlora.backends.cpu.linear import planned_linear
from lqlora.codebooks import codebook_from_text, codebook_to_text
from lqlora.errors import FormatError, InvalidArgumentError, MixedArraysError, UnsupportedArrayError
from lqlora.formats import BlockFormat, codebook_name
from lqlora.quantized.array import nest, require_quantized

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lqlora.quantized import QuantizedArray

__all__ = [
    "Description",
    "Operands",
    "check_tensors",
    "described",
    "from_operands",
    "operands",
    "read_format",
    "stored_tensors",
]

#: Dtype and shape of each stored tensor, by name and in order.
Stored: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Operands(NamedTuple):
    """Quantized array as arguments of the operators of ``torch.ops.lqlora``.

    Parameters
    ----------
    tensors : list of Tensor
        The stored arrays, in the order of :meth:`lqlora.QuantizedArray.to_arrays`.
    fmt : str
        Spelling of the format.
    shape : tuple of int
        Shape of the dense array.
    codebook : str, optional
        Spelling of a codebook that :func:`lqlora.codebooks.by_name` does not know by the name in the format: normalization
        and levels, such as ``"absmax -1.0 0.0 1.0"``.
    """

    tensors: list[torch.Tensor]
    fmt: str
    shape: tuple[int, ...]
    codebook: str | None = None


@annotated
def operands(quantized: QuantizedArray) -> Operands:
    """Return a quantized array as arguments of the operators: ``torch.ops.lqlora.matmul(x, *operands(q))``.

    Parameters
    ----------
    quantized : QuantizedArray
        Array of torch tensors; ``quantized.to(torch)`` moves one of another library.

    Returns
    -------
    Operands
        Shares the tensors, no copy.

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
    require_quantized(quantized, "quantized")
    arrays = list(quantized.to_arrays().values())
    if not all(isinstance(array, torch.Tensor) for array in arrays):
        raise MixedArraysError("quantized must hold torch tensors. Pass quantized.to(torch).")
    return Operands(arrays, str(quantized.format), tuple(quantized.shape), codebook_to_text(quantized.format.codebook))


@annotated
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
        Shape of the dense array. The dimensions of the first tensor, the codes, say how many of them belong to the batch of
        a stack.
    codebook : str, optional
        Spelling of the codebook.

    Returns
    -------
    QuantizedArray
        Shares the tensors; those of an offloaded layer are fetched. Their number, dtypes, shapes and devices are checked. Their values are not: reading them would
        make a GPU wait in every call.

    Raises
    ------
    FormatError
        If ``fmt`` is not a format, or the number, dtypes or shapes of the tensors are not those of the format.
    MixedArraysError
        If the tensors are on two devices.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> tensors = torch.ops.lqlora.quantize(torch.eye(4), "nf4/4:float32")
    >>> lq.dequantize(from_operands(tensors, "nf4/4:float32", (4, 4))).equal(torch.eye(4))
    True
    """
    # Functions of arrays know torch.Tensor itself. An OffloadedTensor gives the tensor that it stands for. Operators come here
    # in each call, so only the codes are asked: scales may be parameters, and codes are offloaded with the rest.
    if tensors and hasattr(tensors[0], "fetched"):
        tensors = [getattr(own, "fetched", own) for own in tensors]
    return described(tensors, fmt, shape, codebook).array(tensors)


def described(tensors: Sequence[torch.Tensor], fmt: str, shape: Sequence[int], codebook: str | None) -> Description:
    """Return what the text and the shape of operands describe, and check the tensors against it.

    Parameters
    ----------
    tensors : sequence of Tensor
        The stored arrays.
    fmt : str
        Spelling of the format.
    shape : sequence of int
        Shape of the dense array.
    codebook : str or None
        Spelling of the codebook.

    Returns
    -------
    Description
        Planned once for each text and shape. What does not fit raises the errors of :func:`from_operands`.
    """
    batch_dims = tensors[0].dim() - 1 if tensors and isinstance(tensors[0], torch.Tensor) else 0
    found = _description(fmt, codebook, tuple(shape), batch_dims)
    check_tensors(tensors, found.stored, fmt)
    return found


def stored_tensors(fmt: BlockFormat, shape: Sequence[int], batch_dims: int = 0) -> Stored:
    """Return the dtype and shape of each stored tensor. Lengths may be symbols of a tracing compiler.

    Parameters
    ----------
    fmt : BlockFormat
        The format.
    shape : sequence of int
        Shape of the dense array.
    batch_dims : int, default 0
        Number of leading dimensions that count the arrays of a stack.

    Returns
    -------
    dict of str to tuple of torch.dtype and tuple of int
        Dtype and shape by name, in the order of the operands.

    Raises
    ------
    InvalidArgumentError
        If the shape has fewer than ``batch_dims`` dimensions, or lacks the axis of the format.
    """
    if not 0 <= batch_dims <= len(shape):
        raise InvalidArgumentError(
            f"batch_dims must be from 0 to {len(shape)}, the dimensions of the array, got {batch_dims}."
        )
    stored = fmt.stored_arrays(tuple(shape[batch_dims:]), tuple(shape[:batch_dims]))
    return {name: (getattr(torch, dtype), own) for name, (dtype, own) in stored.items()}


@dataclass(frozen=True, eq=False)
class Description:
    """Format, shape and stored tensors that the text and the shape of operands describe.

    Parameters
    ----------
    format : BlockFormat
        The format.
    shape : tuple of int
        Shape of the dense array.
    batch_dims : int
        Number of leading dimensions that count the arrays of a stack.
    stored : dict of str to tuple of torch.dtype and tuple of int
        Dtypes and shapes of the tensors.
    """

    format: BlockFormat
    shape: tuple[int, ...]
    batch_dims: int
    stored: Stored

    def array(self, tensors: Sequence[torch.Tensor]) -> QuantizedArray:
        """Return the quantized array of tensors that fit.

        Parameters
        ----------
        tensors : sequence of Tensor
            Tensors that :func:`described` has checked.

        Returns
        -------
        QuantizedArray
            Shares the tensors.
        """
        return nest(dict(zip(self.stored, tensors, strict=True)), self.format, self.shape, self.batch_dims)

    @functools.cached_property
    def linear(self) -> Callable[..., torch.Tensor | None] | None:
        """Result of :func:`lqlora.backends.cpu.linear.planned_linear` for a matrix, which is planned at first use."""
        return planned_linear(self.format, self.shape) if len(self.shape) == 2 and not self.batch_dims else None


@functools.lru_cache(maxsize=4096)
def _description(fmt: str, codebook: str | None, shape: tuple[int, ...], batch_dims: int) -> Description:
    """Return what operands describe. Results are cached."""
    # The keys of the cache must be integers. Shapes of a tracing compiler are symbols, which stand for one graph only, so
    # fake implementations call read_format and stored_tensors themselves.
    known = read_format(fmt, codebook)
    return Description(known, shape, batch_dims, stored_tensors(known, shape, batch_dims))


def check_tensors(tensors: Sequence[torch.Tensor], expected: Stored, fmt: str) -> None:
    """Raise unless tensors have the dtypes and shapes of a format, before a kernel relies on their sizes.

    Parameters
    ----------
    tensors : sequence of Tensor
        The tensors.
    expected : dict of str to tuple of torch.dtype and tuple of int
        Result of :func:`stored_tensors`.
    fmt : str
        Spelling of the format, for messages.

    Raises
    ------
    FormatError
        If the number of tensors, a dtype or a shape differs from that of the format.
    UnsupportedArrayError
        If one is not a tensor.
    MixedArraysError
        If the tensors are on two devices.
    """
    if len(tensors) != len(expected):
        wanted = f"{len(expected)} tensors of format {fmt} ({', '.join(expected)})"
        raise FormatError(f"weight must be {wanted}, got {len(tensors)}.")
    # Kernels take sizes from the format and the shape, never from the tensors: a tensor that is too short would be read
    # beyond its end.
    device = getattr(tensors[0], "device", None)
    for (name, (dtype, shape)), tensor in zip(expected.items(), tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedArrayError(f"{name!r} of format {fmt} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise FormatError(f"{name!r} of format {fmt} must be {dtype} of shape {shape}, got {found}.")
        if tensor.device != device:
            raise MixedArraysError(f"weight must be on one device, got tensors on {device} and {tensor.device}.")


@functools.lru_cache(maxsize=1024)
def read_format(fmt: str, codebook: str | None = None) -> BlockFormat:
    """Parse a format, with the codebook of a second text if there is one.

    Parameters
    ----------
    fmt : str
        Spelling of the format.
    codebook : str, optional
        Text of the codebook, as :func:`lqlora.codebooks.codebook_to_text` returns it.

    Returns
    -------
    BlockFormat
        The format.

    Raises
    ------
    FormatError
        If ``fmt`` is not a format, or ``codebook`` is not the text of a codebook.
    """
    return BlockFormat.parse(fmt, codebook_from_text(codebook_name(fmt), codebook))
