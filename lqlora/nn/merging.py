"""Merging of low-rank factors into the weights they belong to: dense layers again, or requantized ones."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._dispatch import STORABLE_FLOATS, plain_array
from lqlora._patterns import list_names
from lqlora._printable import printable
from lqlora._warnings import warn
from lqlora.checkpoint import StoredMatrix
from lqlora.errors import InvalidArgumentError, NonFiniteError
from lqlora.nn.embedding import QuantizedEmbedding, QuantizedHead, ScaledEmbedding, quantized_tables
from lqlora.nn.experts import join_dense
from lqlora.nn.holders import find_holders
from lqlora.nn.linear import LQLinear
from lqlora.nn.model import move_attributes, quantized_layer, quantized_layers, replace_modules
from lqlora.nn.selection import unwrapped
from lqlora.nn.sharding import is_sharded
from lqlora.quantized import dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Mapping

    from lqlora.formats import BlockFormat
    from lqlora.quantized import Fit, QuantizedArray

__all__ = [
    "RequantizedLayer",
    "dense_layer",
    "dequantize_model",
    "merged_weight",
    "requantize_model",
    "require_replaceable",
    "usual_dtype",
]

#: Entries of a matrix that are summed in float64 together: in host memory as many as a cache holds, on devices more.
_CHUNK_ON_HOST, _CHUNK = 2**16, 2**24

#: Attributes of a quantized layer that a dense one does not have, or that are set when it is made.
_OF_FACTORS = frozenset({"dropout", "scaling", "train_factors", "transposed_class"})

#: Attributes of a module with a quantized table that a dense one does not have.
_OF_TABLES = frozenset({"quantized", "rounds_scale", "scale"})

#: Options of ``torch.nn.Embedding`` that a quantized one does not use.
_OF_EMBEDDINGS = frozenset({"max_norm", "norm_type", "scale_grad_by_freq", "sparse"})

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class RequantizedLayer:
    """Errors of one layer that :func:`requantize_model` replaced, relative to its original matrix.

    Parameters
    ----------
    format : BlockFormat
        Format of the layer, before and after.
    error_before : float
        Relative error of the sum of both parts. Without an original matrix the sum takes its place, and this is 0.
    error_after : float
        Relative error of the requantized matrix.
    error_without_factors : float, optional
        Relative error of the original matrix if it is quantized alone. It is None if the original was not given.
    """

    format: BlockFormat
    error_before: float
    error_after: float
    error_without_factors: float | None = None

    @property
    def gain_kept(self) -> float | None:
        """Share of the gain of the factors that is left, from 0 to 1; None if the original was not given."""
        if self.error_without_factors is None:
            return None
        gain = self.error_without_factors - self.error_before
        return min(1.0, max(0.0, (self.error_without_factors - self.error_after) / gain)) if gain > 0 else 1.0


@annotated
def merged_weight(layer: LQLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the dense matrix of a layer, ``dequantize(Q) + scaling * lora_B @ lora_A``.

    Parameters
    ----------
    layer : LQLinear
        Quantized layer.
    dtype : torch.dtype, default torch.float32
        Dtype of the result. The sum is computed in float64 and rounded once.

    Returns
    -------
    Tensor, shape (out_features, in_features)
        New matrix on the device of the layer, which autograd does not follow.

    Raises
    ------
    InvalidArgumentError
        If the dtype is not a floating-point one, or the layer is on the meta device or shared out to several processes.
    NonFiniteError
        If an entry is NaN, infinite, or beyond the range of the dtype.
    """
    return _merged(layer, dtype, "layer")


def _merged(layer: LQLinear, dtype: torch.dtype, name: str) -> torch.Tensor:
    if dtype not in _FLOATS:
        raise InvalidArgumentError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype!r:.80}.")
    if layer.quantized.device.type == "meta" or layer.lora_A.is_meta or layer.lora_B.is_meta:
        raise InvalidArgumentError(f"{name} must hold values, but is on the meta device. Load the model first.")
    if is_sharded(layer.parameters()):
        raise InvalidArgumentError(
            f"{name} must be whole, but is shared out to several processes. Save the model, and load it in one process."
        )
    dense = layer.quantized.dequantize()
    wide = torch.float32 if dense.device.type == "mps" else torch.float64  # that device has no float64
    found = torch.empty(dense.shape, dtype=dtype, device=dense.device)
    inner, outer = layer.lora_A.detach().to(wide), layer.lora_B.detach().to(wide) * layer.scaling
    rows = max(1, (_CHUNK_ON_HOST if dense.is_cpu else _CHUNK) // dense.shape[1])
    for start in range(0, len(dense), rows):
        part = slice(start, start + rows)
        found[part] = torch.addmm(dense[part].to(wide), outer[part], inner)
    # NaN is passed on by minima and maxima, which take a tenth of the time of isfinite().
    if found.numel() and not bool(torch.stack(found.aminmax()).isfinite().all()):
        limit = torch.finfo(dtype).max
        raise NonFiniteError(
            f"{name} must have a sum of both parts that {dtype} holds, got NaN or an entry beyond {limit:.3g}. "
            "Choose another dtype if the factors are finite."
        )
    return found


@annotated
@torch.inference_mode(mode=False)  # the new layers may train
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the quantized layers and embeddings of a model by dense ones that compute the same, in place.

    This merges the factors. Use it to export a fine-tuned model to programs that do not know quantized layers. A layer
    becomes ``torch.nn.Linear``, also if its class was derived from it, or a transposed ``Conv1D`` of GPT-2 if it was one.
    So the state of the model has the names and shapes that it had before it was quantized. Embeddings that multiply their
    rows by a number become a class derived from ``torch.nn.Embedding`` that does. All keep options such as ``sparse`` and ``padding_idx``.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers. It is changed only after every dense matrix was computed.
    dtype : torch.dtype, optional
        Dtype of the weights and biases of the new layers. The default is the dtype of the layer's bias, or else the one that
        most parameters and quantized embeddings of the rest of the model have, or else the one that most layers had. So a
        16-bit model stays one, and every model runs as before. Embeddings keep the dtype of their rows.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, is one itself, or is on the meta device, or if it has a quantized output embedding
        without the embedding that owns its table.
    NonFiniteError
        If a sum holds NaN, or an entry that is beyond the range of the dtype. In this case the model is unchanged.

    Notes
    -----
    New layers are frozen, and keep hooks and the training flag. A layer that shared its weight with an embedding before it
    was quantized has a weight of its own. Set ``config.tie_word_embeddings`` to False before you save such a model with
    transformers.
    """
    model = unwrapped(model)
    layers = _replaceable(model)
    usual = usual_dtype(model)
    # All matrices are computed before the first layer is replaced, so that an error leaves the model as it was.
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        own = dtype or (usual if layer.bias is None else layer.bias.dtype)
        replacements[layer] = dense_layer(layer, _merged(layer, own, repr(printable(name))), layer.bias)
    replacements |= _dense_tables(model, dtype)
    replace_modules(model, replacements)
    join_dense(model)


def _replaceable(model: nn.Module) -> dict[str, LQLinear]:
    """Return the quantized layers of a model, or raise if replacing one would change what the model computes."""
    layers = quantized_layers(model)
    require_replaceable(model, layers)
    return layers


#: Parameters of a quantized layer that it does not compute.
_PARAMETERS = frozenset({"lora_A", "lora_B", "bias"})


def require_replaceable(
    model: nn.Module, layers: Mapping[str, nn.Module], parameters: Collection[str] = _PARAMETERS
) -> None:
    """Raise if replacing a layer would change what the model computes.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is not wrapped.
    layers : mapping of str to torch.nn.Module
        Quantized layers to replace.
    parameters : collection of str, optional
        Parameters that the layers have if nothing computes them.

    Raises
    ------
    InvalidArgumentError
        If a layer has a forward method of its own, computes its factors, is held by something that is not a module, or is
        shared out to several processes.
    """
    held = find_holders(dict(model.named_modules()), layers.values())
    for name, layer in layers.items():
        if "forward" in vars(layer):
            fault = "has a forward method of its own, which goes on with the quantized layer. Remove it first"
        elif further := layer._parameters.keys() - parameters:  # noqa: SLF001 - of torch
            fault = f"computes its factors from {printable(list_names(sorted(further)))}. Make them parameters first"
        elif layer in held:
            fault = f"is also held by {held[layer]}, which would keep the quantized layer. Look the layer up when you call it"
        elif is_sharded(layer.parameters()):
            fault = "is shared out to several processes. Convert the model before fully_shard"
        else:
            continue
        raise InvalidArgumentError(f"model must have layers that can be replaced, but {printable(name)!r} {fault}.")


def dense_layer(
    layer: LQLinear, matrix: torch.Tensor, bias: torch.Tensor | None, without: Collection[str] = ()
) -> nn.Module:
    """Return the dense layer that replaces a quantized one.

    Parameters
    ----------
    layer : LQLinear
        Layer to replace. Its hooks and further attributes move.
    matrix : Tensor of shape (out_features, in_features)
        Weight of the new layer, also if its class stores the transposed one.
    bias : Tensor of shape (out_features,), optional
        Bias of the new layer, which gets the dtype of the matrix.
    without : collection of str
        Attributes to leave behind.

    Returns
    -------
    torch.nn.Module
        A frozen ``torch.nn.Linear``, or a transposed ``Conv1D`` of GPT-2 if the layer was one.
    """
    transposed: type[nn.Module] | None = getattr(layer, "transposed_class", None)
    found: nn.Module
    if transposed is None:
        found = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    else:
        found = transposed.__new__(transposed)  # without random values; its attributes are those of the quantized layer
        nn.Module.__init__(found)
        matrix = matrix.T.contiguous()
    found.weight = nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        # A bias that keeps its dtype is the same parameter, so that it stays shared with other modules.
        kept = isinstance(bias, nn.Parameter) and bias.dtype == matrix.dtype
        found.bias = bias if kept else nn.Parameter(bias.detach().to(matrix.dtype), requires_grad=False)
    move_attributes(found, layer, without={*_OF_FACTORS, *without})
    return found


def _dense_tables(model: nn.Module, dtype: torch.dtype | None) -> dict[nn.Module, nn.Module]:
    """Return the dense modules that replace quantized embeddings and their output embeddings. They stay tied."""
    found: dict[nn.Module, nn.Module] = {}
    tables = quantized_tables(model)
    require_replaceable(model, {name: own for modules in tables.values() for name, own in modules.items()}, {"bias"})
    for name, modules in tables.items():
        table = modules[name].quantized
        if table.device.type == "meta":
            raise InvalidArgumentError(
                f"{printable(name)!r} must hold values, but is on the meta device. Load it first."
            )
        weight = nn.Parameter(table.dequantize(dtype or table.dtype), requires_grad=False)
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"{printable(name)!r} must have entries that {weight.dtype} holds. Choose another dtype."
            )
        for own in modules.values():
            new: nn.Embedding | nn.Linear
            if isinstance(own, QuantizedHead):
                new = nn.Linear(own.in_features, own.out_features, bias=False, device="meta")
                new.register_parameter("bias", own.bias)
            else:
                new = (
                    nn.Embedding(own.num_embeddings, own.embedding_dim, own.padding_idx, device="meta")
                    if own.scale == 1
                    else ScaledEmbedding(own)
                )
                # The attributes of the dense embedding moved to the quantized one. Those of torch have values here already.
                vars(new).update({key: vars(own)[key] for key in _OF_EMBEDDINGS & vars(own).keys()})
            move_attributes(new, own, without=_OF_TABLES)
            new.weight = weight
            found[own] = new
    return found


def usual_dtype(model: nn.Module, without: Container[nn.Module] = ()) -> torch.dtype:
    """Return the dtype of most floating-point entries of a model outside of quantized layers and of some modules.

    Entries of quantized embeddings count as entries of the dtype of their rows. In a model without other entries, the dense
    weights that quantized layers stand for decide.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    without : container of torch.nn.Module, optional
        Further modules whose own parameters are not counted.

    Returns
    -------
    torch.dtype
        float32 if there is no such entry.
    """
    sizes, of_layers = Counter[torch.dtype](), Counter[torch.dtype]()
    for module in model.modules():
        if isinstance(module, LQLinear):
            of_layers[module.quantized.dtype] += math.prod(module.quantized.shape)
        elif module not in without:
            if isinstance(module, QuantizedEmbedding):
                sizes[module.quantized.dtype] += math.prod(module.quantized.shape)
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in _FLOATS:
                    sizes[parameter.dtype] += parameter.numel()
    counted = sizes or of_layers
    return max(counted, key=counted.__getitem__, default=torch.float32)


@annotated
@torch.inference_mode(mode=False)  # the new layers may train
def requantize_model(model: nn.Module, originals: Mapping[str, Any] | None = None) -> dict[str, RequantizedLayer]:
    """Quantize the sum of both parts of each layer again, in the format of the layer, and drop the factors, in place.

    The result needs the memory of the quantized part alone, and its error is about that of a model that was quantized
    without factors. :func:`dequantize_model` loses nothing.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers. It is changed only after every layer was quantized.
    originals : mapping of str to array or callable, optional
        Original matrices by layer, or their loaders, as :func:`weight_arrays` returns them. Errors are measured against
        them, or else against the sums.

    Returns
    -------
    dict of str to RequantizedLayer
        Errors of each layer. Its rank is 0 now.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer, is one itself, or is on the meta device, or an original is missing or of
        another shape.
    NonFiniteError
        If a sum holds NaN or infinity. In this case the model is unchanged.

    Warns
    -----
    UserWarning
        If layers lose more than half of the gain of their factors.

    Notes
    -----
    Scales are fitted by least squares, and levels too if the format stores them.
    """
    model = unwrapped(model)
    replacements: dict[nn.Module, nn.Module] = {}
    errors: dict[str, RequantizedLayer] = {}
    for name, layer in _replaceable(model).items():
        merged = _merged(layer, torch.float32, repr(printable(name)))
        again = _quantized(merged, layer.quantized.format, name)
        original = None if originals is None else _original(originals, name, merged)
        rows, columns = merged.shape
        no_factors = StoredMatrix(again, merged.new_empty(0, columns), merged.new_empty(rows, 0))
        replacements[layer] = quantized_layer(no_factors, layer)
        errors[name] = _errors(merged, again, original, name)
    replace_modules(model, replacements)
    kept = {name: own.gain_kept for name, own in errors.items() if own.gain_kept is not None and own.gain_kept < 0.5}
    if kept:
        worst = min(kept, key=kept.__getitem__)
        warn(
            f"{len(kept)} of {len(errors)} layers lost more than half of the gain of their factors by requantization, "
            f"such as {printable(worst)}, which keeps {kept[worst]:.0%}. Use dequantize_model to keep all of it.",
        )
    return errors


def _quantized(matrix: torch.Tensor, fmt: BlockFormat, name: str) -> QuantizedArray:
    """Quantize a matrix as well as its format allows."""
    fit: Fit = "scale" if fmt.levels == "codebook" else "levels+scale"
    return quantize(matrix, fmt, fit=fit, name=f"the matrix of {name!r}")


def _original(originals: Mapping[str, Any], name: str, merged: torch.Tensor) -> torch.Tensor:
    """Return the original matrix of a layer on the device of its sum."""
    if name not in originals:
        raise InvalidArgumentError(
            f"originals must have a matrix for {printable(name)!r}, got {printable(list_names(originals, 3))}."
        )
    given = originals[name]() if callable(originals[name]) else originals[name]
    found: torch.Tensor = ops.convert(plain_array(given, f"original of {name!r}", STORABLE_FLOATS), torch)
    if found.is_meta:
        raise InvalidArgumentError(f"original of {printable(name)!r} must hold values, but is on the meta device.")
    if found.shape != merged.shape:
        raise InvalidArgumentError(
            f"originals must have a matrix of shape {tuple(merged.shape)} for {printable(name)!r}, got {tuple(found.shape)}."
        )
    return found.to(merged)


def _errors(merged: torch.Tensor, again: QuantizedArray, original: torch.Tensor | None, name: str) -> RequantizedLayer:
    """Return the errors of one layer."""
    after = dequantize(again)
    if original is None:
        return RequantizedLayer(again.format, 0.0, _relative_error(after, merged))
    alone = dequantize(_quantized(original, again.format, name))
    return RequantizedLayer(again.format, *(_relative_error(found, original) for found in (merged, after, alone)))


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative Frobenius norm of a difference, 0 if both matrices are zero."""
    distance, norm = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (found - expected, expected))
    return distance / norm if norm else (0.0 if distance == 0 else float("inf"))
