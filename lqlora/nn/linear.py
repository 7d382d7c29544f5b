"""A linear layer of a frozen quantized weight and trainable low-rank factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lqlora import ops
from lqlora.errors import InvalidArgumentError
from lqlora.nn.operands import Operands, spell_codebook
from lqlora.nn.operators import is_autocast  # which registers torch.ops.lqlora
from lqlora.quantized import QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora.checkpoint import StoredMatrix
    from lqlora.decomposition import Decomposition

__all__ = ["LQLinear", "QuantizedWeight"]


#: Arrays that a quantized array has or has not, by its format.
_OPTIONAL = ("offset", "zero_points", "levels")


class QuantizedWeight(nn.Module):
    """A quantized array as buffers, so that it moves and is saved with its module.

    Its entries in a state dict are those of a checkpoint: ``codes``, ``scales`` and so on.

    Parameters
    ----------
    quantized : QuantizedArray
        Of any array library; moved to torch.

    Notes
    -----
    ``module.half()`` and the like move the buffers but never change their dtypes: scales are part of the format.
    """

    def __init__(self, quantized: QuantizedArray) -> None:
        super().__init__()
        here = quantized.to(torch)  # shares memory where it can, hence the copies below
        self.format = here.format
        self.shape = torch.Size(here.shape)
        self._spelling = str(here.format), tuple(here.shape), spell_codebook(here.format)
        self.register_buffer("codes", here.packed.clone())
        if isinstance(here.scales, QuantizedArray):
            self.scales = QuantizedWeight(here.scales)
        else:
            self.register_buffer("scales", here.scales.clone())
        for name in _OPTIONAL:
            array = getattr(here, name)
            self.register_buffer(name, None if array is None else array.clone())

    @property
    def array(self) -> QuantizedArray:
        """The quantized array; shares the buffers."""
        scales = self.scales.array if isinstance(self.scales, QuantizedWeight) else self.scales
        optional = {name: cast("torch.Tensor | None", getattr(self, name)) for name in _OPTIONAL}
        return QuantizedArray(self.codes, scales, self.format, tuple(self.shape), **optional)

    @property
    def operands(self) -> Operands:
        """The quantized array as ``torch.ops.lqlora.matmul`` and its like take it; shares the buffers."""
        return Operands(self._tensors(), *self._spelling)

    def _tensors(self) -> list[torch.Tensor]:
        own = self._buffers  # sooner than attributes, in every product; what is parametrized is an attribute
        codes, scales, *optional = (
            own[name] if name in own else getattr(self, name) for name in ("codes", "scales", *_OPTIONAL)
        )
        inner = scales._tensors() if isinstance(scales, QuantizedWeight) else [scales]  # noqa: SLF001 - of this class
        return [cast("torch.Tensor", codes), *inner, *(array for array in optional if array is not None)]

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return cast("torch.Tensor", self.codes).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense values, which code that inspects ``layer.weight.dtype`` wants to know."""
        return torch.float32

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense weight.

        Parameters
        ----------
        dtype : torch.dtype, default torch.float32
            Of the result.

        Returns
        -------
        Tensor
            Of shape ``self.shape``.
        """
        return cast("torch.Tensor", torch.ops.lqlora.dequantize(*self.operands, dtype=dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedWeight:  # noqa: FBT001, FBT002 - torch's signature
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Show shape and format."""
        return f"{tuple(self.shape)}, {self.format}"


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

    Raises
    ------
    InvalidArgumentError
        If shapes do not fit.

    References
    ----------
    LQ-LoRA, arXiv 2311.12023, section 3; QLoRA, arXiv 2305.14314, equation 5.
    """

    def __init__(
        self,
        quantized: QuantizedArray,
        lora_A: Any,
        lora_B: Any,
        scaling: float = 1.0,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        rows, columns = quantized.shape
        if tuple(lora_A.shape[1:]) != (columns,) or tuple(lora_B.shape) != (rows, lora_A.shape[0]):
            shapes = tuple(lora_B.shape), tuple(lora_A.shape)
            raise InvalidArgumentError(f"Factors of shapes {shapes[0]} and {shapes[1]} do not fit ({rows}, {columns}).")
        self.out_features, self.in_features = rows, columns
        self.scaling = scaling
        self.weight = QuantizedWeight(quantized)
        self.lora_A = nn.Parameter(ops.convert(lora_A, torch).to(torch.float32, copy=True))
        self.lora_B = nn.Parameter(ops.convert(lora_B, torch).to(torch.float32, copy=True))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_decomposition(
        cls, decomposition: Decomposition | StoredMatrix, bias: torch.Tensor | None = None
    ) -> LQLinear:
        """Build the layer of a decomposed matrix.

        Parameters
        ----------
        decomposition : Decomposition or StoredMatrix
            The matrix.
        bias : Tensor, optional
            Frozen bias.

        Returns
        -------
        LQLinear
            On the CPU, or the device of the decomposition's tensors.
        """
        return cls(decomposition.quantized, decomposition.lora_A, decomposition.lora_B, decomposition.scaling, bias)

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return self.lora_A.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis.

        Parameters
        ----------
        x : Tensor, shape (..., in_features)
            Floating-point input.

        Returns
        -------
        Tensor, shape (..., out_features)
            Of the dtype of ``x``, or the autocast dtype where autocast is on.
        """
        kind = x.device.type
        if is_autocast(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: torch.Tensor = torch.ops.lqlora.matmul(x, *self.weight.operands)
        y = torch.ops.lqlora.add_low_rank(y, x, self.lora_A, self.lora_B, self.scaling)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Show shape, rank and scaling."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, scaling={self.scaling}"
