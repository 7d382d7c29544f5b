"""Quantized embeddings: a frozen table of which single rows are decoded, and output embeddings that share it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._options import require_integer, require_number
from lqlora._printable import printable
from lqlora.errors import InvalidArgumentError
from lqlora.nn.operators import in_autocast_dtype, require_one_process
from lqlora.nn.tensor import QuantizedTensor
from lqlora.nn.weight import QuantizedWeight
from lqlora.quantized.array import require_quantized

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lqlora.quantized import QuantizedArray

__all__ = ["QuantizedEmbedding", "QuantizedHead", "ScaledEmbedding", "quantized_tables", "scaled"]


class _TableModule(nn.Module):
    """Module with a quantized table, which is a submodule or belongs to another module."""

    quantized: QuantizedWeight

    def __init__(self, quantized: QuantizedArray | QuantizedWeight) -> None:
        super().__init__()
        if isinstance(quantized, QuantizedWeight):
            # Not registered as a submodule: it moves, is counted and saved with its owner, once. Copies of a model share the
            # copied table in the same way, because deepcopy copies each object once.
            vars(self)["quantized"] = quantized
        else:
            require_quantized(quantized, "quantized")
            self.quantized = QuantizedWeight(quantized)
        shape = self.quantized.shape
        if len(shape) != 2 or len(self.quantized.array.batch_shape):
            raise InvalidArgumentError(f"quantized must be a matrix, got shape {tuple(shape)}.")

    @property
    def weight(self) -> QuantizedTensor:
        """Table as a tensor that is never dense, frozen. Its dtype is that of the embeddings that are looked up."""
        found = QuantizedTensor(self.quantized.operands, dtype=self.quantized.dtype)
        # Functions of transformers that tie weights ask for a parameter.
        found._is_param = True  # noqa: SLF001 - what isinstance(found, nn.Parameter) reads
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but not another weight, as programs do that tie or resize embeddings."""
        if name != "weight":
            super().__setattr__(name, value)
        elif not isinstance(value, QuantizedTensor) or value.operands.tensors[0] is not self.quantized.codes:
            raise InvalidArgumentError(
                "weight of a quantized embedding must not be replaced, tied or resized. Call dequantize_model first, or leave the "
                "embedding dense."
            )

    def reset_parameters(self) -> NoReturn:
        """Raise: a quantized table cannot be drawn anew, as that of ``torch.nn.Embedding``."""
        raise InvalidArgumentError(
            "reset_parameters must not be called on a quantized embedding, whose codes are fixed. Initialize the model before "
            "quantize_model, or leave the embedding dense."
        )


class QuantizedEmbedding(_TableModule):
    """Frozen quantized table in the place of ``torch.nn.Embedding``. Only the rows that are looked up are decoded.

    Parameters
    ----------
    quantized : QuantizedArray of shape (num_embeddings, embedding_dim), or QuantizedWeight
        The table. Blocks follow its rows. A :class:`QuantizedWeight` belongs to another module, which the table is shared with.
    padding_idx : int, optional
        Row for padding, kept for code that asks for it, from 0 on. A negative one counts from the end. The table is frozen, so it
        changes nothing.
    scale : float, default 1.0
        Number that rows are multiplied by, as in the embeddings of Gemma and BART.
    rounds_scale : bool, default False
        Whether ``scale`` is rounded to the dtype of the rows before the product, as Gemma does.

    Attributes
    ----------
    quantized : QuantizedWeight
        The table as a module of buffers.

    Raises
    ------
    InvalidArgumentError
        If ``quantized`` is not a matrix, has blocks along its columns or rotated outputs, or ``padding_idx`` is not one of its rows.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> table = lq.quantize(torch.eye(4, 8), lq.BlockFormat.parse("nf4/8:float32"))
    >>> QuantizedEmbedding(table)(torch.tensor([[3, 0]])).argmax(dim=-1)
    tensor([[3, 0]])
    """

    @annotated
    def __init__(
        self,
        quantized: QuantizedArray | QuantizedWeight,
        padding_idx: int | None = None,
        scale: float = 1.0,
        *,
        rounds_scale: bool = False,
    ) -> None:
        super().__init__(quantized)
        if self.quantized.format.couples_rows:
            raise InvalidArgumentError(
                f"quantized must have blocks along its rows and no rotation of outputs, got format {self.quantized.format}. Quantize along -1, "
                "or without an axis."
            )
        self.num_embeddings, self.embedding_dim = self.quantized.shape
        if padding_idx is not None:
            require_integer(padding_idx, "padding_idx", -self.num_embeddings, self.num_embeddings - 1)
            padding_idx %= self.num_embeddings
        self.padding_idx = padding_idx
        require_number(scale, "scale", "finite", math.isfinite)
        self.scale, self.rounds_scale = float(scale), rounds_scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Parameters
        ----------
        ids : Tensor of int32 or int64, any shape
            Rows, from 0 to below ``num_embeddings``.

        Returns
        -------
        Tensor, shape (..., embedding_dim)
            Decoded rows in the dtype of the dense table, or in the last one that the module was cast to.
        """
        if type(ids) is not torch.Tensor:
            require_one_process(ids, "ids")
        table = self.quantized
        rows = cast("torch.Tensor", torch.ops.lqlora.embedding(ids, *table.operands, dtype=table.dtype))
        return scaled(rows, self.scale, rounds_scale=self.rounds_scale)

    def extra_repr(self) -> str:
        """Show the shape, and padding and scale if there are any."""
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        text += "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return text if self.scale == 1 else f"{text}, scale={self.scale}"


def scaled(rows: torch.Tensor, scale: float, *, rounds_scale: bool) -> torch.Tensor:
    """Return rows times a number.

    Parameters
    ----------
    rows : Tensor
        Rows that were looked up.
    scale : float
        The number.
    rounds_scale : bool
        Whether the number is rounded to the dtype of the rows first.

    Returns
    -------
    Tensor
        Products in the dtype of the rows.
    """
    if scale == 1:
        return rows
    # The arithmetic of 16-bit tensors takes a number in float32, and a tensor without axes in its own dtype.
    return rows * (rows.new_full((), scale) if rounds_scale else scale)


class ScaledEmbedding(nn.Embedding):
    """Dense embedding that multiplies its rows by a number, which :func:`dequantize_model` puts in the place of a quantized one.

    Parameters
    ----------
    quantized : QuantizedEmbedding
        The quantized embedding. Its table is not decoded: the new weight is on the meta device.
    """

    def __init__(self, quantized: QuantizedEmbedding) -> None:
        super().__init__(quantized.num_embeddings, quantized.embedding_dim, quantized.padding_idx, device="meta")
        self.scale, self.rounds_scale = quantized.scale, quantized.rounds_scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Parameters
        ----------
        ids : Tensor of integers, any shape
            Rows.

        Returns
        -------
        Tensor, shape (..., embedding_dim)
            Rows times the number.
        """
        return scaled(super().forward(ids), self.scale, rounds_scale=self.rounds_scale)


class QuantizedHead(_TableModule):
    """Output embedding that shares the table of a :class:`QuantizedEmbedding`: ``y = x @ table.T + bias``.

    Parameters
    ----------
    quantized : QuantizedWeight of shape (out_features, in_features)
        Table of the embedding, which owns it.
    bias : Tensor of shape (out_features,), optional
        Frozen bias.

    Raises
    ------
    InvalidArgumentError
        If ``quantized`` is not a matrix, or ``bias`` is of another shape.
    """

    @annotated
    def __init__(self, quantized: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__(quantized)
        self.out_features, self.in_features = self.quantized.shape
        if bias is not None:
            bias = ops.convert(plain_array(bias, "bias", STORABLE_FLOATS), torch)
            if tuple(bias.shape) != (self.out_features,):
                raise InvalidArgumentError(f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}.")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply the last axis of the input by the table.

        Parameters
        ----------
        x : Tensor, shape (..., in_features)
            Floating-point input.

        Returns
        -------
        Tensor, shape (..., out_features)
            Outputs in the dtype of ``x``, or in the dtype of autocast if it is on. Gradients reach ``x``.
        """
        x = in_autocast_dtype(x)
        y: torch.Tensor = torch.ops.lqlora.matmul(x, *self.quantized.operands)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, shared with an embedding"


def quantized_tables(
    model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None
) -> dict[str, dict[str, QuantizedEmbedding | QuantizedHead]]:
    """Return the modules of each quantized table, by the name of the embedding that owns it.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is not wrapped.
    modules : iterable of (str, torch.nn.Module), optional
        Names and modules to look through, if the caller has listed them. By default all of the model.

    Returns
    -------
    dict of str to dict of str to QuantizedEmbedding or QuantizedHead
        Modules in the order of the model, the owner first. A module with several names is listed under the first.

    Raises
    ------
    InvalidArgumentError
        If no module of the model owns the table of one of them.
    """
    names: dict[QuantizedEmbedding | QuantizedHead, str] = {}
    for name, module in model.named_modules() if modules is None else modules:
        if isinstance(module, QuantizedEmbedding | QuantizedHead):
            names.setdefault(module, name)
    owners = {own.quantized: name for own, name in names.items() if "quantized" in own._modules}  # noqa: SLF001 - of torch
    found = {name: {name: own} for own, name in names.items() if "quantized" in own._modules}  # noqa: SLF001
    for own, name in names.items():
        owner = owners.get(own.quantized)
        if owner is None:
            raise InvalidArgumentError(
                f"model must have the embedding that owns the quantized table of {printable(name)!r}, got none. Call "
                "dequantize_model before you replace that embedding or take the model apart."
            )
        if owner != name:
            found[owner][name] = own
    return found
