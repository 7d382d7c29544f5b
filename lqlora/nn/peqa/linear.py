"""``PEQALinear``: a linear layer with frozen codes and trainable scales, and low-rank factors if it has any."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from lqlora._annotations import annotated
from lqlora.errors import InvalidArgumentError
from lqlora.nn.linear import LQLinear
from lqlora.nn.operators import in_autocast_dtype
from lqlora.nn.peqa import operators  # noqa: F401 - registers torch.ops.lqlora.scaled_matmul
from lqlora.nn.sharding import whole
from lqlora.nn.weight import QuantizedWeight
from lqlora.quantized._decoding import decode_scales
from lqlora.quantized.array import QuantizedArray, require_quantized

__all__ = ["PEQALinear", "ScaledWeight", "with_plain_scales"]


def with_plain_scales(quantized: QuantizedArray) -> QuantizedArray:
    """Return the same array with its scales decoded to float32.

    Parameters
    ----------
    quantized : QuantizedArray
        A single array.

    Returns
    -------
    QuantizedArray
        Decodes to the same values, bit for bit. Codes, zero points and levels are shared.
    """
    scales = decode_scales(quantized.scales, quantized.format.scales)
    return dataclasses.replace(quantized, scales=scales, format=dataclasses.replace(quantized.format, scales="float32"))


class ScaledWeight(QuantizedWeight):
    """Quantized array as buffers, with the scales as a parameter.

    Parameters
    ----------
    quantized : QuantizedArray
        Array of any library; it is copied to torch. Its scales are decoded to float32.

    Notes
    -----
    The scales stay float32 when the module is moved to another dtype: steps of training would vanish in a half precision.
    """

    scales: nn.Parameter

    def __init__(self, quantized: QuantizedArray) -> None:
        super().__init__(with_plain_scales(quantized))
        scales = cast("torch.Tensor", self._buffers.pop("scales"))
        self.register_parameter("scales", nn.Parameter(scales))

    @property
    def array(self) -> QuantizedArray:
        """Quantized array that shares the codes and the scales of now, which may be negative after training."""
        own = super().array
        return dataclasses.replace(own, scales=whole(self.scales.detach()))

    @property
    def scaled_operands(self) -> tuple[Any, ...]:
        """Arguments of ``torch.ops.lqlora.scaled_matmul`` behind the input: scales, frozen tensors, and their description."""
        codes, scales, *others = self._current()
        return scales, [codes, *others], *self._spelling


class PEQALinear(LQLinear):
    """``y = x @ (scales * units).T + bias``, with frozen integer codes and trainable scales.

    The unit weight of a code is its level, or its distance from the zero point of its block. If the layer has low-rank
    factors, their product is added as in :class:`LQLinear`.

    Parameters
    ----------
    quantized : QuantizedArray of shape (out_features, in_features)
        Codes and first scales, in any format. Scales of two levels or of 16 bits are decoded to float32, which changes no
        value of the weight. Double quantization saves 0.373 bits per weight at blocks of 64; this gives them back.
    lora_A, lora_B : array, shape (rank, in_features) and (out_features, rank), optional
        Low-rank factors. Without them the rank is 0.
    scaling : float, default 1.0
        Factor of the low-rank part.
    bias : Tensor of shape (out_features,), optional
        Frozen bias.
    dropout : float, default 0.0
        Dropout before the low-rank part, see :class:`LQLinear`.
    train_factors : bool, default False
        Whether the factors train with the scales. Then they belong to the task, and otherwise to the frozen base.

    Raises
    ------
    InvalidArgumentError
        If ``quantized`` is not a matrix, only one factor is given, or shapes do not fit.

    Notes
    -----
    The gradient of a scale is the sum of ``dL/dW * units`` over its block. It is computed for a few rows at a time. Between
    the forward and the backward pass autograd keeps the input and the stored tensors, and no dense weight.

    A scale trains without bounds. It may pass zero and become negative, which negates its block: a model with negative scales
    runs, but :func:`freeze_scales` and :func:`save_model` refuse it, because formats have no sign for scales. A block of zeros
    stays zero if its codebook has a level 0, because the gradient of its scale is 0.

    References
    ----------
    PEQA, arXiv 2305.14152, section 3, equation 2.

    Examples
    --------
    >>> import torch, lqlora as lq
    >>> q = lq.quantize(torch.eye(4), lq.BlockFormat.parse("affine4/4@-1:float32"))
    >>> layer = PEQALinear(q)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> layer.quantized.scales.grad
    tensor([15., 15., 15., 15.])
    """

    quantized: ScaledWeight

    @annotated
    def __init__(
        self,
        quantized: QuantizedArray,
        lora_A: Any = None,
        lora_B: Any = None,
        scaling: float = 1.0,
        bias: torch.Tensor | None = None,
        dropout: float = 0.0,
        *,
        train_factors: bool = False,
    ) -> None:
        require_quantized(quantized, "quantized")
        if (lora_A is None) != (lora_B is None):
            raise InvalidArgumentError(
                f"{'lora_A' if lora_A is None else 'lora_B'} must be given too, got one factor alone."
            )
        if lora_A is None and len(quantized.shape) == 2:
            rows, columns = quantized.shape
            lora_A, lora_B = torch.empty(0, columns), torch.empty(rows, 0)
        super().__init__(quantized, lora_A, lora_B, scaling, bias, dropout)
        self.quantized = ScaledWeight(quantized)
        self.train_factors = train_factors
        self.lora_A.requires_grad_(train_factors)
        self.lora_B.requires_grad_(train_factors)

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
        y: torch.Tensor = torch.ops.lqlora.scaled_matmul(x, *self.quantized.scaled_operands)
        if self.rank:
            kept = functional.dropout(x, self.dropout, self.training) if self.dropout else x
            # x has the dtype of autocast already, so autocast changes no dtype of these products.
            low_rank = functional.linear(functional.linear(kept, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            y = y + (low_rank if self.scaling == 1 else low_rank * self.scaling)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Show shape, format and rank."""
        factors = ", train_factors=True" if self.train_factors else ""
        return f"{super().extra_repr()}, scales={self.quantized.scales.numel()}{factors}"
