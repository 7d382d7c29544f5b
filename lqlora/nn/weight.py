"""``QuantizedWeight``: a quantized array as buffers of a torch module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lqlora import ops
from lqlora._options import require_kind
from lqlora.codebooks import codebook_to_text
from lqlora.nn.operator_arguments import Operands
from lqlora.quantized import QuantizedArray
from lqlora.quantized.array import require_quantized

if TYPE_CHECKING:
    from collections.abc import Callable

    from lqlora._typing import Array
    from lqlora.formats import BlockFormat

__all__ = ["QuantizedWeight"]

#: Arrays that a quantized array has or not, depending on its format.
_OPTIONAL = ("offset", "zero_points", "levels")


def _copied(array: Array) -> torch.Tensor:
    """Return an array as a tensor with memory of its own: load_state_dict writes into buffers in place."""
    return cast("torch.Tensor", ops.convert(array, torch).clone())


class QuantizedWeight(nn.Module):
    """Quantized array as buffers, which move and are saved with their module.

    Its entries in a state dict have the names of a checkpoint: ``codes``, ``scales`` and so on.

    Parameters
    ----------
    quantized : QuantizedArray
        Array of any library; it is copied to torch.

    Attributes
    ----------
    dtype : torch.dtype
        Dtype that the dense weight is said to have, for code that asks for ``layer.weight.dtype``. Nothing is stored in it.

    Notes
    -----
    ``module.half()`` and similar calls change ``dtype`` and move the buffers, but never change the dtypes of buffers: scales
    are part of the format.
    """

    dtype: torch.dtype
    format: BlockFormat
    shape: torch.Size
    _spelling: tuple[str, tuple[int, ...], str | None]
    _stored: tuple[str, ...]

    def __init__(self, quantized: QuantizedArray) -> None:
        super().__init__()
        require_quantized(quantized, "quantized")
        fmt, shape = quantized.format, quantized.shape
        # Assigned to a module, each attribute passes __setattr__, which takes as long as to copy a small array.
        vars(self).update(
            dtype=torch.float32,
            format=fmt,
            shape=torch.Size(shape),
            _spelling=(str(fmt), tuple(shape), codebook_to_text(fmt.codebook)),
            _stored=("codes", "scales", *(name for name in _OPTIONAL if getattr(quantized, name) is not None)),
        )
        self.register_buffer("codes", _copied(quantized.packed))
        if isinstance(quantized.scales, QuantizedArray):
            self.add_module("scales", QuantizedWeight(quantized.scales))
        else:
            self.register_buffer("scales", _copied(quantized.scales))
        for name in _OPTIONAL:
            array = getattr(quantized, name)
            if array is None:
                self._buffers[name] = None
            else:
                self.register_buffer(name, _copied(array))

    @property
    def array(self) -> QuantizedArray:
        """Quantized array that shares the buffers."""
        scales = self.scales.array if isinstance(self.scales, QuantizedWeight) else self.scales
        optional = {name: cast("torch.Tensor | None", getattr(self, name)) for name in _OPTIONAL}
        return QuantizedArray(self.codes, scales, self.format, tuple(self.shape), **optional)

    @property
    def operands(self) -> Operands:
        """Arguments of ``torch.ops.lqlora.matmul`` and ``.dequantize`` that share the buffers."""
        return Operands(self._current(), *self._spelling)

    def forward(self) -> list[torch.Tensor]:
        """Return the buffers in the order of :meth:`lqlora.QuantizedArray.to_arrays`, for programs that hook into this."""
        return self._tensors()

    def _current(self) -> list[torch.Tensor]:
        """Return the buffers; those of a module whose ``forward`` was replaced may be there only while it runs."""
        # accelerate loads the tensors of a module in a forward method of its own, and leaves meta tensors behind.
        return self() if "forward" in self.__dict__ else self._tensors()

    def _tensors(self) -> list[torch.Tensor]:
        """Return the buffers in the order of :meth:`lqlora.QuantizedArray.to_arrays`."""
        found: list[torch.Tensor] = []
        for name in self._stored:
            # Buffers are read without nn.Module.__getattr__, which costs more. A parametrized buffer is an attribute.
            array = self._buffers.get(name)
            if array is None:
                array = getattr(self, name)
            if isinstance(array, QuantizedWeight):
                found += array._current()  # noqa: SLF001 - of this class
            else:
                found.append(array)
        return found

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return cast("torch.Tensor", self.codes).device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense weight.

        Parameters
        ----------
        dtype : torch.dtype, default torch.float32
            Dtype of the result.

        Returns
        -------
        Tensor
            Dense weight of shape ``self.shape``.
        """
        require_kind(dtype, "dtype", torch.dtype, "a dtype of torch")
        return cast("torch.Tensor", torch.ops.lqlora.dequantize(*self.operands, dtype=dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedWeight:  # noqa: FBT001, FBT002 - torch's signature
        # half(), float() and to(dtype) convert floating-point buffers, and scales in another dtype are another format. The
        # result of fn was rounded already if its dtype differs, so the original is moved instead.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001 - torch's signature
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch would round other numbers to codes, and assign=True would change the dtypes that the format prescribes.
        is_assigned = local_metadata.get("assign_to_params_buffers", False)
        frozen = {
            name: own for name, own in self._parameters.items() if own is not None and not own.is_floating_point()
        }
        for name, own in {**self._buffers, **frozen}.items():
            given = state_dict.get(prefix + name)
            if own is None or given is None or given.dtype == own.dtype:
                continue
            if is_assigned and given.is_floating_point() and own.is_floating_point() and given.itemsize > own.itemsize:
                # Scales that a program has widened are the same numbers.
                exact = given.to(own.dtype)
                if torch.equal(exact.to(given.dtype), given):
                    state_dict[prefix + name] = exact
                    continue
            if is_assigned or not (given.is_floating_point() and own.is_floating_point()):
                error_msgs.append(f"{prefix + name} must be {own.dtype} for format {self.format}, got {given.dtype}.")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Show shape and format."""
        return f"{tuple(self.shape)}, {self.format}"
