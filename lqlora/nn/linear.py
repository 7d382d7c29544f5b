"""``LQLinear``: a linear layer with a frozen quantized weight and trainable low-rank factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._options import require_number
from lqlora.errors import InvalidArgumentError
from lqlora.nn.operators import in_autocast_dtype, linear_with_dropout  # its module registers torch.ops.lqlora
from lqlora.nn.tensor import QuantizedTensor
from lqlora.nn.weight import QuantizedWeight
from lqlora.quantized.array import require_quantized

if TYPE_CHECKING:
    from lqlora.checkpoint import StoredMatrix
    from lqlora.decomposition import Decomposition
    from lqlora.quantized import QuantizedArray

__all__ = ["LQLinear", "require_dropout"]


class LQLinear(nn.Module):
    """``y = x @ (dequantize(Q) + scaling * lora_B @ lora_A).T + bias``, with only the factors trainable.

    Parameters
    ----------
    quantized : QuantizedArray of shape (out_features, in_features)
        Frozen part.
    lora_A, lora_B : array, shape (rank, in_features) and (out_features, rank)
        Factors, copied into trainable float32 parameters.
    scaling : float, default 1.0
        Factor of the low-rank part.
    bias : Tensor of shape (out_features,), optional
        Frozen bias.
    dropout : float, default 0.0
        Probability with which an entry of the input of the low-rank part is set to zero in training. The others are divided
        by ``1 - dropout``.

    Attributes
    ----------
    quantized : QuantizedWeight
        Frozen part as a module of buffers.

    Raises
    ------
    InvalidArgumentError
        If the shapes of the factors do not fit the weight, ``scaling`` is not a finite number, or ``dropout`` is not a
        number from 0 to below 1.

    Notes
    -----
    Where no gradient is needed, one compiled call on a CPU multiplies a few rows by both parts. It adds in another order than
    torch, so results may differ in the last bit from those of the same rows in training.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3; QLoRA, arXiv 2305.14314, equation 5.
    """

    out_features: int
    in_features: int
    scaling: float
    dropout: float
    quantized: QuantizedWeight
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        quantized: QuantizedArray,
        lora_A: Any,
        lora_B: Any,
        scaling: float = 1.0,
        bias: torch.Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_number(scaling, "scaling", "finite", math.isfinite)
        require_dropout(dropout)
        require_quantized(quantized, "quantized")
        if len(quantized.shape) != 2 or quantized.batch_shape:
            raise InvalidArgumentError(f"quantized must be a matrix, got shape {quantized.shape}.")
        lora_A, lora_B = plain_array(lora_A, "lora_A", STORABLE_FLOATS), plain_array(lora_B, "lora_B", STORABLE_FLOATS)
        bias = None if bias is None else plain_array(bias, "bias", STORABLE_FLOATS)
        rows, columns = quantized.shape
        if tuple(lora_A.shape[1:]) != (columns,) or tuple(lora_B.shape) != (rows, lora_A.shape[0]):
            shapes = tuple(lora_B.shape), tuple(lora_A.shape)
            raise InvalidArgumentError(
                f"lora_B and lora_A must have shapes ({rows}, rank) and (rank, {columns}), got {shapes[0]} and {shapes[1]}."
            )
        # Assigned to a module, each attribute passes two __setattr__, which takes as long as to copy a small factor.
        plain = {"out_features": rows, "in_features": columns, "scaling": float(scaling), "dropout": float(dropout)}
        vars(self).update(plain)
        self.add_module("quantized", QuantizedWeight(quantized))
        # Copies, in float32: an optimizer changes parameters in place, and a decomposition must keep its factors. Small steps
        # would vanish in a half precision, so the factors stay float32 under autocast; the operator rounds them in each call.
        # The bias is frozen, so it may share the memory of the given one.
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            self.register_parameter(name, nn.Parameter(ops.convert(factor, torch).to(torch.float32, copy=True)))
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(ops.convert(bias, torch), requires_grad=False)
        )

    @classmethod
    @annotated
    def from_decomposition(
        cls, decomposition: Decomposition | StoredMatrix, bias: torch.Tensor | None = None, dropout: float = 0.0
    ) -> LQLinear:
        """Build the layer of a decomposed matrix.

        Parameters
        ----------
        decomposition : Decomposition or StoredMatrix
            Decomposed matrix.
        bias : Tensor, optional
            Frozen bias.
        dropout : float, default 0.0
            See :class:`LQLinear`.

        Returns
        -------
        LQLinear
            Layer on the CPU, or on the device of the decomposition's tensors.
        """
        parts = decomposition.quantized, decomposition.lora_A, decomposition.lora_B
        return cls(*parts, decomposition.scaling, bias, dropout)

    @property
    def weight(self) -> QuantizedTensor:
        """Sum of both parts, so that ``linear(x, layer.weight, layer.bias)`` is ``layer(x)`` without dropout.

        Its dtype is that of the layer that was replaced, or the last one that the module was cast to.
        """
        return QuantizedTensor(
            self.quantized.operands, self.lora_A, self.lora_B, self.scaling, dtype=self.quantized.dtype
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but not the weight, as programs do that tie or resize embeddings."""
        if name == "weight":
            raise InvalidArgumentError(
                "weight of a quantized layer must not be replaced or tied. Call dequantize_model first, or leave the layer dense."
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> NoReturn:
        """Raise: a quantized weight cannot be drawn anew, as that of ``torch.nn.Linear``."""
        raise InvalidArgumentError(
            "reset_parameters must not be called on a quantized layer, whose codes are fixed. Initialize the model before "
            "quantize_model, or leave the layer out."
        )

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return self.lora_A.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis of the input.

        Parameters
        ----------
        x : Tensor, shape (..., in_features)
            Floating-point input.

        Returns
        -------
        Tensor, shape (..., out_features)
            Outputs in the dtype of ``x``, or in the dtype of autocast if it is on.
        """
        x = in_autocast_dtype(x)
        weight, bias = self.quantized.operands, self.bias
        y: torch.Tensor
        if self.dropout and self.training:
            y = linear_with_dropout(x, weight, self.lora_A, self.lora_B, self.scaling, self.dropout)
        else:
            y = torch.ops.lqlora.linear(x, *weight, self.lora_A, self.lora_B, self.scaling)
        return y if bias is None else y + bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Show shape, rank and scaling, and dropout if there is any."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, scaling={self.scaling}"
        return f"{text}, dropout={self.dropout}" if self.dropout else text


def require_dropout(dropout: float) -> None:
    """Raise unless a probability of dropout is valid.

    Parameters
    ----------
    dropout : float
        Value of a caller.

    Raises
    ------
    InvalidArgumentError
        If it is not a number from 0 to below 1.
    """
    require_number(dropout, "dropout", "from 0 to below 1", lambda own: 0 <= own < 1)
