"""Weights that files hold as codes and scales in layouts that are decoded: GPTQ, compressed-tensors, and float8 with scales."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from lqlora import ops
from lqlora.integrations._words import host_tensor
from lqlora.integrations.compressed_tensors import from_compressed_tensors
from lqlora.integrations.gptq import decode_gptq
from lqlora.quantized import dequantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy.typing as npt

__all__ = ["FLOAT8", "CodedWeight", "find_coded"]

#: Dtypes of NumPy for those of safetensors with 8 bits and a sign.
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}

#: Rows and columns that share a scale in checkpoints of DeepSeek, which configurations repeat.
_USUAL_BLOCK = (128, 128)

_GPTQ = ("qweight", "qzeros", "scales", "g_idx")

#: Scales of float8 weights, and of inputs, which decoded weights have no use for.
_SCALES, _OF_INPUTS = (
    ("weight_scale_inv", "weight_scale"),
    ("input_scale", "input_activation_scale", "activation_scale"),
)


class _Described(Protocol):
    """Dtype and shape of a tensor in a file."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class CodedWeight(NamedTuple):
    """A weight of a model, and the tensors that it is computed from.

    Parameters
    ----------
    name : str
        Name of the weight, such as ``"up.weight"``.
    parts : tuple of str
        Names of the tensors. The weight stands in the place of the first.
    shape : tuple of int or None
        Its shape. None if the tensor ``{name}_shape`` says it.
    decode : callable
        Function of the tensors by name that returns the weight in float32. It can be pickled.
    is_linear : bool, default False
        Whether the weight has the shape (outputs, inputs) even where the dense model stores it transposed, as layers of GPT-2.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...] | None
    decode: Callable[[Mapping[str, Any]], npt.NDArray[np.float32]]
    is_linear: bool = False


def find_coded(tensors: Mapping[str, _Described], config: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the weights that are decoded.

    Parameters
    ----------
    tensors : mapping of str to description
        Tensors of a model.
    config : mapping
        Entry ``quantization_config`` of its ``config.json``; empty if there is none.

    Yields
    ------
    CodedWeight
        Weights in the order of their first tensors. No two have a tensor in common.
    """
    for key, own in tensors.items():
        layer, _, end = key.rpartition(".")
        prefix = f"{layer}." if layer else ""
        found = None
        if end == "qweight":
            found = _gptq(tensors, prefix, config)
        elif end == "weight_packed":
            found = _compressed(tensors, prefix, config)
        elif end == "weight" and own.dtype in FLOAT8:
            found = _float8(tensors, prefix, config)
        if found is not None:
            yield found


def _gptq(tensors: Mapping[str, _Described], prefix: str, config: Mapping[str, Any]) -> CodedWeight | None:
    # The configuration says how zero points are stored. AWQ has the same names, other codes, and no g_idx.
    kind = config.get("checkpoint_format", "gptq")
    if config.get("quant_method") != "gptq" or kind not in ("gptq", "gptq_v2"):
        return None
    parts = tuple(f"{prefix}{key}" for key in _GPTQ)
    if any(part not in tensors for part in parts):
        return None
    shape = (*tensors[parts[0]].shape[1:], *tensors[parts[3]].shape)
    decode = functools.partial(_decode_gptq, name=prefix.removesuffix("."), kind=kind)
    return CodedWeight(f"{prefix}weight", parts, shape, decode, is_linear=True)


def _decode_gptq(tensors: Mapping[str, Any], name: str, kind: Any) -> npt.NDArray[np.float32]:
    return decode_gptq(
        tensors if name else {f".{key}": own for key, own in tensors.items()}, name, checkpoint_format=kind
    )


def _compressed(tensors: Mapping[str, _Described], prefix: str, config: Mapping[str, Any]) -> CodedWeight | None:
    name = f"{prefix}weight"
    parts = [f"{name}_{key}" for key in ("packed", "scale", "shape")]
    if any(part not in tensors for part in parts) or f"{name}_g_idx" in tensors or tensors[parts[0]].dtype != "I32":
        return None
    parts += [part for part in (f"{name}_zero_point",) if part in tensors]
    return CodedWeight(
        name, tuple(parts), None, functools.partial(_decode_compressed, name=name, bits=_bits_of(config))
    )


def _bits_of(config: Mapping[str, Any]) -> int | None:
    """Return the bits of codes that a configuration of compressed-tensors states for all matrices, or None."""
    groups = config.get("config_groups")
    schemes = (
        [own.get("weights") for own in groups.values() if isinstance(own, dict)] if isinstance(groups, dict) else []
    )
    found = {own.get("num_bits") for own in schemes if isinstance(own, dict)}
    bits = found.pop() if len(found) == 1 else None
    return bits if type(bits) is int and 1 <= bits <= 8 else None


def _decode_compressed(tensors: Mapping[str, Any], name: str, bits: int | None) -> npt.NDArray[np.float32]:
    return np.asarray(dequantize(from_compressed_tensors(tensors, name, bits=bits)))


def _float8(tensors: Mapping[str, _Described], prefix: str, config: Mapping[str, Any]) -> CodedWeight | None:
    name = f"{prefix}weight"
    scales = [f"{prefix}{key}" for key in _SCALES if f"{prefix}{key}" in tensors]
    if len(scales) != 1 or len(tensors[name].shape) != 2 or tensors[scales[0]].dtype not in ("F32", "F16", "BF16"):
        return None
    block = config.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(type(own) is int and own > 0 for own in block)
    size = (block[0], block[1]) if is_block and block else _USUAL_BLOCK
    (rows, columns), shape = tensors[name].shape, tensors[scales[0]].shape
    blocks = (-(-rows // size[0]), -(-columns // size[1]))
    if shape not in ((), (1,), (1, 1), (rows,), (rows, 1), blocks):
        return None
    inputs = [f"{prefix}{key}" for key in _OF_INPUTS if f"{prefix}{key}" in tensors]
    decode = functools.partial(_decode_float8, name=name, scale=scales[0], block=size)
    return CodedWeight(name, (name, *scales, *inputs), tensors[name].shape, decode)


def _decode_float8(
    tensors: Mapping[str, Any], name: str, scale: str, block: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Return a weight whose float8 numbers are multiplied by one scale, one for each row, or one for each block."""
    # The shape of the scales was checked when the weight was found.
    weight, scales = tensors[name].astype(np.float32), np.asarray(ops.widen(host_tensor(tensors, scale)))
    ops.require_finite(scales, scale)
    rows, columns = weight.shape
    if scales.size == 1 or scales.shape in ((rows,), (rows, 1)):
        scales = scales.reshape(-1, 1)
    else:
        scales = scales.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]
    found: npt.NDArray[np.float32] = weight * scales
    return found
